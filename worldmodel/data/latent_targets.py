"""Physics targets of the windows of a latent store: what they are made by, what the teachers look at, and what cannot be made."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from physisforcing.core.errors import UserError

from .latent_plan import Job, recorded_size, window_step
from .latent_settings import COMMAND, SettingNames, WindowSettings

if TYPE_CHECKING:
    from physisforcing.core.episodes import EpisodeSource

    from ..teachers.selection import TeachersConfig
    from .buckets import Bucket
    from .latent_maker import LatentMaker
    from .target_shards import TargetRecipe


def bucket_recipes(
    settings: WindowSettings,
    teachers: TeachersConfig,
    maker: LatentMaker,
    jobs: Sequence[Job],
    cache: Path | None,
    names: SettingNames = COMMAND,
) -> dict[Bucket, TargetRecipe]:
    """Bucket -> what its targets are made by. ``cache``: their folder; None is ``targets`` in each dataset.

    ``UserError`` and ``DatasetError`` where targets could not be made in the end: buckets that cut what the simulator's truth is about,
    episodes without that truth, windows that start where it has no depth.
    """
    from .target_shards import Geometry, cache_folder
    from .targets import resolve_recipe

    made, folders = {}, list(dict.fromkeys(cache_folder(job.source, cache) for job in jobs))
    stride, patch = maker.described.stride, maker.patch
    for bucket in sorted({job.bucket for job in jobs}):
        geometry = Geometry(
            frames=bucket.frames, stride=settings.stride, start_stride=window_step(settings, bucket),
            grid_rows=settings.grid_rows, grid_columns=settings.grid_columns,
            token_rows=bucket.rows // (stride[1] * patch[1]), token_columns=bucket.columns // (stride[2] * patch[2]),
        )  # fmt: skip
        made[bucket] = resolve_recipe(teachers, folders, geometry)
    for job in jobs:
        if made[job.bucket].needs_truth:
            _check_truth(job, made[job.bucket], cache, names)
    return made


def teachers_of(recipes: Mapping[Bucket, TargetRecipe]) -> dict[str, Any] | None:
    """Who makes the targets, by kind, which all recipes of one command share; None where there are none."""
    recipe = next(iter(recipes.values()), None)
    return None if recipe is None else {kind: asdict(info) for kind, info in recipe.teachers.items()}


def _check_truth(job: Job, recipe: TargetRecipe, cache: Path | None, names: SettingNames) -> None:
    """The simulator's truth is about recorded pictures, which may only be scaled, and has depth in some frames."""
    from physisforcing.core import ground_truth
    from physisforcing.core.lerobot_format import HEAD

    name = f"{job.source.root} episode {job.index}"
    height, width = recorded_size(job.source, job.index, job.camera)
    if job.camera != HEAD:
        fix = f"teacher=permissive, or {names.no_targets}"
        raise UserError("teacher", got=f"simulator truth of {job.camera}", wanted="the head camera's", fix=fix)
    if height * job.bucket.columns != width * job.bucket.rows:
        got = f"{job.bucket.name} of pictures of {height}x{width}"
        wanted = "buckets of the recorded shape: the simulator's points are not cut"
        raise UserError(f"{names.prefix}buckets", got=got, wanted=wanted, fix="teacher=permissive, or another bucket")
    if targets_of(job, recipe, cache).is_file():
        return
    path, length = job.source.ground_truth_path(job.index), job.source.episode(job.index).length
    assert path is not None, "targets_of has looked"
    truth = ground_truth.load(path, frames=length)
    if missing := [start for start in recipe.starts(length).tolist() if not truth.has_maps(start)]:
        some = ", ".join(map(str, truth.stored_frames_D[:4].tolist())) or "none"
        got, wanted = f"a window of {name} from frame {missing[0]} on", f"starts with stored depth ({some}, ...)"
        said = f"{names.prefix}start_stride"
        fix = f"{said}= a multiple of {ground_truth.STORED_STRIDE}, or data collected with ground_truth=full"
        raise UserError(said, got=got, wanted=wanted, fix=fix)


def seen_by(recipe: TargetRecipe, job: Job) -> EpisodeSource:
    """What the teachers look at: the recording, where they are the simulator's truth, else the pictures of the bucket."""
    from .latent_sources import SizedEpisodes

    return job.source if recipe.needs_truth else SizedEpisodes(job.source, job.bucket.size, job.camera)


def targets_of(job: Job, recipe: TargetRecipe, cache: Path | None) -> Path:
    """Where the targets of a job are, or will be. ``DatasetError`` where they need a ground truth that was not recorded."""
    from .target_shards import shard_path

    return shard_path(seen_by(recipe, job), job.index, recipe, cache)


def make_targets(
    jobs: Sequence[Job],
    recipes: Mapping[Bucket, TargetRecipe],
    teachers: TeachersConfig,
    cache: Path | None,
    *,
    device: str,
    workers: int,
    progress: bool,
) -> tuple[int, float]:
    """Compute what is missing; -> (windows that got targets now, seconds that it took)."""
    from .targets import build

    windows, begun = 0, time.perf_counter()
    for bucket, recipe in recipes.items():
        missing = [job for job in jobs if job.bucket == bucket and not targets_of(job, recipe, cache).is_file()]
        windows += sum(len(job.starts) for job in missing)
        for some in _by_source(missing):
            build(
                seen_by(recipe, some[0]), recipe, teachers=teachers, cache=cache,
                episodes=[job.index for job in some], device=device, workers=workers, progress=progress,
            )  # fmt: skip
    return windows, time.perf_counter() - begun


def _by_source(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    for key in dict.fromkeys((id(job.source), job.camera) for job in jobs):
        yield [job for job in jobs if (id(job.source), job.camera) == key]
