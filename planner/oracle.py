"""The oracle check: what if the imagination were perfect?

The decoder reads the video of a held-out demonstration instead of an imagined one. Beside it, the same decoder on black
pictures and on another episode's video (the robot must follow the other episode), the video after the codec's round trip, and
the recorded actions as the ceiling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.protocols import InverseDynamics

from .frame_store import HEAD, resize_to
from .inverse_dynamics import chunk_errors
from .tool import tool_points
from .video_decoding import decode_video

#: What is executed. ``oracle`` is the check itself.
ORACLE_POLICIES = ("oracle", "oracle_roundtrip", "black", "other", "recorded")


#: Where the seeds begin that nothing is trained on, and those of the test split (``envs.seeds.SPLITS``).
FIRST_HELD_OUT_SEED, FIRST_TEST_SEED = 50_000, 100_000


@dataclass(slots=True, kw_only=True)
class Demonstration:
    """A held-out demonstration. ``frames_THWC`` 120x160; ``actions_TA[t] = u[t+1]``, its last row repeats the state;
    ``tools_T23`` recorded tool centres in metres."""

    task: str
    seed: int
    instruction: str
    scene_hash: str
    frames_THWC: NDArray[np.uint8]
    states_TA: NDArray[np.float32]
    actions_TA: NDArray[np.float32]
    tools_T23: NDArray[np.float64]


class HeldOutDemonstrations:
    """Successful demonstrations with validation or test seeds, read from LeRobot datasets with ground truth when they are needed."""

    def __init__(self, root: str | Path, *, height: int = 120, width: int = 160) -> None:
        from physisforcing.core.lerobot import LeRobotDataset

        self.dataset, self.size = LeRobotDataset(root), (height, width)
        low = [e.seed for e in self.dataset.episodes if e.seed < FIRST_HELD_OUT_SEED]
        if low:
            raise UserError(
                "demos",
                got=f"seed {low[0]} in {root}",
                wanted=f"seeds from {FIRST_HELD_OUT_SEED} (validation) or {FIRST_TEST_SEED} (test) on, on which nothing is trained",
                fix=f"physis data collect start_seed={FIRST_TEST_SEED}",
            )
        self._places = {(e.task_name, e.seed): e.index for e in self.dataset.episodes if e.success is not False}

    def seeds(self, task: str, count: int | None = None) -> list[int]:
        """The first ``count`` seeds of ``task`` (default: all). ``DatasetError`` when there are fewer."""
        found = sorted(seed for name, seed in self._places if name == task)
        count = len(found) if count is None else count
        if len(found) < count or count < 2:
            raise DatasetError(
                "demos",
                got=f"{len(found)} successful demonstrations of {task}",
                wanted=f"{max(count, 2)} or more",
                fix=f"physis data collect tasks=[{task}] start_seed={FIRST_TEST_SEED}, or episodes={len(found)}",
            )
        return found[:count]

    def load(self, task: str, seed: int) -> Demonstration:
        from physisforcing.core.ground_truth import load

        if (task, seed) not in self._places:
            got, fix = (
                f"no successful demonstration of {task} {seed}",
                f"physis data collect tasks=[{task}] start_seed={seed}",
            )
            raise DatasetError("demos", got=got, wanted="every evaluated scene", fix=fix)
        index = self._places[task, seed]
        info, columns = self.dataset.episode(index), self.dataset.columns(index)
        path = self.dataset.ground_truth_path(index)
        if path is None or not Path(path).is_file():
            raise DatasetError(
                "demos",
                got=f"no ground truth for episode {index}",
                wanted="ground_truth/",
                fix="collect with ground truth",
            )
        truth = load(path)
        return Demonstration(
            task=task,
            seed=seed,
            instruction=info.instruction,
            scene_hash=info.scene_hash,
            frames_THWC=resize_to(self.dataset.frames(index, key=HEAD), *self.size),
            states_TA=np.asarray(columns["observation.state"], np.float32),
            actions_TA=np.asarray(columns["action"], np.float32),
            tools_T23=tool_points(truth.body_poses_TK7, truth.body_ids_K, truth.body_names),
        )


def oracle_targets(
    policy: str,
    demo: Demonstration,
    other: Demonstration,
    decoder: InverseDynamics,
    round_trip: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] | None = None,
) -> NDArray[np.float32]:
    """Joint targets [P,A] of one oracle policy. Everything but ``recorded`` sees pictures and the first frame's joints alone."""
    start = demo.states_TA[0]
    if policy == "recorded":
        return demo.actions_TA[:-1]
    if policy == "other":
        return decode_video(decoder, other.frames_THWC, start)
    if policy == "black":
        return decode_video(decoder, np.zeros_like(demo.frames_THWC), start)
    if policy == "oracle_roundtrip":
        assert round_trip is not None
        return decode_video(decoder, demo.frames_THWC, start, prepare=round_trip)
    assert policy == "oracle"
    return decode_video(decoder, demo.frames_THWC, start)


def target_errors(targets_PA: NDArray[np.float32], demo: Demonstration) -> dict[str, float]:
    """RMSE of predicted against recorded targets over their common steps: joints in degrees, grippers in percent."""
    count = min(len(targets_PA), len(demo.actions_TA))
    errors = chunk_errors(targets_PA[:count], demo.actions_TA[:count])
    return {name: errors[name] for name in ("joint_deg", "gripper_percent")}


def other_errors(targets_PA: NDArray[np.float32], demo: Demonstration, other: Demonstration) -> dict[str, Any]:
    """For ``other``: distance of the targets to the other episode (whose video was read), and between the two episodes."""
    return {
        "joint_deg_to_other": target_errors(targets_PA, other)["joint_deg"],
        "joint_deg_other_to_scene": target_errors(other.actions_TA, demo)["joint_deg"],
        "other_seed": other.seed,
    }
