"""Policies that a planner has to beat: they know nothing, or they remember."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError
from physisforcing.core.lerobot import HEAD, LeRobotDataset
from physisforcing.core.paths import cache_home
from physisforcing.core.types import ActionSpec, Observation

#: Control steps between two targets of the random policy, and rows of a held chunk.
CHUNK = 16


class NoOp:
    """Hold the first targets."""

    fingerprint = "noop"

    def reset(self, *, task: str, seed: int, instruction: str) -> None:
        self._first: NDArray[np.float32] | None = None

    def act(self, observation: Observation) -> NDArray[np.float32]:
        if self._first is None:
            self._first = observation.state_A.copy()
        return np.repeat(self._first[None], CHUNK, axis=0)

    def telemetry(self) -> dict[str, float]:
        return {}


class Random:
    """Uniform in the limits, a new target every 16 control steps, approached in a straight line during these steps."""

    fingerprint = f"random-{CHUNK}"

    def __init__(self, spec: ActionSpec) -> None:
        self.low, self.high = np.array(spec.low), np.array(spec.high)
        # Joints that turn freely have huge limits; one turn covers every pose.
        self.low, self.high = np.maximum(self.low, -np.pi), np.minimum(self.high, np.pi)

    def reset(self, *, task: str, seed: int, instruction: str) -> None:
        name = int.from_bytes(hashlib.sha256(task.encode()).digest()[:4], "big")
        self._generator = np.random.default_rng([seed, name])

    def act(self, observation: Observation) -> NDArray[np.float32]:
        goal_A = self._generator.uniform(self.low, self.high)
        share_P1 = (np.arange(1, CHUNK + 1) / CHUNK)[:, None]
        return (observation.state_A + share_P1 * (goal_A - observation.state_A)).astype(np.float32)

    def telemetry(self) -> dict[str, float]:
        return {}


class Replay:
    """Recorded actions [T,14] in order, then the last one held."""

    def __init__(self, actions_TA: NDArray[np.float32]) -> None:
        self.actions_TA = np.asarray(actions_TA, dtype=np.float32)
        if self.actions_TA.ndim != 2 or len(self.actions_TA) == 0:
            shape = f"shape {list(self.actions_TA.shape)}"
            raise UserError("actions", got=shape, wanted="[T,14] with T >= 1", fix="pass columns(i)['action']")
        self.fingerprint = f"replay-{hashlib.sha256(self.actions_TA.tobytes()).hexdigest()[:12]}"

    def reset(self, *, task: str, seed: int, instruction: str) -> None:
        self._given = False

    def act(self, observation: Observation) -> NDArray[np.float32]:
        rows_PA = np.repeat(self.actions_TA[-1:], CHUNK, axis=0) if self._given else self.actions_TA
        self._given = True
        return rows_PA

    def telemetry(self) -> dict[str, float]:
        return {}


class Retrieval:
    """The training demonstration of the same task whose first frame and state are nearest; its recorded actions replayed.

    Distance: L2 of the first head picture as 30x40 grey cells in [0,1] plus L2 of the drive targets in radians. Only
    successful demonstrations are remembered. ``UserError`` when the dataset has none of the task.
    """

    def __init__(self, dataset: LeRobotDataset, *, cache_dir: Path | None = None) -> None:
        self.dataset = dataset
        digest = dataset.fingerprint()
        self.fingerprint = f"retrieval-{digest[:12]}"
        self._index = _load_index(dataset, (cache_dir or cache_home() / "retrieval") / f"{digest}.npz")

    def nearest(self, picture_HW3: NDArray[np.uint8], state_A: NDArray[np.float32], task: str) -> tuple[int, float]:
        """Episode number in the dataset, and its distance."""
        rows = np.flatnonzero(self._index["task"] == task)
        if len(rows) == 0:
            known = ", ".join(sorted(set(self._index["task"].tolist()))) or "nothing"
            raise UserError(
                "task",
                got=task,
                wanted=f"a task with successful demonstrations in {self.dataset.root} ({known})",
                fix="give a dataset that holds the task",
            )
        pixels = np.linalg.norm(self._index["grey"][rows] - grey_cells(picture_HW3).reshape(-1), axis=1)
        joints = np.linalg.norm(self._index["state"][rows] - state_A, axis=1)
        best = int(np.argmin(pixels + joints))
        return int(self._index["episode"][rows[best]]), float(pixels[best] + joints[best])

    def reset(self, *, task: str, seed: int, instruction: str) -> None:
        self._task = task
        self._replay: Replay | None = None
        self._found: dict[str, float] = {}

    def act(self, observation: Observation) -> NDArray[np.float32]:
        if self._replay is None:
            episode, distance = self.nearest(observation.images["head"], observation.state_A, self._task)
            self._found = {"retrieved_episode": float(episode), "retrieved_distance": distance}
            self._replay = Replay(self.dataset.columns(episode)["action"])
            self._replay.reset(task=self._task, seed=0, instruction=observation.instruction)
        return self._replay.act(observation)

    def telemetry(self) -> dict[str, float]:
        return dict(self._found)


def grey_cells(picture_HW3: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[30,40] in [0,1]: BT.601 luma averaged over cells of 8x8 pixels (of 4x4 for a 120x160 picture)."""
    height, width = picture_HW3.shape[:2]
    assert height % 30 == 0 and width % 40 == 0, f"{height}x{width} does not divide into 30x40 cells"
    luma = picture_HW3.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32) / 255
    return luma.reshape(30, height // 30, 40, width // 40).mean(axis=(1, 3))


def _load_index(dataset: LeRobotDataset, path: Path) -> dict[str, NDArray[Any]]:
    if path.is_file():
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    rows = [episode for episode in dataset.episodes if episode.success]
    index: dict[str, NDArray[Any]] = {
        "episode": np.array([episode.index for episode in rows], dtype=np.int64),
        "task": np.array([episode.task_name for episode in rows], dtype=str),
        "grey": np.zeros((len(rows), 1200), dtype=np.float32),
        "state": np.zeros((len(rows), 14), dtype=np.float32),
    }
    for row, episode in enumerate(rows):
        index["grey"][row] = grey_cells(dataset.frames(episode.index, [0], HEAD)[0]).reshape(-1)
        index["state"][row] = dataset.columns(episode.index)["observation.state"][0]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial.npz")
    np.savez(partial, **index)  # type: ignore[arg-type]  # numpy's stub takes any keyword for allow_pickle
    partial.replace(path)
    return index
