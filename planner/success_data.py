"""Videos with the moment of success: what the success classifier is trained and tested on."""

from __future__ import annotations

import hashlib
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

from .frame_store import FIRST_TEST_SEED, HEAD, resize_to

#: Parts of the episodes, by seed: two for temperature and test out of this many, the others train.
PARTS, TRAIN, CALIBRATION, TEST = 5, "train", "calibration", "test"


@dataclass(slots=True, kw_only=True)
class SuccessStore:
    """``frames_NHWC`` uint8 of all episodes one after the other, every ``stride``-th control step; episode e is the rows
    ``first_E[e] : first_E[e] + length_E[e]``. ``done_E``: its first row that shows success, -1 where none does."""

    frames_NHWC: Tensor
    first_E: NDArray[np.int64]
    length_E: NDArray[np.int64]
    done_E: NDArray[np.int64]
    seeds_E: NDArray[np.int64]
    task_E: NDArray[np.int64]
    tasks: tuple[str, ...]
    stride: int = 2

    def pictures(self, episode_B: NDArray[np.int64], start_B: NDArray[np.int64], end_B: NDArray[np.int64]) -> Tensor:
        """First, middle and last picture [B,3,H,W,3] of the windows from row ``start`` to row ``end`` of each episode."""
        rows_B3 = np.stack([start_B, (start_B + end_B + 1) // 2, end_B], axis=1) + self.first_E[episode_B][:, None]
        return self.frames_NHWC[torch.from_numpy(rows_B3)]

    def parts(self) -> dict[str, NDArray[np.int64]]:
        """Episodes for training, temperature and test, by a hash of their seed: a scene stands on one side only."""
        ordered = sorted({int(seed) for seed in self.seeds_E}, key=_place)
        each = max(1, round(len(ordered) / PARTS))
        side = dict.fromkeys(ordered[:each], CALIBRATION) | dict.fromkeys(ordered[each : 2 * each], TEST)
        names = np.array([side.get(int(seed), TRAIN) for seed in self.seeds_E])
        return {name: np.flatnonzero(names == name) for name in (TRAIN, CALIBRATION, TEST)}

    def ends(self, episode: int, positive: bool, span: int) -> NDArray[np.int64]:
        """Rows at which a window of at most ``span`` rows may end: while the success lasts that it shows coming, or before it."""
        length, done = int(self.length_E[episode]), int(self.done_E[episode])
        if positive:
            return np.arange(done, min(length, done + span)) if done >= 0 else np.arange(0)
        return np.arange(1, done if done >= 0 else length)


def _place(seed: int) -> bytes:
    return hashlib.sha256(f"success-{seed}".encode()).digest()


def draw(
    store: SuccessStore,
    episodes: NDArray[np.int64],
    count: int,
    *,
    spans: Sequence[int],
    generator: np.random.Generator,
) -> tuple[Tensor, NDArray[np.int64], NDArray[np.bool_]]:
    """``count`` random windows: (pictures [B,3,H,W,3], tasks [B], labels [B]), tasks and, where a task has both, labels in equal shares.

    A window has one of ``spans`` rows (fewer at an episode's start). Positive: it ends while a success lasts that it shows coming.
    Negative: it ends before the success, or anywhere in an episode without one.
    """
    pools: dict[tuple[int, bool], list[int]] = {}
    for episode in episodes:
        for positive in (True, False):
            if len(store.ends(episode, positive, min(spans))):
                pools.setdefault((int(store.task_E[episode]), positive), []).append(int(episode))
    tasks = sorted({task for task, _ in pools})
    chosen, starts, ends, labels = [], [], [], []
    for number in range(count):
        task = tasks[int(generator.integers(len(tasks)))]
        positive = bool(number % 2)
        positive = positive if (task, positive) in pools else not positive
        pool = pools[task, positive]
        episode, span = pool[int(generator.integers(len(pool)))], int(generator.choice(np.asarray(spans)))
        end = int(generator.choice(store.ends(episode, positive, span)))
        chosen.append(episode)
        starts.append(max(0, end - span))
        ends.append(end)
        labels.append(positive)
    episode_B = np.array(chosen, np.int64)
    pictures = store.pictures(episode_B, np.array(starts, np.int64), np.array(ends, np.int64))
    return pictures, store.task_E[episode_B], np.array(labels, bool)


def load_success_store(roots: Iterable[str | Path], *, height: int, width: int, stride: int = 2) -> SuccessStore:
    """Decode LeRobot datasets with ``next.success``.

    ``UserError`` for evaluation seeds and where nothing succeeds; ``DatasetError`` for empty ones, such without that column and such of another rate.
    """
    from physisforcing.core.lerobot import LeRobotDataset

    datasets = [LeRobotDataset(root) for root in roots]
    for dataset in datasets:
        check_rate(dataset)
    infos = [(dataset, episode) for dataset in datasets for episode in dataset.episodes]
    for dataset, episode in infos:
        if int(episode.seed) >= FIRST_TEST_SEED:
            got, wanted = f"seed {episode.seed} in {dataset.root}", f"seeds below {FIRST_TEST_SEED}"
            raise UserError("data", got=got, wanted=wanted, fix="train on a dataset collected with training seeds")
    if not infos:
        raise DatasetError("data", got="no episode", wanted="at least one", fix="physis data collect")
    lengths = np.array([-(-episode.length // stride) for _, episode in infos], np.int64)
    first = lengths.cumsum() - lengths
    frames = np.empty((int(lengths.sum()), height, width, 3), np.uint8)

    def read(number: int) -> int:
        dataset, episode = infos[number]
        rows = list(range(0, episode.length, stride))
        pictures = dataset.frames(episode.index, rows, key=HEAD)
        frames[first[number] : first[number] + len(rows)] = resize_to(pictures, height, width)
        success_T = dataset.columns(episode.index).get("next.success")
        if success_T is None:
            fix = "collect with physis data collect"
            raise DatasetError("data", got=f"{dataset.root} without next.success", wanted="recorded successes", fix=fix)
        return done_row(success_T, stride, len(rows))

    with ThreadPoolExecutor(max_workers=4) as pool:
        done = list(pool.map(read, range(len(infos))))
    tasks = tuple(sorted({episode.task_name for _, episode in infos}))
    store = SuccessStore(
        frames_NHWC=torch.from_numpy(frames),
        first_E=first,
        length_E=lengths,
        done_E=np.array(done, np.int64),
        seeds_E=np.array([int(episode.seed) for _, episode in infos], np.int64),
        task_E=np.array([tasks.index(episode.task_name) for _, episode in infos], np.int64),
        tasks=tasks,
        stride=stride,
    )
    if not (store.done_E >= 0).any():
        raise UserError("data", got="no success", wanted="some episodes that succeed", fix="collect with policy=expert")
    return store


def done_row(success_T: NDArray[np.bool_], stride: int, rows: int) -> int:
    """The first of every ``stride``-th picture that shows the success; ``success_T[t]``: it has come by the end of step t, which
    picture t + 1 shows. -1 for none, also where the success came after the last picture."""
    if not success_T.any():
        return -1
    row = -(-(int(success_T.argmax()) + 1) // stride)
    return row if row < rows else -1
