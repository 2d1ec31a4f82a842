"""Policies inside a world model: who drives whom, and when."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from meter_model import Meter
from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.types import DT, Observation, Rollout, RolloutRequest, ViewLayout
from physisforcing.envs.baselines import NoOp, Replay
from physisforcing.planner.action_planner import noise_seed
from physisforcing.planner.evaluator_config import PolicyInModelConfig
from physisforcing.planner.policy_evaluator import PolicyInModel, Start, target_frames
from physisforcing.planner.video_decoding import OpenLoopPolicy


class Counting:
    """A policy that counts its rows in joint 0, ``chunk`` at a time, and remembers what it saw."""

    fingerprint = "counting"

    def __init__(self, chunk: int) -> None:
        self.chunk, self.seen, self.given = chunk, [], 0

    def reset(self, *, task: str, seed: int, instruction: str) -> None:
        self.seen, self.given = [], 0

    def act(self, observation: Observation) -> np.ndarray:
        self.seen.append((observation.step, int(observation.images["head"][0, 0, 0]), float(observation.state_A[0])))
        rows = np.zeros((self.chunk, 14), np.float32)
        rows[:, 0] = (self.given + 1 + np.arange(self.chunk)) / 100
        self.given += self.chunk
        return rows

    def telemetry(self) -> dict[str, float]:
        return {}


def start(steps: int = 20, **changes: Any) -> Start:
    values = {
        "task": "click_bell",
        "seed": 100_003,
        "instruction": "click",
        "picture_HW3": np.zeros((24, 32, 3), np.uint8),
        "state_A": np.zeros(14, np.float32),
        "steps": steps,
    }
    return Start(**(values | changes))


def test_the_policy_drives_the_model_and_sees_what_follows() -> None:
    model, policy = Meter(), Counting(8)
    made = PolicyInModel(model).run(policy, start(20))
    # 1.2 * 20 control steps at two a picture: 12 pictures, three rollouts of 4 new ones, cut.
    assert len(made.frames_THWC) == 12 and made.frames_THWC.shape[1:] == (12, 16, 3)
    assert made.frames_THWC[:, 0, 0, 0].tolist() == list(range(0, 24, 2)), "each picture shows the command of its step"
    np.testing.assert_allclose(made.commands_PA[:, 0], np.arange(1, 25) / 100, atol=1e-6)
    assert [row[0] for row in policy.seen] == [0, 8, 16]
    assert [row[1] for row in policy.seen] == [0, 8, 16], "the policy sees the last imagined picture"
    assert [round(100 * row[2]) for row in policy.seen] == [0, 8, 16], "and the joints that it commanded"
    assert made.telemetry == {
        "policy_calls": 3,
        "stale_calls": 0,
        "dropped_rows": 0,
        "rollouts": 3,
        "imagination_s": 6.0,
    }
    second = model.requests[1]
    assert (second.context_BVTHWC == 8).all() and second.context_BVTHWC.shape == (1, 1, 1, 12, 16, 3)
    assert second.ids == [("click_bell", 100_003, 1)] and second.instructions == ["click"]


def test_what_is_too_short_for_a_rollout_is_dropped_or_kept() -> None:
    """A policy of 20 rows and a model of 8: two rollouts, then 4 rows are left."""
    dropping, keeping = Counting(20), Counting(20)
    dropped = PolicyInModel(Meter()).run(dropping, start(30))
    kept = PolicyInModel(Meter(), PolicyInModelConfig(remainder="keep")).run(keeping, start(30))
    assert dropped.telemetry["dropped_rows"] == 8 and dropped.telemetry["policy_calls"] == 3
    np.testing.assert_allclose(
        100 * dropped.commands_PA[:, 0], [*range(1, 17), *range(21, 37), *range(41, 49)], atol=1e-4
    )
    assert [row[0] for row in dropping.seen] == [0, 16, 32] and [row[1] for row in dropping.seen] == [0, 16, 36]
    np.testing.assert_allclose(100 * kept.commands_PA[:, 0], range(1, 41), atol=1e-4)
    assert kept.telemetry["dropped_rows"] == 0
    assert keeping.seen[1][:2] == (20, 16), (
        "it is told the step where its new rows begin, and the last picture there is"
    )


def test_a_policy_with_short_chunks_is_asked_again_and_that_is_counted() -> None:
    policy = Counting(3)
    made = PolicyInModel(Meter()).run(policy, start(7))
    np.testing.assert_allclose(100 * made.commands_PA[:8, 0], range(1, 9), atol=1e-4)
    assert made.telemetry["policy_calls"] == 3 and made.telemetry["stale_calls"] == 2 and len(made.frames_THWC) == 5
    assert [row[0] for row in policy.seen] == [0, 3, 6] and {row[1] for row in policy.seen} == {0}


def test_a_recording_is_played_exactly() -> None:
    actions = np.zeros((21, 14), np.float32)
    actions[:, 0] = np.sin(np.arange(21) / 5) ** 2
    made = PolicyInModel(Meter()).run(OpenLoopPolicy("recorded", actions), start(21))
    np.testing.assert_array_equal(made.commands_PA[:21], actions)
    np.testing.assert_array_equal(made.commands_PA[21:], actions[[-1, -1, -1]])
    # The same recording as one long chunk: WorldArena's rule loses its end, keeping the queue does not.
    lost = PolicyInModel(Meter()).run(Replay(actions), start(21)).commands_PA
    kept = PolicyInModel(Meter(), PolicyInModelConfig(remainder="keep")).run(Replay(actions), start(21)).commands_PA
    assert (lost[16:] == actions[-1]).all() and (lost[16:21] != actions[16:21]).any()
    np.testing.assert_array_equal(kept[:21], actions)


def test_the_longest_rollout_is_taken_and_coarser_actions_are_ends() -> None:
    model = Meter(horizons=(5, 9), stride=2)
    PolicyInModel(model).run(Counting(16), start(10))
    actions = model.requests[0].actions_BSPA
    assert actions is not None and actions.shape == (1, 1, 8, 14)
    np.testing.assert_allclose(100 * actions[0, 0, :, 0], range(2, 17, 2), atol=1e-4)


def test_noise_is_the_same_for_every_policy() -> None:
    seeds = []
    for policy, seed in ((Counting(8), 0), (NoOp(), 0), (Counting(8), 1)):
        model = Meter()
        PolicyInModel(model, PolicyInModelConfig(seed=seed)).run(policy, start(12))
        seeds.append([int(request.seeds_BS[0, 0]) for request in model.requests])
    assert seeds[0] == seeds[1] and len({*seeds[0], *seeds[2]}) == 4
    assert seeds[0][1] == noise_seed(noise_seed(0, 100_003, 0), 1, 0)


def test_by_text_the_policy_only_moves_where_rollouts_start() -> None:
    with pytest.raises(MissingCapabilityError, match="condition actions"):
        PolicyInModel(Meter(text=True, lags=(0, 4)))
    with pytest.raises(MissingCapabilityError, match="any influence"):
        PolicyInModel(Meter(text=True), PolicyInModelConfig(conditioning="text"))
    model = Meter(text=True, lags=(0, 4))
    made = PolicyInModel(model, PolicyInModelConfig(conditioning="text")).run(Counting(8), start(20))
    assert made.frames_THWC[:, 0, 0, 0].tolist() == [0] * 5 + [8] * 4 + [16] * 3
    third = model.requests[2]
    assert third.actions_BSPA is None and third.proprioception_BKA is not None
    np.testing.assert_allclose(100 * third.proprioception_BKA[0, :, 0], [16, 12], atol=1e-4)


def test_what_a_model_knows_to_be_true_is_kept() -> None:
    class Knows(Meter):
        def rollout(self, request: RolloutRequest) -> Rollout:
            made = super().rollout(request)
            made.cost |= {"success": float(len(self.requests) == 2), "success_s": 0.06}
            return made

    assert PolicyInModel(Knows()).run(Counting(8), start(20)).truth == {"success": True}, "success latches"
    assert PolicyInModel(Knows()).run(Counting(8), start(5)).truth == {"success": False}
    assert PolicyInModel(Meter()).run(Counting(8), start(20)).truth == {}


@pytest.mark.parametrize(("step", "told"), [(2, True), (4, True), (5, False), (8, False), (None, "unknown")])
def test_truth_is_that_of_the_video_which_is_judged(step: int | None, told: bool | str) -> None:
    """11 pictures: 5, 4, and of the last rollout of 8 steps 2 pictures, so that its last four steps are not shown."""

    class Late(Meter):
        def rollout(self, request: RolloutRequest) -> Rollout:
            made = super().rollout(request)
            made.cost["success"] = float(len(self.requests) == 3)
            if step is not None and made.cost["success"]:
                made.cost["success_s"] = step * DT
            return made

    made = PolicyInModel(Late()).run(Counting(8), start(18))
    shown = len(made.frames_THWC) - 9
    assert shown == 2, "pictures of the third rollout, two control steps each"
    assert made.truth == ({} if told == "unknown" else {"success": told})


def test_lengths() -> None:
    assert target_frames(143, 3 * DT, 1.2) == 58, "the example of WorldArena's page"
    assert target_frames(20, 2 * DT, 1.2) == 12 and target_frames(1, 2 * DT, 1.0) == 2
    for steps in range(1, 300):
        assert target_frames(steps, DT, 1.2) == max(2, math.ceil(round(1.2 * steps, 9)))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"conditioning": "action"}, "did you mean 'actions'"),
        ({"remainder": "hold"}, "remainder"),
        ({"length_scale": 0.0}, "length_scale"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        PolicyInModel(Meter(), PolicyInModelConfig(**changes))


def test_models_and_policies_that_do_not_fit() -> None:
    slow = Meter()
    slow.spec.frame_dt = 0.1
    with pytest.raises(MissingCapabilityError, match="frame_dt"):
        PolicyInModel(slow)
    with pytest.raises(MissingCapabilityError, match="dt"):
        PolicyInModel(Meter(stride=3))
    two = Meter()
    two.spec.views = ViewLayout(names=("head", "wrist"), height=12, width=16)
    with pytest.raises(MissingCapabilityError, match="one view"):
        PolicyInModel(two).run(NoOp(), start())

    class Wrong(NoOp):
        def act(self, observation: Observation) -> np.ndarray:
            return np.zeros((2, 7), np.float32)

    with pytest.raises(UserError, match=r"policy\.act"):
        PolicyInModel(Meter()).run(Wrong(), start())
