"""One window as the physics losses see it, gathered from a dataset and its cached targets, in numpy."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from physisforcing.core import ground_truth
from physisforcing.core.episodes import EpisodeSource
from physisforcing.core.errors import UserError
from physisforcing.core.types import DT

from ..data.target_shards import EpisodeTargets, TargetRecipe, cache_folder, read_shard, shard_path
from ..data.targets import build, resolve_recipe
from ..data.window_targets import load_window_targets
from ..physics.config import PhysicsConfig
from ..physics.regions import in_frame, normalise_points, point_scores, token_bodies
from ..physics.relation import even_order, reference_relations, rigid_relation
from ..teachers.selection import TeachersConfig


@dataclass(slots=True, kw_only=True)
class Tracks:
    """N points over the T pictures of a window, and what they are selected by.

    ``frames_THWC``: uint8. ``points_TN2``: in [0,1] per axis. ``motion_N``: pixels of these frames, eq. (1); ``weight_N``: eq. (2).
    ``threshold``: the mean score, eq. (3), or None where ``select=topk`` uses none. ``min_motion``: pixels.
    """

    frames_THWC: NDArray[np.uint8]
    seconds_T: NDArray[np.float64]
    points_TN2: NDArray[np.float32]
    visible_TN: NDArray[np.bool_]
    select_N: NDArray[np.bool_]
    motion_N: NDArray[np.float32]
    weight_N: NDArray[np.float32]
    threshold: float | None
    min_motion: float

    @property
    def score_N(self) -> NDArray[np.float32]:
        """q = m r of eq. (3)."""
        return self.motion_N * self.weight_N


@dataclass(slots=True, kw_only=True)
class Relations:
    """Matrices over the same K tokens, sorted by rigid body (where none is known, by latent frame) and then by likeness.

    ``matrices``: title -> float32 [K,K], NaN where unknown; the first is what the loss compares with. ``token_K``: places in
    F*h*w. ``groups``: (name, first, last + 1) of tokens that belong together.
    """

    matrices: dict[str, NDArray[np.float32]]
    token_K: NDArray[np.int64]
    groups: list[tuple[str, int, int]]


@dataclass(slots=True, kw_only=True)
class Prediction:
    """Where a model finds the points in the latent frames 1.., and its loss terms.

    ``points_FN2``, ``target_FN2`` in [0,1], ``weight_FN``: prediction, target (on the hull of the cell centres) and weight in the
    loss. ``metrics``: those of ``physics.forcing``, and ``pix`` and ``sem``. ``student_KK``: cosines of psi(H) over
    ``Relations.token_K``.
    """

    model: str
    sigma: float
    points_FN2: NDArray[np.float32]
    target_FN2: NDArray[np.float32]
    weight_FN: NDArray[np.float32]
    student_KK: NDArray[np.float32]
    metrics: dict[str, float]


@dataclass(slots=True, kw_only=True)
class Window:
    """What is drawn of a window that starts at control step ``start``; ``name`` is that of its files.

    ``pictures_FHWC``: one picture a latent frame; ``mask_Fhw``: the token mask. ``tracks`` is None where only latents are kept,
    ``relations`` where there are none. ``notes``: lines under the title.
    """

    title: str
    name: str
    start: int
    pictures_FHWC: NDArray[np.uint8]
    mask_Fhw: NDArray[np.bool_]
    relations: Relations | None
    tracks: Tracks | None = None
    prediction: Prediction | None = None
    notes: list[str] = field(default_factory=list)


def load_window(
    dataset: EpisodeSource,
    episode: int,
    start: int | None,
    physics: PhysicsConfig,
    *,
    teachers: TeachersConfig | None = None,
    cache: str | Path | None = None,
) -> tuple[Window, dict[str, Tensor]]:
    """The window of an episode that starts at control step ``start`` (None: the one with the most selected points), and its row
    of targets for ``physics.forcing``, batch size 1.

    ``teachers``, ``cache``: as for training. What is not in the cache is computed for this episode and thrown away: nothing is written.
    Raises ``UserError`` for an episode or a start that is not there, and ``DatasetError`` for targets that cannot be had.
    """
    if not 0 <= episode < len(dataset):
        fix = f"choose one of 0 to {len(dataset) - 1}"
        raise UserError("--episode", got=episode, wanted=f"one of the {len(dataset)} episodes, counted from 0", fix=fix)
    teachers, info = teachers or TeachersConfig(), dataset.episode(episode)
    recipe = resolve_recipe(teachers, [cache_folder(dataset, cache)])
    starts = recipe.starts(info.length).tolist()
    if start is not None and start not in starts:
        near = min(starts, key=lambda other: abs(other - start))
        wanted = f"a multiple of {recipe.start_stride} below the episode's length {info.length}"
        raise UserError("--start", got=start, wanted=wanted, fix=f"use --start {near}, or leave it out")
    with tempfile.TemporaryDirectory(prefix="physis-targets-") as folder:
        if not shard_path(dataset, episode, recipe, cache).is_file():
            cache = folder
            build(dataset, recipe, teachers=teachers, cache=cache, episodes=[episode])
        shard = read_shard(dataset, episode, recipe, cache)
        wanted_starts = starts if start is None else [start]
        windows = [(str(dataset.root), episode, one) for one in wanted_starts]
        targets = load_window_targets(windows, physics, recipe=recipe, cache=cache, build_missing=False)
        row = int(targets.select_WN.sum(1).argmax())
        start = wanted_starts[row]
        batch = {name: value.cpu().clone() for name, value in targets.batch(torch.tensor([row])).items()}
        place = shard.starts_W.tolist().index(start)
        tracks, bodies = _tracks(dataset, episode, start, shard, place, batch, recipe, physics)
    names = _body_names(dataset, episode) if bodies is not None else {}
    found, notes = relations(batch, physics, recipe.encoder.name, bodies=bodies, names=names), _notes(recipe, physics)
    if found is None:
        notes.append("no relations: the mask has fewer than two tokens, or there is no encoder")
    steps = recipe.steps(start, info.length)
    title = f"{info.task_name or 'episode'}: {info.instruction}\nepisode {episode}"
    title += f", control steps {steps[0]} to {steps[-1]}, {steps[0] * DT:.2f} s to {steps[-1] * DT:.2f} s"
    return Window(
        title=title,
        name=f"episode_{episode:06d}_step_{start:04d}",
        start=start,
        pictures_FHWC=tracks.frames_THWC[shown_pictures(recipe.frames, physics)],
        mask_Fhw=batch["token_mask_BFhw"][0].numpy(),
        relations=found,
        tracks=tracks,
        notes=notes,
    ), batch


def _notes(recipe: TargetRecipe, physics: PhysicsConfig) -> list[str]:
    """Who made the targets, and the options of the losses that are not the defaults."""
    made = ", ".join(f"{what} {info.name}" for what, info in recipe.teachers.items())
    usual = PhysicsConfig()
    other = [
        f"{item.name}={getattr(physics, item.name)}"
        for item in fields(PhysicsConfig)
        if getattr(physics, item.name) != getattr(usual, item.name)
    ]
    return [f"teachers: {made}; physics: {', '.join(other) or 'defaults'}"]


def shown_pictures(frames: int, physics: PhysicsConfig) -> list[int]:
    """The picture that stands for each latent frame: one near the time at which its tracks are taken."""
    back = 0 if physics.time == "last" else 1
    return [0, *(last - back for last in range(4, frames, 4))]


def _tracks(
    dataset: EpisodeSource,
    episode: int,
    start: int,
    shard: EpisodeTargets,
    place: int,
    batch: Mapping[str, Tensor],
    recipe: TargetRecipe,
    physics: PhysicsConfig,
) -> tuple[Tracks, Tensor | None]:
    """-> (tracks of the window in this place of the shard, rigid body of each token [1,F,h,w] where the points' bodies are known)."""
    size, steps = shard.size, recipe.steps(start, dataset.episode(episode).length)
    pixels = torch.from_numpy(shard.points_WTN2[[place]].astype(np.float32) / shard.subpixels)
    points = normalise_points(pixels, size)
    visible = torch.from_numpy(np.asarray(shard.visible_WTN[[place]])) & in_frame(points)
    depth = torch.from_numpy(shard.depth_WN[[place]].astype(np.float32))
    motion, weight = point_scores(points, visible, depth, size, physics, depth_kind=shard.depth_kind)
    valid = visible[0, 0]
    mean = float((motion * weight)[0, valid].mean()) if valid.any() else 0.0
    body = torch.from_numpy(shard.body_WN[[place]].astype(np.int64))
    grid = (recipe.token_rows, recipe.token_columns)
    tracks = Tracks(
        frames_THWC=dataset.frames(episode, steps.tolist()),
        seconds_T=(steps - steps[0]) * DT,
        points_TN2=points[0].numpy(),
        visible_TN=visible[0].numpy(),
        select_N=batch["select_BN"][0].numpy(),
        motion_N=motion[0].numpy(),
        weight_N=weight[0].numpy(),
        threshold=mean if physics.select in ("mean", "both") else None,
        min_motion=physics.min_motion * float(np.hypot(*size)),
    )
    return tracks, token_bodies(points, visible, body, grid) if (body >= 0).any() else None


def relations(
    batch: Mapping[str, Tensor],
    physics: PhysicsConfig,
    teacher: str,
    *,
    bodies: Tensor | None = None,
    names: Mapping[int, str] | None = None,
) -> Relations | None:
    """The relation matrices of targets of batch size 1 over the tokens that the loss takes in evaluation; None where there are fewer
    than two tokens or no relations.

    ``bodies`` [1,F,h,w]: the rigid bodies of the tokens, -1 unknown; ``names`` by id.
    """
    batch = {name: value.cpu() for name, value in batch.items()}
    mask = batch["token_mask_BFhw"]
    bodies = batch["body_BFhw"].long() if "body_BFhw" in batch else bodies
    index, valid, reference = reference_relations(
        batch,
        even_order(1, mask[0].numel()),
        relations=physics.relations,
        max_tokens=physics.max_tokens,
        common=physics.common,
    )
    if valid.sum() < 2:
        return None
    matrices: dict[str, Tensor] = {}
    if "relation_BKK" in batch or batch.get("teacher_BFhwC", mask.new_zeros(0)).numel():
        matrices[f"teacher: {teacher}"] = reference[0]
    body_K = torch.full_like(index[0], -1) if bodies is None else bodies.flatten(1)[0, index[0]]
    if bodies is not None:
        same, known = rigid_relation(body_K[None])
        matrices["simulator: same rigid body"] = torch.where(known, same, torch.nan)[0]
    group_K = body_K if (body_K >= 0).any() else index[0] // mask[0, 0].numel()
    if not matrices:
        return None
    kept = _sorted(next(iter(matrices.values())), valid[0], group_K)
    labels = dict(names or {}) if group_K is body_K else {k: f"latent {k}" for k in range(mask.shape[1])}
    return Relations(
        matrices={name: matrix[kept][:, kept].numpy() for name, matrix in matrices.items()},
        token_K=index[0, kept].numpy(),
        groups=_groups(group_K[kept].tolist(), labels),
    )


def _sorted(matrix_KK: Tensor, valid_K: Tensor, group_K: Tensor) -> Tensor:
    """Places of the valid tokens: group by group, within a group along the direction in which its rows differ most."""
    order = []
    for group in group_K[valid_K].unique().tolist():
        places = torch.nonzero(valid_K & (group_K == group)).flatten()
        inside = matrix_KK[places][:, places].nan_to_num()
        direction = torch.linalg.eigh((inside - inside.mean(0)) @ (inside - inside.mean(0)).T)[1][:, -1]
        order.append(places[direction.argsort(stable=True)])
    return torch.cat(order)


def _groups(group_K: list[int], names: Mapping[int, str]) -> list[tuple[str, int, int]]:
    edges = [0, *(i for i in range(1, len(group_K)) if group_K[i] != group_K[i - 1]), len(group_K)]
    return [
        (names.get(group_K[first], f"body {group_K[first]}" if group_K[first] >= 0 else "unknown"), first, last)
        for first, last in zip(edges[:-1], edges[1:], strict=True)
    ]


def _body_names(dataset: EpisodeSource, episode: int) -> dict[int, str]:
    path = dataset.ground_truth_path(episode)
    return {} if path is None else dict(ground_truth.load(path).body_names)
