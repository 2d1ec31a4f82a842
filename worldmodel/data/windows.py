"""Windows of demonstrations: 17 pictures at stride 2 (33 control steps), 120x160, held in memory.

Control step t is a row of the dataset (``core.types.DT`` seconds apart). A window that starts at step s shows the steps ``s, s+2,
.., s+32``; past the end of an episode its last step repeats. Starts are even, so only every second picture is kept, and the last.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.types import FPS, RATE_TOLERANCE

if TYPE_CHECKING:
    from physisforcing.core.lerobot import LeRobotDataset

#: Pictures a window, control steps between two of them, control steps covered.
WINDOW_FRAMES = 17
FRAME_STRIDE = 2
WINDOW_STEPS = (WINDOW_FRAMES - 1) * FRAME_STRIDE


def resize_area(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Halve pictures [...,H,W,3] by the mean of 2x2 blocks, rounded half up: [...,H/2,W/2,3]."""
    height, width = frames.shape[-3] // 2, frames.shape[-2] // 2
    assert frames.dtype == np.uint8 and frames.shape[-3:-1] == (2 * height, 2 * width)
    blocks = frames.reshape(*frames.shape[:-3], height, 2, width, 2, frames.shape[-1])
    total = blocks[..., 0, :, 0, :].astype(np.uint16) + blocks[..., 0, :, 1, :]
    total += blocks[..., 1, :, 0, :]
    total += blocks[..., 1, :, 1, :]
    return ((total + 2) >> 2).astype(np.uint8)


def window_steps(start: int, length: int) -> NDArray[np.int64]:
    """The control steps of a window's pictures, clamped to the episode: int64 [17]."""
    return np.minimum(start + FRAME_STRIDE * np.arange(WINDOW_FRAMES), length - 1)


