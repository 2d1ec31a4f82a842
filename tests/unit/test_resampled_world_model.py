"""A world model at a decoder's rate: which frames come, which actions reach it, and when it is left alone."""

from __future__ import annotations

import numpy as np
import pytest

from physisforcing.core.errors import MissingCapabilityError
from physisforcing.core.requests import check_request
from physisforcing.core.types import (
    DT,
    ActionSpec,
    DecoderNeeds,
    FeatureRequest,
    Rollout,
    RolloutRequest,
    ViewLayout,
    WorldModelSpec,
)
from physisforcing.planner.check_worldmodel import check_world_model
from physisforcing.worldmodel.adapters.resampled import ResampledWorldModel, for_decoder

IDM = DecoderNeeds(horizons=(17,), frame_dt=2 * DT)


class Clock:
    """Shows in every frame its time in hundredths of a second, and in the corner the last action that it was given."""

    def __init__(self, fps=16.0, horizons=(17, 33, 81), actions=False):
        joints = ActionSpec(names=("a",), low=(-1.0,), high=(1.0,))
        self.last = None
        self.spec = WorldModelSpec(
            name="clock",
            views=ViewLayout(height=4, width=6),
            context_frames=1,
            horizons=horizons,
            frame_dt=1 / fps,
            conditions=frozenset({"actions"} if actions else {"text"}),
            returns=frozenset({"frames", "latents"}),
            action_spec=joints if actions else None,
            fingerprint=f"c{fps}",
        )

    def rollout(self, request):
        check_request(request, self.spec)
        self.last = request
        times = np.arange(request.horizon) * self.spec.frame_dt
        shades = (100 * times).round().astype(np.uint8)[:, None, None, None]
        frames = np.broadcast_to(shades, (*request.seeds_BS.shape, 1, request.horizon, 4, 6, 3)).copy()
        frames[:, :, :, 0] += request.context_BVTHWC[:, None, :, 0]
        if request.actions_BSPA is not None:
            frames[:, :, 0, :, 0, 0, 0] = (100 * request.actions_BSPA[:, :, -1, 0, None]).round()
        return Rollout(times_T=times, frames_BSVTHWC=frames, cost={"seconds": 1.0})


def ask(horizon=17, **changes):
    values = {
        "context_BVTHWC": np.zeros((1, 1, 1, 4, 6, 3), np.uint8),
        "instructions": ["x"],
        "seeds_BS": np.zeros((1, 2), np.int64),
        "horizon": horizon,
    }
    return RolloutRequest(**(values | changes))


def test_frames_are_those_nearest_to_the_decoders_times():
    inner = Clock()
    model = for_decoder(inner, IDM)
    made = model.rollout(ask())
    np.testing.assert_allclose(made.times_T, np.arange(17) * 0.12)
    assert inner.last.horizon == 33  # 2.0 s is the shortest that covers 1.92 s
    shown = made.frames_BSVTHWC[0, 1, 0, :, 2, 3, 0] / 100
    assert np.abs(shown - made.times_T).max() <= 1 / 32 + 0.005
    assert made.cost == {"seconds": 1.0}


def test_a_model_that_fits_is_left_alone():
    fits = Clock(fps=1 / 0.12, horizons=(9, 17))
    assert for_decoder(fits, IDM) is fits and for_decoder(fits, DecoderNeeds()) is fits
    other = Clock()
    features = DecoderNeeds(
        returns=frozenset({"features"}), features=FeatureRequest(taps=(1,)), horizons=(17,), frame_dt=0.12
    )
    assert for_decoder(other, features) is other  # frames at another rate would not help it
    longer = for_decoder(Clock(fps=1 / 0.12, horizons=(33,)), IDM)
    assert longer.spec.horizons == (17,) and longer.rollout(ask()).frames_BSVTHWC.shape[3] == 17


@pytest.mark.parametrize(("frames", "dt", "wanted"), [(5, 0.12, 9), (17, 0.12, 33), (6, 0.1, 9), (5, 0.06, 5)])
def test_a_rollout_holds_so_many_frames_of_another_rate(frames, dt, wanted):
    """Five frames .12 s apart last .48 s: nine frames .06 s apart, one at either end."""
    model = for_decoder(Clock(fps=1 / dt, horizons=(frames,)), DecoderNeeds(frame_dt=DT))
    assert model.spec.horizons == (wanted,)
    made = model.rollout(ask(horizon=wanted))
    assert made.frames_BSVTHWC.shape[3] == wanted and made.times_T[-1] <= (frames - 1) * dt + 1e-6
    slower = for_decoder(Clock(fps=1 / 0.06, horizons=(10,)), DecoderNeeds(frame_dt=0.12))
    assert slower.spec.horizons == (5,)  # .54 s


def test_actions_are_passed_on_and_the_last_is_held():
    inner = Clock(fps=1 / DT, horizons=(33, 49), actions=True)
    model = ResampledWorldModel(inner, frames=21, frame_dt=2 * DT)  # 40 control steps of 48
    actions = np.linspace(0, 0.8, 80, dtype=np.float32).reshape(1, 2, 40, 1)
    made = model.rollout(ask(horizon=21, actions_BSPA=actions))
    given = inner.last.actions_BSPA
    assert given.shape == (1, 2, 48, 1) and np.array_equal(given[:, :, :40], actions)
    assert np.array_equal(given[:, :, 40:], np.repeat(actions[:, :, -1:], 8, 2))
    assert made.frames_BSVTHWC[0, :, 0, 0, 0, 0, 0].tolist() == [39, 80]  # 0.8 * 39 / 79, and 0.8
    with pytest.raises(MissingCapabilityError):
        model.rollout(ask(horizon=21))


def test_it_is_another_model_and_says_so():
    spec = for_decoder(Clock(), IDM).spec
    assert spec.returns == {"frames"} and spec.horizons == (17,) and spec.frame_dt == 2 * DT
    names = {
        spec.fingerprint,
        Clock().spec.fingerprint,
        ResampledWorldModel(Clock(), frames=9, frame_dt=0.12).spec.fingerprint,
    }
    assert len(names) == 3
    with pytest.raises(MissingCapabilityError, match=r"frames for 1\.92 s"):
        for_decoder(Clock(horizons=(17,)), IDM)
    with pytest.raises(MissingCapabilityError):
        for_decoder(Clock(), IDM).rollout(ask(returns=frozenset({"latents"})))


def test_it_keeps_the_contract():
    class Shaded(Clock):
        def rollout(self, request):
            made = super().rollout(request)
            made.frames_BSVTHWC[:, :, :, 1:, 0, 0, 0] = [[[[len(request.instructions[0])]]]]
            made.latents_BSCFhw = np.zeros((*request.seeds_BS.shape, 1, 2, 1, 1), np.float32)
            return made

    results = check_world_model(lambda: for_decoder(Shaded(), IDM))
    assert not [r.line() for r in results if r.status == "fail"]
