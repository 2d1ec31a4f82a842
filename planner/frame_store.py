"""Demonstrations held in memory on one device, and windows gathered from them there.

All episodes are decoded once to 120x160 uint8 (57.6 kB a frame: 900 episodes of 110 frames are 5.7 GB) and stay on the
training device, so that a batch is one gather and no data loader stands between the GPU and its work.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from physisforcing.core.errors import DatasetError, UserError
from physisforcing.worldmodel.data.windows import check_rate

from .inverse_dynamics import JOINTS

#: Seeds from here on are for evaluation: nothing is ever trained on them.
FIRST_TEST_SEED = 100_000
VALIDATION_SEEDS = range(50_000, 60_000)
HEAD = "observation.images.head"
MEASURED = "observation.state_measured"
#: Joints follow their drive targets within a few degrees, except where something blocks the arm: then they are tens of degrees behind.
UNREACHED_RAD = float(np.deg2rad(10.0))


@dataclass(slots=True, kw_only=True)
class FrameStore:
    """``frames_NHWC`` uint8 and ``states_NA`` float32 of all episodes one after the other; episode e is the rows
    ``first_E[e] : first_E[e] + length_E[e]``. ``states_NA[t]`` are the drive targets u[t], so that the target approached
    during step t is the next row. ``measured_NA``: the joints as measured, where every dataset has them; ``instructions_E``,
    ``tasks_E``: of each episode, empty for stores made without."""

    frames_NHWC: Tensor
    states_NA: Tensor
    first_E: Tensor
    length_E: Tensor
    seeds_E: NDArray[np.int64]
    measured_NA: Tensor | None = None
    instructions_E: tuple[str, ...] = ()
    tasks_E: tuple[str, ...] = ()

    @property
    def episodes(self) -> int:
        return len(self.length_E)

    def to(self, device: str | torch.device) -> FrameStore:
        return FrameStore(
            frames_NHWC=self.frames_NHWC.to(device),
            states_NA=self.states_NA.to(device),
            first_E=self.first_E.to(device),
            length_E=self.length_E.to(device),
            seeds_E=self.seeds_E,
            measured_NA=None if self.measured_NA is None else self.measured_NA.to(device),
            instructions_E=self.instructions_E,
            tasks_E=self.tasks_E,
        )

    def draw(
        self, count: int, *, allowed_E: Tensor, start_share: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Random (episode, start frame) pairs [count]: episodes by their length, a share ``start_share`` at frame 0."""
        weights = self.length_E[allowed_E].float()
        episode = allowed_E[torch.multinomial(weights, count, replacement=True, generator=generator)]
        uniform = torch.rand(2, count, generator=generator, device=generator.device).to(weights.device)
        start = (uniform[0] * self.length_E[episode]).long().clamp_max(self.length_E[episode] - 1)
        return episode, torch.where(uniform[1] < start_share, torch.zeros_like(start), start)

    def windows(self, episode_B: Tensor, start_B: Tensor, *, frames: int, stride: int) -> tuple[Tensor, Tensor, Tensor]:
        """(frames [B,T,H,W,3] uint8, drive targets now [B,A], targets [B,(T-1)*stride,A]); past the end the last row repeats."""
        last = self.length_E[episode_B] - 1
        device = last.device

        def rows(offsets: Tensor) -> Tensor:
            step = torch.minimum(start_B[:, None] + offsets, last[:, None])
            return self.first_E[episode_B][:, None] + step

        pictures = rows(torch.arange(frames, device=device) * stride)
        targets = rows(torch.arange(1, (frames - 1) * stride + 1, device=device))
        now = rows(torch.zeros(1, dtype=torch.long, device=device))[:, 0]
        return self.frames_NHWC[pictures], self.states_NA[now], self.states_NA[targets]

    def measured(self, episode_B: Tensor, start_B: Tensor, *, steps: int) -> Tensor | None:
        """Joints as measured [B,P,A] after each of the ``steps`` control steps from the start, at the times of the targets of ``windows``;
        None where they were not recorded."""
        if self.measured_NA is None:
            return None
        last = self.length_E[episode_B] - 1
        step = torch.minimum(start_B[:, None] + torch.arange(1, steps + 1, device=last.device), last[:, None])
        return self.measured_NA[self.first_E[episode_B][:, None] + step]


def unreached(store: FrameStore) -> NDArray[np.bool_]:
    """True for episodes [E] in which a joint is further than ``UNREACHED_RAD`` from its drive target at some frame: an arm that is blocked
    or cannot keep up, whose targets no picture shows. Grippers do not count (they close on objects). All False without measured joints."""
    if store.measured_NA is None:
        return np.zeros(store.episodes, dtype=bool)
    far_NA = (store.states_NA - store.measured_NA).abs() > UNREACHED_RAD
    far_N = far_NA[:, list(JOINTS)].any(1)
    return np.array([bool(part.any()) for part in far_N.split(store.length_E.tolist())])


def split_by_seed(seeds_E: Sequence[int] | NDArray[np.int64], *, share: float) -> NDArray[np.bool_]:
    """True for validation episodes: seeds of the validation range, and ``share`` of the other seeds (at least one, never all) in
    the order of a hash of the seed.

    By seed, so that episodes of one scene never stand on both sides.
    """

    def place(seed: int) -> bytes:
        return hashlib.sha256(f"idm-validation-{seed}".encode()).digest()

    seeds = [int(s) for s in seeds_E]
    others = sorted({s for s in seeds if s not in VALIDATION_SEEDS}, key=place)
    count = min(max(1, round(share * len(others))), len(others) - 1) if others else 0
    held_out = set(others[:count])
    return np.array([s in VALIDATION_SEEDS or s in held_out for s in seeds], dtype=bool)


