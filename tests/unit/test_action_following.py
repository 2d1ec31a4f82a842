"""The measurement of action following: which points tell executions apart, which execution an imagination is nearer to."""

import importlib

import numpy as np
import pytest

from physisforcing.core.types import ActionSpec, PointTracks
from physisforcing.envs.diversions import APPROACH_STEPS, GRIPPER_STEP, REACH_RAD, random_targets
from physisforcing.worldmodel.backbones.actions import JOINTS

GRIPPERS = [6, 13]
NAMES = {1: "table", 8: "fl_link3", 9: "fr_link7", 30: "001_bottle"}


@pytest.fixture(scope="module")
def modules(repository):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "benchmarks"))
        yield {name: importlib.import_module(name) for name in ("action_following", "action_following_states")}


def test_random_targets_are_smooth_and_inside_the_limits():
    low, high = np.full(14, -1.0), np.full(14, 1.2)
    low[GRIPPERS], high[GRIPPERS] = 0.0, 1.0
    spec = ActionSpec(names=JOINTS, low=tuple(low), high=tuple(high))
    start = np.linspace(-0.9, 1.1, 14)
    start[GRIPPERS] = (1.0, 0.3)
    made = np.stack([random_targets(start, 48, spec, np.random.default_rng(seed)) for seed in range(100)])
    assert made.shape == (100, 48, 14) and made.dtype == np.float32
    assert (made >= low - 1e-6).all() and (made <= high + 1e-6).all()
    steps = np.abs(np.diff(np.concatenate([np.broadcast_to(start, (100, 1, 14)), made], 1), axis=1))
    arms = np.delete(steps, GRIPPERS, axis=2)
    assert arms.max() < np.pi / 2 * REACH_RAD / APPROACH_STEPS[0] + 1e-6 < 0.12
    assert steps[:, :, GRIPPERS].max() <= GRIPPER_STEP + 1e-6
    assert np.abs(made[:, -1, :6] - start[:6]).max(1).mean() > 0.3, "it goes somewhere"
    waits = (steps.max(1) == 0).reshape(100, 2, 7)[:, :, 6].mean()
    assert 0.1 < waits < 0.5, "some grippers are left alone, more are not"
    again = random_targets(start, 48, spec, np.random.default_rng(7))
    np.testing.assert_array_equal(made[7], again)
    np.testing.assert_array_equal(again[:20], random_targets(start, 20, spec, np.random.default_rng(7)))


def tracks(points_TN2, visible_TN, body_N) -> PointTracks:
    return PointTracks(
        points_TN2=points_TN2.astype(np.float32),
        visible_TN=visible_TN,
        size=(120, 160),
        body_N=np.asarray(body_N, np.int32),
        depth_N=np.ones(len(body_N), np.float32),
    )


def test_informative_points_are_those_that_both_show_and_that_move_apart(modules):
    states = modules["action_following_states"]
    body = [8, 8, 9, 30, 30, 30, 1, 30]
    still = np.broadcast_to(np.arange(8.0)[None, :, None], (3, 8, 2)).copy()
    moved, seen = still.copy(), np.ones((3, 8), bool)
    moved[2, [0, 2, 3, 4, 6, 7]] += 5.0
    moved[2, 5] += 0.1  # hardly apart
    hidden = seen.copy()
    hidden[2, 4] = False  # one execution hides it where they differ
    hidden[0, 7] = False  # nothing is asked about what the first picture does not show
    found = states.informative(
        [tracks(still, hidden, body), tracks(moved, seen, body)], NAMES, np.random.default_rng(0)
    )
    assert found[0].tolist() == [0, 2, 3] and found[1].tolist() == [0, 0, 1]
    many = np.full(300, 30)
    wide, far = np.zeros((3, 300, 2)), np.full((3, 300, 2), 9.0)
    far[0] = 0
    seen = np.ones((3, 300), bool)
    points, group = states.informative(
        [tracks(wide, seen, many), tracks(far, seen, many)], NAMES, np.random.default_rng(0)
    )
    assert len(points) == states.MOST == len(set(points.tolist())) and set(group.tolist()) == {1}