def kept_steps(length: int) -> NDArray[np.int64]:
    """The control steps whose pictures are kept: 0, 2, .. and the last one."""
    return np.minimum(FRAME_STRIDE * np.arange(length // FRAME_STRIDE + 1), length - 1)


def kept_rows(start: int, length: int) -> NDArray[np.int64]:
    """Which of an episode's kept pictures (``kept_steps``) a window shows: int64 [17]. ``start`` must be even."""
    assert start % FRAME_STRIDE == 0, start
    return np.minimum(start // FRAME_STRIDE + np.arange(WINDOW_FRAMES), length // FRAME_STRIDE)


def lagged_states(states_TA: NDArray[np.float32], step: int, lags: Sequence[int]) -> NDArray[np.float32]:
    """Drive targets at ``step - lag``, clamped to the episode's start: [K,A]."""
    return states_TA[np.maximum(step - np.asarray(lags), 0)]


def window_actions(states_TA: NDArray[np.float32], start: int) -> NDArray[np.float32]:
    """The actions of a window: drive targets of the control steps ``start + 1 .. start + 32``; past the end the last repeat. [32,A]."""
    return states_TA[np.minimum(start + 1 + np.arange(WINDOW_STEPS), len(states_TA) - 1)]


@dataclass(slots=True, kw_only=True)
class Episode:
    """A demonstration as the stores keep it. ``frames``: kept pictures uint8 [kept,120,160,3]; ``states_TA``: drive targets;
    ``actions_TA``: the dataset's column ``action``, None where only states are known."""

    frames: NDArray[np.uint8]
    states_TA: NDArray[np.float32]
    instruction: str
    task: str
    index: int
    seed: int
    success: bool
    root: str = ""
    actions_TA: NDArray[np.float32] | None = None

    @property
    def length(self) -> int:
        return len(self.states_TA)

    def window(self, start: int) -> NDArray[np.uint8]:
        """Pictures of the window from an even step: uint8 [17,120,160,3]."""
        return self.frames[kept_rows(start, self.length)]


@dataclass(slots=True, kw_only=True)
class FrameStore:
    """All pictures of a set of episodes in one tensor, and where each episode's begin.

    ``frames_MHWC`` uint8 on the training device; ``offset_E``, ``last_E``: first picture and number of the last, int64.
    """

    episodes: list[Episode]
    frames_MHWC: Tensor
    offset_E: Tensor
    last_E: Tensor

    @classmethod
    def build(cls, episodes: list[Episode], device: str | torch.device) -> FrameStore:
        if not episodes:
            raise UserError(
                "data",
                got="no episodes",
                wanted="at least one episode",
                fix="physis data collect, or data.success_only=false",
            )
        counts = np.array([len(episode.frames) for episode in episodes])
        offset = np.concatenate([[0], np.cumsum(counts)[:-1]])
        frames = torch.empty(int(counts.sum()), *episodes[0].frames.shape[1:], dtype=torch.uint8, device=device)
        for episode, first in zip(episodes, offset, strict=True):
            frames[first : first + len(episode.frames)] = torch.from_numpy(episode.frames).to(device)
        place = torch.from_numpy(offset).to(device), torch.from_numpy(counts - 1).to(device)
        return cls(episodes=episodes, frames_MHWC=frames, offset_E=place[0], last_E=place[1])

    def rows(self, episode_B: Tensor, start_B: Tensor) -> Tensor:
        """Rows of ``frames_MHWC`` of windows, int64 [B,17]. ``start_B`` must be even."""
        step = torch.arange(WINDOW_FRAMES, device=start_B.device)
        picture = start_B[:, None] // FRAME_STRIDE + step
        return self.offset_E[episode_B, None] + torch.minimum(picture, self.last_E[episode_B, None])

    def windows(self, episode_B: Tensor, start_B: Tensor) -> Tensor:
        """Pictures of windows, uint8 [B,17,H,W,3]."""
        return self.frames_MHWC[self.rows(episode_B, start_B)]


@dataclass(slots=True, kw_only=True)
class WindowTable:
    """Every window that may be drawn: ``episode_W`` (place in the store), ``start_W`` (control step), int64, CPU."""

    episode_W: Tensor
    start_W: Tensor

    @classmethod
    def build(cls, lengths: Sequence[int], stride: int, tail: int = 8) -> WindowTable:
        """Starts at multiples of ``stride`` that leave at least ``tail`` steps (start 0 is always in)."""
        if stride % FRAME_STRIDE or stride < FRAME_STRIDE:
            raise UserError("data.start_stride", got=stride, wanted="an even number of control steps", fix="use 4 or 8")
        episode, start = [], []
        for place, length in enumerate(lengths):
            starts = np.arange(0, max(1, length - tail), stride)
            episode.append(np.full(len(starts), place))
            start.append(starts)
        return cls(episode_W=torch.from_numpy(np.concatenate(episode)), start_W=torch.from_numpy(np.concatenate(start)))

    def __len__(self) -> int:
        return len(self.start_W)


def read_episodes(
    roots: Sequence[str | Path],
    *,
    success_only: bool,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    workers: int = 4,
    progress: Callable[[int, int], None] | None = None,
    quiet: bool = False,
) -> list[Episode]:
    """Episodes of LeRobot datasets (head camera 240x320, halved), in the order of ``roots`` and episode index.

    ``tasks``: keep these task names only (all if empty); how many episodes of others are left out is said unless ``quiet``. ``limit``:
    at most so many episodes a task. Raises ``DatasetError`` for damaged data and data of another rate, and ``UserError`` when nothing is left.
    """
    from physisforcing.core.lerobot import LeRobotDataset

    jobs: list[tuple] = []
    seen: dict[str, int] = {}
    others: list[str] = []
    for root in roots:
        dataset = LeRobotDataset(root)
        check_rate(dataset)
        for info in dataset.episodes:
            if tasks and info.task_name not in tasks:
                others.append(info.task_name)
                continue
            if success_only and info.success is False:
                continue
            seen[info.task_name] = seen.get(info.task_name, 0) + 1
            if limit is None or seen[info.task_name] <= limit:
                jobs.append((dataset, info, str(root)))
    if not jobs:
        raise UserError(
            "data.roots",
            got=[str(root) for root in roots],
            wanted=f"episodes{' that succeed' if success_only else ''} of {list(tasks) or 'any task'}",
            fix="collect some with physis data collect, or change data.tasks",
        )
    if others and not quiet:
        print(f"data.roots: left out, {tasks_left_out(others)}", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(max_workers=workers) as pool:
        episodes = []
        for done, episode in enumerate(pool.map(_read_episode, jobs), start=1):
            episodes.append(episode)
            if progress is not None:
                progress(done, len(jobs))
    return episodes


def tasks_left_out(tasks: Sequence[str]) -> str:
    """What ``data.tasks`` leaves out, for a reader: episodes of these ``tasks``, one entry an episode."""
    names = sorted(set(tasks))
    some = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    return f"{len(tasks)} episodes of {len(names)} other tasks ({some}); data.tasks=[] takes all"


def check_rate(dataset: LeRobotDataset) -> None:
    """``DatasetError`` unless its rows are ``DT`` apart: the small models have that one rate, in which steps, windows and chunks are counted."""
    if abs(dataset.fps - FPS) > RATE_TOLERANCE * FPS:
        fix = "leave that dataset out: large backbones alone (model=) take the rate of their datasets"
        wanted = f"{FPS:.4g}, the one rate of the small models"
        raise DatasetError(f"rate of {dataset.root}", got=f"{dataset.fps:.4g} rows a second", wanted=wanted, fix=fix)


def _read_episode(job: tuple) -> Episode:
    dataset, info, root = job
    frames = dataset.frames(info.index, kept_steps(info.length))
    if frames.shape[1:3] == (240, 320):
        frames = resize_area(frames)
    if frames.shape[1:] != (120, 160, 3):
        raise UserError(
            "observation.images.head",
            got=frames.shape[1:],
            wanted="240x320 or 120x160",
            fix="record the head camera at 240x320",
        )
    columns = dataset.columns(info.index)
    return Episode(
        frames=frames,
        states_TA=np.asarray(columns["observation.state"], dtype=np.float32),
        actions_TA=np.asarray(columns["action"], dtype=np.float32) if "action" in columns else None,
        instruction=info.instruction,
        task=info.task_name,
        index=info.index,
        seed=info.seed,
        success=info.success is not False,
        root=root,
    )
