"""Teacher targets of every window of a dataset, computed once and cached on disk: ``physis data targets``.

One safetensors shard an episode, ``<cache>/<recipe>/<content>.safetensors``; the cache is the dataset's own folder
``targets`` unless another is named. The folder's name is a digest of the recipe (window geometry, query grid,
teachers with
their versions), the file's a digest of the episode's own content, so a shard is found by what it was computed from:
renumbered or merged datasets keep theirs, changed ones do not find a stale one. Shards are written aside and renamed; a
killed run continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core import ground_truth
from physisforcing.core.errors import DatasetError

from ..teachers import ground_truth as tracker
from .target_shards import (
    MAX_SIDE,
    SUBPIXELS,
    EpisodeTargets,
    TargetRecipe,
    content_digest,
    shard_path,
    write_shard,
)

if TYPE_CHECKING:
    from physisforcing.core.lerobot import LeRobotDataset

    from ..teachers.frame_encoder import FrameEncoder

USAGE = """usage: physis data targets data=[FOLDER,...] [field=value ...]

Computes point tracks (exact, from the simulator's ground truth) and encoder features of every training window, and
caches them in FOLDER/targets. What is there already is kept. Training does this by itself for what is missing.

examples:
  physis data targets data=[runs/bell]
  physis data targets data=[runs/bell,runs/blocks] device=cuda workers=8

fields: data, cache (folder instead of FOLDER/targets, for datasets that are read-only; training finds it with
data.targets_cache), device (auto, cpu, cuda), workers"""


@dataclass(slots=True, kw_only=True)
class TargetsCommand:
    """Settings of ``physis data targets``: the targets of training's windows (the default ``TargetRecipe``)."""

    data: list[str]
    cache: str | None = None
    device: str = "auto"
    workers: int = 2


@dataclass(slots=True, kw_only=True)
class Coverage:
    """What a run of ``build`` did."""

    computed: int = 0
    cached: int = 0
    windows: int = 0


def build(
    dataset: LeRobotDataset,
    recipe: TargetRecipe,
    *,
    cache: str | Path | None = None,
    episodes: Sequence[int] | None = None,
    device: str = "cpu",
    workers: int = 2,
    progress: bool = False,
) -> Coverage:
    """Compute the shards that are missing. Tracks are made in ``workers`` threads, features on ``device``."""
    from tqdm import tqdm

    from ..teachers.frame_encoder import FrameEncoder

    wanted = list(range(dataset.num_episodes)) if episodes is None else list(episodes)
    missing = [index for index in wanted if not shard_path(dataset, index, recipe, cache).is_file()]
    coverage = Coverage(computed=len(missing), cached=len(wanted) - len(missing))
    if missing:
        encoder = FrameEncoder().to(device)
        with ThreadPoolExecutor(max_workers=max(workers, 1)) as pool:
            made = _bounded_map(pool, lambda index: _tracks_and_frames(dataset, index, recipe), missing, workers + 2)
            label = f"targets {dataset.root.name}"
            for index, (targets, frames) in tqdm(made, total=len(missing), desc=label, disable=not progress):
                targets.teacher_EChw = _encode(encoder, frames)
                write_shard(shard_path(dataset, index, recipe, cache), targets, recipe, content_digest(dataset, index))
    coverage.windows = sum(len(recipe.starts(dataset.episode(index).length)) for index in wanted)
    return coverage


def _tracks_and_frames(dataset: LeRobotDataset, index: int, recipe: TargetRecipe) -> tuple[EpisodeTargets, NDArray]:
    truth_path = dataset.ground_truth_path(index)
    assert truth_path is not None, "shard_path has checked it"
    truth, length = ground_truth.load(truth_path), dataset.episode(index).length
    if truth.num_frames != length:
        raise DatasetError(
            str(truth_path),
            got=f"{truth.num_frames} frames",
            wanted=f"the {length} of its episode",
            fix="collect it again",
        )
    if max(truth.size) > MAX_SIDE:
        raise DatasetError(
            str(dataset.root),
            got=f"pictures of {truth.size[0]}x{truth.size[1]}",
            wanted=f"at most {MAX_SIDE} pixels a side (tracks are stored in 16 bits)",
            fix="record the head camera at 240x320",
        )
    starts = recipe.starts(length)
    grid = (recipe.grid_rows, recipe.grid_columns)
    maps: tracker.MapCache = {}
    tracks = [tracker.point_tracks(truth, recipe.steps(int(s), length).tolist(), grid, maps=maps) for s in starts]
    points = np.stack([t.points_TN2 for t in tracks])
    limit = np.iinfo(np.int16).max
    steps = np.unique(np.concatenate([recipe.latent_steps(int(start), length) for start in starts]))
    targets = EpisodeTargets(
        starts_W=starts.astype(np.int32),
        points_WTN2=np.clip(np.rint(points.astype(np.float64) * SUBPIXELS), -limit, limit).astype(np.int16),
        visible_WTN=np.stack([t.visible_TN for t in tracks]),
        depth_WN=np.rint(np.stack([t.depth_N for t in tracks]) / ground_truth.METRES_PER_COUNT).astype(np.uint16),
        body_WN=np.stack([t.body_N for t in tracks]),
        encoded_steps_E=steps.astype(np.int32),
        teacher_EChw=np.zeros(0, np.float16),
        size=truth.size,
    )
    frames = dataset.frames(index, steps.tolist())
    if frames.shape[1:3] != truth.size:
        raise DatasetError(
            str(dataset.root),
            got=f"video {frames.shape[1:3]}",
            wanted=f"the size {truth.size} of its depth",
            fix="collect it again",
        )
    return targets, frames


def _encode(encoder: FrameEncoder, frames_THWC: NDArray[np.uint8], batch: int = 64) -> NDArray[np.float16]:
    import torch

    device = next(encoder.parameters()).device
    parts = [torch.from_numpy(frames_THWC[i : i + batch]).to(device) for i in range(0, len(frames_THWC), batch)]
    return torch.cat([encoder(part).half().cpu() for part in parts]).numpy()


def _bounded_map(
    pool: ThreadPoolExecutor, work: Callable[[int], Any], items: Sequence[int], ahead: int
) -> Iterator[tuple[int, Any]]:
    """Like ``pool.map``, but at most ``ahead`` results wait in memory. Yields (item, result)."""
    waiting = [(item, pool.submit(work, item)) for item in items[:ahead]]
    for place in range(len(items)):
        item, future = waiting.pop(0)
        if place + ahead < len(items):
            waiting.append((items[place + ahead], pool.submit(work, items[place + ahead])))
        yield item, future.result()


def main(argv: Sequence[str]) -> int:
    """``physis data targets``; returns the exit code."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return 0
    import torch

    from physisforcing.core.config import compose
    from physisforcing.core.lerobot import LeRobotDataset

    command = compose("data_targets", list(argv), TargetsCommand)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if command.device == "auto" else command.device
    for root in command.data:
        done = build(
            LeRobotDataset(root),
            TargetRecipe(),
            cache=command.cache,
            device=device,
            workers=command.workers,
            progress=True,
        )
        print(f"{root}: {done.windows} windows, {done.computed} episodes computed, {done.cached} cached")
    return 0
