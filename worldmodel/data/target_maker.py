"""The targets of one episode: ``prepare`` reads and decodes (any thread), ``finish`` runs the networks (one thread a device)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from physisforcing.core import ground_truth
from physisforcing.core.episodes import EpisodeSource
from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.types import PointTracks

from ..physics.config import PhysicsConfig
from ..physics.regions import in_frame, normalise_points, point_scores, token_mask
from ..physics.relation import gather_tokens, relation_matrix, select_tokens, token_order
from ..physics.targets import point_targets
from ..teachers import ground_truth as exact
from ..teachers.degraded import degrade
from ..teachers.lookup import at_points
from ..teachers.selection import Teachers
from .target_shards import EpisodeTargets, TargetRecipe, content_digest, subpixels_of

#: Windows that go through a network at once.
WINDOWS = 8
#: Pictures that go through a network at once.
PICTURES = 64


@dataclass(slots=True, kw_only=True)
class Prepared:
    """What ``finish`` needs of an episode: exact tracks of its windows (or none) and the pictures at ``steps_M``."""

    index: int
    content: str
    length: int
    size: tuple[int, int]
    tracks: list[PointTracks]
    steps_M: NDArray[np.int64]
    frames_MHWC: NDArray[np.uint8]

    def frames(self, steps: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self.frames_MHWC[np.searchsorted(self.steps_M, steps)]


class TargetMaker:
    """Targets of the episodes of a dataset, by these teachers."""

    def __init__(self, recipe: TargetRecipe, teachers: Teachers) -> None:
        self.recipe, self.teachers = recipe, teachers

    def prepare(self, dataset: EpisodeSource, index: int) -> Prepared:
        recipe, length = self.recipe, dataset.episode(index).length
        content = content_digest(dataset, index, recipe.needs_truth)
        tracks: list[PointTracks] = []
        size = None
        if recipe.needs_truth:
            tracks = self._exact(dataset, index, content)
            size = tracks[0].size
        steps = self._needed(length)
        frames = dataset.frames(index, steps.tolist()) if len(steps) else np.zeros((0, *(size or (0, 0)), 3), np.uint8)
        if size is not None and len(steps) and frames.shape[1:3] != size:
            raise DatasetError(
                str(dataset.root),
                got=f"video {frames.shape[1:3]}",
                wanted=f"the size {size} of its depth",
                fix="collect it again",
            )
        size = size or (int(frames.shape[1]), int(frames.shape[2]))
        return Prepared(
            index=index, content=content, length=length, size=size, tracks=tracks, steps_M=steps, frames_MHWC=frames
        )

    def finish(self, episode: Prepared) -> EpisodeTargets:
        """Raises ``UserError`` for pictures that a teacher cannot take."""
        recipe, starts = self.recipe, self.recipe.starts(episode.length)
        points, visible = self._tracks(episode, starts)
        known = np.isfinite(points).all(-1)
        points, visible = np.where(known[..., None], points, 0), visible & known
        subpixels, limit = subpixels_of(episode.size), np.iinfo(np.int16).max
        depth, kind = self._depth(episode, starts)
        bodies = np.full((len(starts), recipe.points), -1, np.int32)
        if recipe.exact_points:
            bodies = np.stack([tracks.body_N for tracks in episode.tracks])
        targets = EpisodeTargets(
            starts_W=starts.astype(np.int32),
            points_WTN2=np.clip(np.rint(points.astype(np.float64) * subpixels), -limit, limit).astype(np.int16),
            visible_WTN=visible,
            depth_WN=depth,
            body_WN=bodies,
            rows_WF=np.zeros((len(starts), 0), np.int32),
            features_EhwC=np.zeros((0, 0, 0, 0), np.float16),
            token_WK=np.zeros((len(starts), 0), np.uint16),
            count_W=np.zeros(0, np.int32),
            relation_WR=np.zeros((len(starts), 0), np.int8),
            size=episode.size,
            subpixels=subpixels,
            depth_kind=kind,
        )
        self._features(episode, targets)
        return targets

    def _exact(self, dataset: EpisodeSource, index: int, content: str) -> list[PointTracks]:
        truth_path, length = dataset.ground_truth_path(index), dataset.episode(index).length
        assert truth_path is not None, "content_digest has checked it"
        truth, recipe = _truth(truth_path, length), self.recipe
        maps: exact.MapCache = {}
        grid = (recipe.grid_rows, recipe.grid_columns)
        tracks = []
        for start in recipe.starts(length):
            # where only the depth is wanted, one frame has it
            steps = recipe.steps(int(start), length) if recipe.exact_points else np.array([start])
            found = exact.point_tracks(truth, steps.tolist(), grid, maps=maps)
            if recipe.tracker.name == "degraded":
                # errors belong to an episode and window, wherever and in whatever order targets are made
                seed = np.random.SeedSequence([int(content[:16], 16), int(start) // recipe.start_stride])
                found = degrade(found, np.random.default_rng(seed), self.teachers.config.errors)
            tracks.append(found)
        return tracks

    def _needed(self, length: int) -> NDArray[np.int64]:
        """Control steps whose pictures some teacher looks at."""
        recipe, parts = self.recipe, [np.zeros(0, np.int64)]
        encoder = self.teachers.encoder
        for start in recipe.starts(length).tolist():
            if not recipe.exact_points or (encoder is not None and not encoder.per_frame):
                parts.append(recipe.steps(start, length))
            elif encoder is not None:
                parts.append(recipe.latent_steps(start, length))
            if self.teachers.depth is not None:
                parts.append(np.array([start]))
        return np.unique(np.concatenate(parts))

    def _tracks(self, episode: Prepared, starts: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """-> points [W,T,N,2] in pixels, visible [W,T,N]."""
        if self.recipe.exact_points:
            return (
                np.stack([tracks.points_TN2 for tracks in episode.tracks]),
                np.stack([tracks.visible_TN for tracks in episode.tracks]),
            )
        tracker = self.teachers.tracker
        assert tracker is not None
        points, visible = [], []
        for video in self._videos(episode, starts):
            found = tracker.track(video, self._queries(episode.size).expand(len(video), -1, -1))
            points.append(found.points_BTN2.cpu().numpy())
            visible.append(found.visible_BTN.cpu().numpy())
        return np.concatenate(points), np.concatenate(visible)

    def _queries(self, size: tuple[int, int]) -> Tensor:
        grid = exact.query_grid((self.recipe.grid_rows, self.recipe.grid_columns), size)
        return torch.from_numpy(grid.astype(np.float32))[None]

    def _videos(self, episode: Prepared, starts: NDArray[np.int64]) -> Iterator[Tensor]:
        """Pictures of windows, uint8 [<=WINDOWS,T,H,W,3], on the CPU: teachers take them to their device."""
        for first in range(0, len(starts), WINDOWS):
            steps = [self.recipe.steps(int(start), episode.length) for start in starts[first : first + WINDOWS]]
            yield torch.from_numpy(np.stack([episode.frames(one) for one in steps]))

    def _depth(self, episode: Prepared, starts: NDArray[np.int64]) -> tuple[NDArray[np.float32], str]:
        if self.recipe.depth.name == "ground_truth":
            return np.stack([tracks.depth_N for tracks in episode.tracks]), "metric"
        estimator = self.teachers.depth
        if estimator is None:
            return np.zeros((len(starts), self.recipe.points), np.float32), "off"
        found = []
        for first in range(0, len(starts), WINDOWS):
            maps = estimator.depth(torch.from_numpy(episode.frames(starts[first : first + WINDOWS])))
            queries = self._queries(episode.size).to(maps.device).expand(len(maps), -1, -1)
            found.append(at_points(maps, queries, episode.size).cpu().numpy())
        return np.concatenate(found), estimator.kind

    def _features(self, episode: Prepared, targets: EpisodeTargets) -> None:
        """Sets features or compact relations."""
        encoder, recipe = self.teachers.encoder, self.recipe
        if encoder is None:
            return
        targets.channels, starts = encoder.channels, targets.starts_W.astype(np.int64)
        shared = None
        if encoder.per_frame:
            needed = np.stack([recipe.latent_steps(int(start), episode.length) for start in starts])
            steps, rows = np.unique(needed, return_inverse=True)
            pictures = torch.from_numpy(episode.frames(steps))[:, None]
            one = (1, *recipe.tokens[1:])
            shared = torch.cat([encoder.encode(part, one)[:, 0] for part in pictures.split(PICTURES)])
            rows = rows.reshape(needed.shape)
        if not recipe.relations:
            if shared is None:
                shared = torch.cat([encoder.encode(part, recipe.tokens) for part in self._videos(episode, starts)])
                shared, rows = shared.flatten(0, 1), np.arange(len(starts) * recipe.tokens[0]).reshape(len(starts), -1)
            targets.features_EhwC, targets.rows_WF = shared.half().cpu().numpy(), rows.astype(np.int32)
            return
        found = []
        for place, video in enumerate(self._videos(episode, starts)):
            some = slice(place * WINDOWS, place * WINDOWS + len(video))
            if shared is None:
                features = encoder.encode(video, recipe.tokens)
            else:
                features = shared[torch.from_numpy(rows[some]).to(shared.device)]
            found.append(compact_relations(features.flatten(1, 3), targets, some, recipe, episode.content))
        for name, parts in zip(("token_WK", "count_W", "relation_WR"), zip(*found, strict=True), strict=True):
            setattr(targets, name, np.concatenate(parts))


def _truth(path: Path, frames: int) -> ground_truth.GroundTruth:
    state = path.stat()
    return _loaded(path, state.st_mtime_ns, state.st_size, frames)


@functools.lru_cache(maxsize=8)
def _loaded(path: Path, _modified: int, _size: int, frames: int) -> ground_truth.GroundTruth:
    """The truth of the last few episodes stays in memory, read-only: windows of one episode may be asked for one by one."""
    return ground_truth.load(path, frames=frames)


def compact_relations(
    features_BLC: Tensor, targets: EpisodeTargets, windows: slice, recipe: TargetRecipe, content: str
) -> tuple[NDArray, NDArray, NDArray]:
    """Tokens [B,K], their number [B] and the cosines of all pairs [B,R] of some windows, K = ``recipe.relations``."""
    count, most = recipe.relations, min(features_BLC.shape[1], np.iinfo(np.uint16).max)
    if count > most or features_BLC.shape[1] > np.iinfo(np.uint16).max:
        raise UserError("teacher.relations", got=count, wanted=f"at most {most} tokens", fix="use 512, or 0")
    generator = torch.Generator().manual_seed(int(content[:15], 16) + windows.start)
    index, valid = stored_tokens(targets, windows, recipe, generator)
    chosen = gather_tokens(features_BLC, index.to(features_BLC.device)).float()
    common = valid.to(chosen.device) if recipe.common == "remove" else None
    matrix = relation_matrix(chosen, common)
    row, column = torch.triu_indices(count, count, 1, device=matrix.device)
    pairs = (matrix[:, row, column] * 127).round().to(torch.int8).cpu()
    return index.numpy().astype(np.uint16), valid.sum(1).numpy().astype(np.int32), pairs.numpy()


def stored_tokens(
    targets: EpisodeTargets, windows: slice, recipe: TargetRecipe, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The tokens whose relations are kept: index [B,K], valid [B,K], valid ones first.

    Tokens that the default choices of eq. (1)-(4) select come first, then those that a point passes which moves by as much as the
    default ``min_motion`` asks for, whatever its score. Of more than K, a choice that depends on the generator alone.
    """
    size, grid, physics = targets.size, recipe.tokens[1:], PhysicsConfig()
    points = normalise_points(
        torch.from_numpy(targets.points_WTN2[windows].astype(np.float32) / targets.subpixels), size
    )
    visible = torch.from_numpy(targets.visible_WTN[windows]) & in_frame(points)
    depth = torch.from_numpy(targets.depth_WN[windows])
    made = point_targets(points, visible, depth, size, grid, physics, depth_kind=targets.depth_kind)
    by_default = made["token_mask_BFhw"]
    motion, _ = point_scores(points, visible, depth, size, physics)
    moves = visible[:, 0] & (motion >= physics.min_motion * float(np.hypot(*size)))
    # With the mean taken out, the set that it is the mean of must be the loss's own.
    others = token_mask(points, visible, moves, grid) & ~by_default & (recipe.common == "keep")
    order = token_order(len(points), by_default[0].numel(), generator)
    parts = [select_tokens(mask, order, recipe.relations) for mask in (by_default, others)]
    index, valid = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    place = (~valid).int().argsort(dim=1, stable=True)[:, : recipe.relations]
    return index.gather(1, place), valid.gather(1, place)
