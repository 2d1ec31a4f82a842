"""One clock to another: against numpy's own interpolation, brute force, and properties that hold whatever the times are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from physisforcing.core.errors import UserError
from physisforcing.core.resampling import nearest_rows, resample, resample_actions
from physisforcing.core.types import DT

steps = st.lists(st.floats(0.01, 3.0), min_size=1, max_size=20)
fractions = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=30)


def axis(gaps):
    return np.cumsum(np.asarray(gaps)) - 0.7


@settings(deadline=None, max_examples=150)
@given(steps, fractions)
def test_linear_equals_numpy_and_comes_back_at_the_knots(gaps, where):
    times = axis(gaps)
    values = np.random.default_rng(len(gaps)).normal(size=(len(times), 2, 3))
    wanted = times[0] + np.asarray(where) * (times[-1] - times[0])
    made = resample(values, times, wanted, method="linear")
    reference = np.stack([np.interp(wanted, times, column) for column in values.reshape(len(times), -1).T], 1)
    np.testing.assert_allclose(made.reshape(len(wanted), -1), reference, atol=1e-12)
    assert np.array_equal(resample(values, times, times, method="linear"), values)


@settings(deadline=None, max_examples=150)
@given(steps, fractions)
def test_nearest_takes_a_value_that_no_other_beats(gaps, where):
    times = axis(gaps)
    frames = np.arange(len(times), dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    wanted = times[0] + np.asarray(where) * (times[-1] - times[0])
    made = resample(frames, times, wanted, method="nearest")
    assert made.dtype == np.uint8 and made.shape == (len(wanted), 2, 2, 3)
    rows = made[:, 0, 0, 0].astype(int)
    assert np.array_equal(rows, nearest_rows(times, wanted))
    distance = np.abs(times[:, None] - wanted)
    assert (distance[rows, np.arange(len(wanted))] <= distance.min(0) + 2e-6).all()
    assert np.array_equal(resample(frames, times, times, method="nearest"), frames)


@settings(deadline=None, max_examples=60)
@given(steps, st.floats(-3, 3))
def test_holding_equals_the_ends_and_a_straight_line_stays_one(gaps, slope):
    times = axis(gaps)
    line = (slope * times + 1.0)[:, None]
    inside = np.linspace(times[0], times[-1], 7)
    np.testing.assert_allclose(resample(line, times, inside, method="linear")[:, 0], slope * inside + 1, atol=1e-9)
    for method in ("nearest", "linear"):
        past = np.array([times[0] - 5, times[-1] + 5])
        assert np.array_equal(resample(line, times, past, method=method, outside="hold"), line[[0, -1]])


def test_a_tie_goes_to_the_earlier_picture_whatever_rounding_says():
    for k in range(400):
        times = np.arange(k, k + 3) * 0.12
        assert nearest_rows(times, np.array([(times[0] + times[1]) / 2])).tolist() == [0]
        assert nearest_rows(times, np.array([(k + 1) * 2 * DT])).tolist() == [1]


def test_order_and_repeats_of_wanted_times_are_kept():
    made = resample(np.arange(5.0)[:, None], np.arange(5.0), np.array([3.5, 0.0, 3.5, 1.25]), method="linear")
    assert made[:, 0].tolist() == [3.5, 0.0, 3.5, 1.25]


@pytest.mark.parametrize("rate", [(2 * DT, DT), (DT, 2 * DT), (1 / 16, DT), (1 / 24, DT), (DT, 1 / 10)])
def test_actions_keep_their_path_at_another_rate(rate):
    dt, wanted = rate
    generator = np.random.default_rng(0)
    state, actions = generator.normal(size=14).astype(np.float32), generator.normal(size=(48, 14)).astype(np.float32)
    made = resample_actions(actions, dt, wanted, state_A=state)
    assert made.dtype == np.float32 and len(made) == int(48 * dt / wanted + 1e-9)
    knots, at = np.concatenate([state[None], actions]), (np.arange(len(made)) + 1) * wanted
    reference = np.stack([np.interp(at, np.arange(49) * dt, joint) for joint in knots.T], 1)
    np.testing.assert_allclose(made, reference, atol=1e-6)


def test_a_finer_rate_and_back_is_the_same_chunk():
    generator = np.random.default_rng(1)
    state, actions = generator.normal(size=3).astype(np.float32), generator.normal(size=(16, 3)).astype(np.float32)
    fine = resample_actions(actions, 2 * DT, DT, state_A=state)
    assert len(fine) == 32 and np.array_equal(fine[1::2], actions)
    assert np.array_equal(resample_actions(fine, DT, 2 * DT, state_A=state), actions)


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("wanted_R", lambda t, v: resample(v, t, np.array([9.0]), method="linear")),
        ("wanted_R", lambda t, v: resample(v, t, np.array([-0.01]), method="nearest")),
        ("wanted_R", lambda t, v: resample(v, t, np.array([np.nan]), method="nearest", outside="hold")),
        ("times_T", lambda t, v: resample(v, t[::-1], t, method="nearest")),
        ("times_T", lambda t, v: resample(v, t[:2], t, method="nearest")),
        ("times_T", lambda t, v: resample(v[:2], np.array([0.0, 0.0]), t[:1], method="nearest")),
        ("method", lambda t, v: resample(v, t, t, method="cubic")),
        ("method", lambda t, v: resample(v.astype(np.uint8), t, t, method="linear")),
        ("outside", lambda t, v: resample(v, t, t, method="linear", outside="wrap")),
        ("actions_PA", lambda t, v: resample_actions(v, 0.1, 1.0, state_A=v[0])),
        ("dt", lambda t, v: resample_actions(v, 0.0, 1.0, state_A=v[0])),
        ("state_A, actions_PA", lambda t, v: resample_actions(v, 1.0, 1.0, state_A=v[0, :0])),
    ],
)
def test_what_cannot_be_is_an_error_that_names_it(field, call):
    times = np.array([0.0, 1.0, 2.0])
    with pytest.raises(UserError) as caught:
        call(times, np.zeros((3, 2)))
    assert caught.value.field == field