def split_episodes(store: FrameStore, *, share: float) -> tuple[Tensor, Tensor]:
    """(training episodes, held-out episodes) as ``split_by_seed`` says, int64 on the store's device, both without those that are
    ``unreached``. ``UserError`` where one is empty."""
    held_out, usable = split_by_seed(store.seeds_E, share=share), ~unreached(store)
    train_E, validation_E = (
        torch.from_numpy(part & usable).nonzero()[:, 0].to(store.first_E.device) for part in (~held_out, held_out)
    )
    if not len(train_E) or not len(validation_E):
        raise UserError(
            "data",
            got=f"{len(train_E)} training and {len(validation_E)} validation episodes whose arms reach their targets",
            wanted="at least one of each",
            fix="collect more episodes, or raise validation_share",
        )
    return train_E, validation_E


def episode_counts(store: FrameStore, train_E: Tensor, validation_E: Tensor) -> dict[str, int]:
    """What ``metrics.json`` says about the demonstrations; ``left_out``: see ``unreached``."""
    used = {"train": len(train_E), "validation": len(validation_E)}
    return used | {"left_out": store.episodes - sum(used.values())}


def load_frame_store(roots: Iterable[str | Path], *, height: int, width: int) -> FrameStore:
    """Decode LeRobot datasets into one store on the CPU.

    Raises ``UserError`` for datasets that hold evaluation seeds and ``DatasetError`` for empty ones and such of another rate.
    """
    from physisforcing.core.lerobot import LeRobotDataset

    roots = [Path(r) for r in roots]
    datasets = [LeRobotDataset(root) for root in roots]
    for dataset in datasets:
        check_rate(dataset)
    infos = [(d, e) for d in datasets for e in d.episodes]
    for dataset, episode in infos:
        if int(episode.seed) >= FIRST_TEST_SEED:
            raise UserError(
                "data",
                got=f"seed {episode.seed} in {dataset.root}",
                wanted=f"seeds below {FIRST_TEST_SEED} (the rest is kept for evaluation)",
                fix="train on a dataset collected with training seeds",
            )
    if not infos:
        raise DatasetError(
            "data", got=[str(r) for r in roots], wanted="at least one episode", fix="physis data collect"
        )
    lengths = np.array([e.length for _, e in infos], np.int64)
    ends = lengths.cumsum()
    frames = np.empty((int(ends[-1]), height, width, 3), np.uint8)

    def read(number: int) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        dataset, episode = infos[number]
        pictures = resize_to(dataset.frames(episode.index, key=HEAD), height, width)
        frames[ends[number] - episode.length : ends[number]] = pictures
        columns = dataset.columns(episode.index)
        measured = columns.get(MEASURED)
        return np.asarray(columns["observation.state"], np.float32), None if measured is None else np.asarray(measured)

    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        columns = list(pool.map(read, range(len(infos))))
    states, measured = zip(*columns, strict=True)
    return make_store(
        frames,
        np.concatenate(states),
        lengths.tolist(),
        [int(e.seed) for _, e in infos],
        measured_NA=None if any(m is None for m in measured) else np.concatenate(measured),
        instructions_E=[e.instruction for _, e in infos],
        tasks_E=[e.task_name for _, e in infos],
    )


def make_store(
    frames_NHWC: NDArray[np.uint8],
    states_NA: NDArray[np.float32],
    lengths_E: Sequence[int],
    seeds_E: Sequence[int],
    *,
    measured_NA: NDArray[np.float32] | None = None,
    instructions_E: Sequence[str] = (),
    tasks_E: Sequence[str] = (),
) -> FrameStore:
    """A store from plain arrays (frames already at the decoder's size)."""
    lengths = torch.as_tensor(np.asarray(lengths_E, np.int64))
    assert int(lengths.sum()) == len(frames_NHWC) == len(states_NA) and len(seeds_E) == len(lengths)
    return FrameStore(
        frames_NHWC=torch.from_numpy(frames_NHWC),
        states_NA=torch.from_numpy(np.ascontiguousarray(states_NA, np.float32)),
        first_E=lengths.cumsum(0) - lengths,
        length_E=lengths,
        seeds_E=np.asarray(seeds_E, np.int64),
        measured_NA=None if measured_NA is None else torch.from_numpy(np.ascontiguousarray(measured_NA, np.float32)),
        instructions_E=tuple(instructions_E),
        tasks_E=tuple(tasks_E),
    )


def resize_to(frames_THWC: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Area-resize to the world model's picture; pictures that already have the size pass unchanged."""
    if frames_THWC.shape[1:3] == (height, width):
        return frames_THWC
    if frames_THWC.shape[1:3] != (2 * height, 2 * width):
        raise UserError(
            "frames",
            got=frames_THWC.shape[1:3],
            wanted=f"{2 * height} x {2 * width} (halved by area) or {height} x {width}",
            fix="record the head camera at 240 x 320",
        )
    from physisforcing.worldmodel.data.windows import resize_area

    return resize_area(frames_THWC)