def made_states(states, count=3, seed=0):
    """Executions that move to the right (expert) and down (random); the last point is of no group."""
    generator = np.random.default_rng(seed)
    start = generator.uniform(30, 80, (count, 1, 1, 6, 2))
    way = np.linspace(0, 20, 5)[None, None, :, None]
    points = np.repeat(np.repeat(start, 2, 1), 5, 2)
    points[:, 0, ..., 0] += way[0]
    points[:, 1, ..., 1] += way[0]
    visible = np.ones((count, 2, 5, 6), bool)
    return states.States(
        context_SHWC=generator.integers(0, 255, (count, 120, 160, 3), dtype=np.uint8),
        text_SLD=generator.normal(size=(count, 32, 384)).astype(np.float16),
        proprioception_SKA=generator.normal(size=(count, 3, 14)).astype(np.float32),
        actions_S2PA=generator.normal(size=(count, 2, 8, 14)).astype(np.float32),
        group_SN=np.array([[0, 0, 1, 1, 1, -1]] * count, np.int8),
        points_S2TN2=points.astype(np.float32),
        visible_S2TN=visible,
        tracked_S2TN2=points.astype(np.float32),
        seen_S2TN=visible.copy(),
        about=[{"task": f"t{k % 2}", "seed": 100000 + k, "instruction": f"do {k}"} for k in range(count)],
    )


def test_states_come_back_from_their_file(modules, tmp_path):
    states = modules["action_following_states"]
    made = made_states(states)
    made.save(tmp_path / "a" / "states.safetensors")
    back = states.States.load(tmp_path / "a" / "states.safetensors")
    assert back.about == made.about and len(back) == 3
    for name in states.ARRAYS:
        np.testing.assert_array_equal(getattr(back, name), getattr(made, name), err_msg=name)
    both = states.States.join([made, back])
    assert len(both) == 6 and both.context_SHWC.shape == (6, 120, 160, 3)
    text = modules["action_following"].StoredText(back)
    tokens, mask = text.batch(["do 2", "do 0"])
    np.testing.assert_array_equal(tokens[0], made.text_SLD[2].astype(np.float32))
    assert mask.shape == (2, 32) and mask.all()
    blank = modules["action_following"].StoredText(back, left_out=True).batch(["do 2", "do 0"])
    assert not blank[0].any() and blank[0].shape == tokens.shape and bool((blank[1] == mask).all())


def loop_distance(made, imagined, seen, state, group, chunk, execution) -> float:
    values = [
        np.hypot(*(imagined[state, chunk, t, n] - made.points_S2TN2[state, execution, t, n]))
        for t in range(1, 5)
        for n in range(6)
        if made.group_SN[state, n] == group
        and made.visible_S2TN[state, 0, t, n]
        and made.visible_S2TN[state, 1, t, n]
        and seen[state, chunk, t, n]
    ]
    return float(np.mean(values)) if values else float("nan")


def test_distances_are_means_over_what_can_be_followed(modules):
    benchmark, made = modules["action_following"], made_states(modules["action_following_states"])
    generator = np.random.default_rng(2)
    made.visible_S2TN[:] = generator.random(made.visible_S2TN.shape) > 0.2
    imagined = made.points_S2TN2 + generator.normal(0, 6, made.points_S2TN2.shape).astype(np.float32)
    seen = generator.random(made.seen_S2TN.shape) > 0.2
    seen[1, 0, :, 2:5] = False  # the first imagination of state 1 has lost the object
    found = benchmark.distances(made, imagined, seen)
    for state in range(3):
        for group in range(2):
            for chunk in range(2):
                own = loop_distance(made, imagined, seen, state, group, chunk, chunk)
                other = loop_distance(made, imagined, seen, state, group, chunk, 1 - chunk)
                assert found.own_SG2[state, group, chunk] == pytest.approx(own, nan_ok=True)
                assert found.other_SG2[state, group, chunk] == pytest.approx(other, nan_ok=True)
                assert found.nearer_SG2[state, group, chunk] == (own < other)
    assert np.isnan(found.own_SG2[1, 1, 0]) and not found.nearer_SG2[1, 1, 0], "what melts is not nearer"
    assert found.points_SG2[1, 1, 0] == 0


def test_a_model_that_ignores_actions_gets_half_and_no_pair(modules):
    benchmark, made = modules["action_following"], made_states(modules["action_following_states"])
    perfect = benchmark.distances(made, made.tracked_S2TN2, made.seen_S2TN)
    assert perfect.nearer_SG2.all() and np.abs(perfect.own_SG2).max() == 0
    blind = np.repeat(made.points_S2TN2[:, :1], 2, 1)  # the expert's whatever is executed
    found = benchmark.distances(made, blind, made.seen_S2TN).nearer_SG2
    assert found.mean() == 0.5 and not found.all(2).any() and found[..., 0].all()
    swapped = benchmark.distances(made, made.points_S2TN2[:, ::-1], made.seen_S2TN)
    assert not swapped.nearer_SG2.any()


def test_the_report_counts_pairs_and_imaginations(modules, capsys):
    import argparse
    from pathlib import Path

    benchmark, made = modules["action_following"], made_states(modules["action_following_states"])
    imagined = made.points_S2TN2.copy()
    imagined[0, 1] = made.points_S2TN2[0, 0]  # one imagination of a pair goes the other way
    imagined[2, 0, :, 2:5] = made.points_S2TN2[2, 1, :, 2:5]  # and one object
    found = benchmark.distances(made, imagined, made.seen_S2TN)
    ceiling = benchmark.distances(made, made.tracked_S2TN2, made.seen_S2TN)
    options = argparse.Namespace(
        name="x", model=Path("/m/x/export"), measure=Path("/m/states.safetensors"), no_sentence=False
    )
    reported = {
        line["claim"].removeprefix("video/action_following/x/"): line
        for line in benchmark.report(made, found, ceiling, options)
    }
    lines = {claim: line for claim, line in reported.items() if "/" not in claim}
    values = {name: (line["value"], line["n"]) for name, line in lines.items() if line["unit"] == "share"}
    third = pytest.approx(1 / 3)
    assert values == {
        "arm_and_object_pair": (third, 3),
        "arm_pair": (pytest.approx(2 / 3), 3),
        "arm_imagination": (pytest.approx(5 / 6), 6),
        "object_pair": (third, 3),
        "object_imagination": (pytest.approx(4 / 6), 6),
    }
    line = lines["arm_pair"]
    assert line["low"] < 2 / 3 < line["high"] and line["against"] == {"executed_video": 1.0, "t0": 0.5, "t1": 1.0}
    assert lines["arm_imagination"]["against"]["random executed"] == pytest.approx(2 / 3)
    assert "/m/" not in line["command"] and line["seeds"] == "100000-100002"
    assert "2/3" in capsys.readouterr().out
    causes = {claim: (line["value"], line["n"]) for claim, line in reported.items() if "/" in claim}
    assert causes == {
        "arm_toward_other/expert_executed": (0.0, 3),
        "object_toward_other/expert_executed": (0.0, 3),
        "arm_right_where_object_is_wrong/expert_executed": (1.0, 1),
        "arm_toward_other/random_executed": (0.0, 3),
        "object_toward_other/random_executed": (0.0, 3),
        "arm_right_where_object_is_wrong/random_executed": (0.0, 1),
    }
    half = (made.points_S2TN2 + made.points_S2TN2[:, ::-1]) / 2
    np.testing.assert_allclose(benchmark.distances(made, half, made.seen_S2TN).toward_SG2, 0.5, atol=1e-6)
    options.no_sentence = True
    line = benchmark.report(made, found, ceiling, options)[0]
    assert "/x_without_sentence/" in line["claim"] and line["command"].endswith(
        "--model runs/x/export --name x --no-sentence"
    )
