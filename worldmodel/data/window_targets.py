"""Physics targets of training windows, in memory on the training device: what ``PhysisForcing`` reads, one row a
window.

Tracks are reduced to latent times and masks once, when they are loaded; batches are then mere gathers. The options of
eq. (1)-(8) in ``PhysicsConfig`` may change without any target being computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from physisforcing.core.episodes import EpisodeSource
from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.readers import open_dataset

from ..physics.config import PhysicsConfig
from ..physics.regions import in_frame, normalise_points, token_bodies
from ..physics.targets import point_targets
from ..teachers.selection import TeachersConfig, check_served
from .augmentation import Crop
from .target_shards import EpisodeTargets, TargetRecipe, read_shard
from .targets import build, resolve_recipe

#: Rows of a window's own; the rest is shared by windows.
_PER_WINDOW = (
    "points_WFN2",
    "visible_WFN",
    "select_WN",
    "mask_WFhw",
    "body_WFhw",
    "teacher_WF",
    "token_WK",
    "relation_WR",
)


@dataclass(slots=True, kw_only=True)
class WindowTargets:
    """Targets of W windows.

    ``points_WFN2`` float32 in [0,1], ``visible_WFN`` bool or a weight, ``select_WN``, ``mask_WFhw`` bool, ``teacher_WF`` int64
    rows of ``teacher_EhwC`` float16: windows that overlap share encoded frames. ``body_WFhw`` int32: the rigid body in each
    token, where relations are made from bodies ([W,0,h,w] otherwise). ``token_WK`` int32 (-1: no token) and ``relation_WR`` int8:
    compact relations (``target_shards``), where a recipe has them. ``channels``: width of the encoder's features.
    """

    points_WFN2: Tensor
    visible_WFN: Tensor
    select_WN: Tensor
    mask_WFhw: Tensor
    body_WFhw: Tensor
    teacher_WF: Tensor
    token_WK: Tensor
    relation_WR: Tensor
    teacher_EhwC: Tensor
    channels: int

    def __len__(self) -> int:
        return len(self.select_WN)

    @property
    def grid(self) -> tuple[int, int, int]:
        """(F, h, w): the token grid that features must have."""
        _, frames, height, width = self.mask_WFhw.shape
        return frames, height, width

    @property
    def teacher_dim(self) -> int:
        return self.channels

    def to(self, device: str | torch.device) -> WindowTargets:
        moved = {item.name: getattr(self, item.name) for item in fields(self)}
        return WindowTargets(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in moved.items()})

    def batch(self, rows_B: Tensor) -> dict[str, Tensor]:
        """The ``targets`` dictionary of ``physics.forcing`` for these rows."""
        targets = {
            "points_BFN2": self.points_WFN2[rows_B],
            "visible_BFN": self.visible_WFN[rows_B],
            "select_BN": self.select_WN[rows_B],
            "token_mask_BFhw": self.mask_WFhw[rows_B],
        }
        if self.body_WFhw.shape[1]:
            return targets | {"body_BFhw": self.body_WFhw[rows_B]}
        if self.token_WK.shape[1]:
            token = self.token_WK[rows_B].long()
            index = token.clamp(min=0)
            selected = targets["token_mask_BFhw"].flatten(1).gather(1, index)
            return targets | {
                "relation_BKK": whole_relations(self.relation_WR[rows_B], token.shape[1]),
                "relation_index_BK": index,
                "relation_valid_BK": selected & (token >= 0),
            }
        return targets | {"teacher_BFhwC": self.teacher_EhwC[self.teacher_WF[rows_B]].float()}


def whole_relations(pairs_BR: Tensor, tokens: int) -> Tensor:
    """Cosines times 127 of the pairs i < j, row by row -> int8 [B,K,K], symmetric, 127 on the diagonal."""
    row, column = torch.triu_indices(tokens, tokens, 1, device=pairs_BR.device)
    matrix = pairs_BR.new_full((len(pairs_BR), tokens, tokens), 127)
    matrix[:, row, column] = pairs_BR
    matrix[:, column, row] = pairs_BR
    return matrix


def load_window_targets(
    windows: Sequence[tuple[str, int, int]],
    physics: PhysicsConfig,
    *,
    recipe: TargetRecipe | None = None,
    teachers: TeachersConfig | None = None,
    crops: Sequence[Crop | None] | None = None,
    cache: str | Path | None = None,
    device: str | torch.device = "cpu",
    build_missing: bool = True,
    workers: int = 2,
    progress: bool = False,
) -> WindowTargets:
    """Targets of windows (dataset folder, episode index, start), row for row.

    ``recipe``, ``teachers``: what made them (exact truth by default). ``crops``: an augmentation for each row, replayed on its
    targets. ``build_missing``: compute what is not cached (as ``physis data targets`` does). Raises ``DatasetError`` for a start
    without targets (starts are multiples of ``recipe.start_stride``), for missing ground truth and for damaged shards, and
    ``UserError`` for options that these targets cannot serve.
    """
    recipe = recipe or resolve_recipe(teachers or TeachersConfig(), [])
    check_recipe(recipe, physics)
    datasets: dict[str, EpisodeSource] = {
        root: open_dataset(root) for root in dict.fromkeys(root for root, _, _ in windows)
    }
    rows: dict[tuple[str, int], list[int]] = {}
    for row, (root, episode, _) in enumerate(windows):
        rows.setdefault((root, episode), []).append(row)
    for root, dataset in datasets.items() if build_missing else ():
        wanted = [episode for where, episode in rows if where == root]
        options = {"cache": cache, "device": str(device), "workers": workers, "progress": progress}
        build(dataset, recipe, teachers=teachers, episodes=wanted, **options)  # type: ignore[arg-type]
    per_window: dict[str, Tensor] = {}
    encoded: list[Tensor] = []
    channels = 0
    for (root, episode), places in rows.items():
        shard = read_shard(datasets[root], episode, recipe, cache)
        starts = [windows[place][2] for place in places]
        some = [crops[place] for place in places] if crops is not None else None
        part = reduce_shard(shard, starts, datasets[root].episode(episode).length, recipe, physics, crops=some)
        part.teacher_WF += sum(map(len, encoded))
        encoded.append(part.teacher_EhwC)
        channels = part.channels
        for name in _PER_WINDOW:
            value = getattr(part, name)
            if name not in per_window:
                per_window[name] = value.new_empty((len(windows), *value.shape[1:]))
            per_window[name][torch.tensor(places)] = value
    return WindowTargets(**per_window, teacher_EhwC=torch.cat(encoded), channels=channels).to(device)


def check_recipe(recipe: TargetRecipe, physics: PhysicsConfig) -> None:
    """``UserError`` where targets of this recipe have not what the losses ask for."""
    tracker, _, encoder = recipe.names.split("/")
    check_served(tracker, encoder, physics)
    if not recipe.relations or physics.relations != "features":
        return
    _check_stored_tokens(physics)
    if physics.common != recipe.common:
        fix = f"teacher.common={physics.common} (computed again), or physics.common={recipe.common}"
        raise UserError("physics.common", got=physics.common, wanted=f"{recipe.common}, as stored", fix=fix)


def _check_stored_tokens(physics: PhysicsConfig) -> None:
    """Compact relations hold what the default choices select and what moves by the default measure. Choices that select elsewhere
    would find tokens without relations, and leave them out in silence."""
    default = PhysicsConfig()
    wider = {
        "min_motion": physics.min_motion < default.min_motion,
        "dead_zone": physics.dead_zone < default.dead_zone,
        **{
            name: getattr(physics, name) != getattr(default, name)
            for name in ("motion", "visible_steps", "camera_motion")
        },
    }
    if physics.common == "remove":  # the mean that was taken out is that of the default selection
        wider |= {
            n: getattr(physics, n) != getattr(default, n)
            for n in ("select", "depth", "depth_eps", "mask", "min_motion")
        }
    for name in (name for name, wrong in wider.items() if wrong):
        fix = "teacher.relations=0 keeps the features of all tokens"
        wanted = f"{getattr(default, name)}, by which compact relations were chosen"
        raise UserError(f"physics.{name}", got=getattr(physics, name), wanted=wanted, fix=fix)


def reduce_shard(
    shard: EpisodeTargets,
    starts: Sequence[int],
    length: int,
    recipe: TargetRecipe,
    physics: PhysicsConfig,
    *,
    crops: Sequence[Crop | None] | None = None,
) -> WindowTargets:
    """Tracks of an episode's windows -> targets at latent times and masks, on the CPU."""
    found = {int(start): place for place, start in enumerate(shard.starts_W)}
    absent = [start for start in starts if start not in found]
    if absent:
        raise DatasetError(
            "window start",
            got=absent[0],
            wanted=f"a multiple of {recipe.start_stride} below the episode's length {length}",
            fix=f"set data.start_stride to a multiple of {recipe.start_stride}",
        )
    take = np.array([found[start] for start in starts])
    crops = list(crops) if crops is not None else [None] * len(take)
    points = normalise_points(torch.from_numpy(shard.points_WTN2[take]).float() / shard.subpixels, shard.size)
    visible = torch.from_numpy(shard.visible_WTN[take])
    size = shard.size
    for place, crop in enumerate(crops):
        if crop is not None:
            crop.check(size)
            points[place] = crop.points(points[place], size)
    depth, grid = torch.from_numpy(shard.depth_WN[take]), recipe.tokens[1:]
    made = point_targets(points, visible, depth, size, grid, physics, depth_kind=shard.depth_kind)
    bodies = torch.zeros(len(take), 0, *grid, dtype=torch.int32)
    if physics.relations == "rigid":
        body = torch.from_numpy(shard.body_WN[take]).long()
        bodies = token_bodies(points, visible & in_frame(points), body, grid).int()
    features, rows = _features(shard, take, crops)
    token = torch.from_numpy(shard.token_WK[take].astype(np.int32))
    if token.shape[1]:
        if any(crop is not None for crop in crops):
            raise UserError(
                "crops", got="compact relations", wanted="features", fix="use targets with teacher.relations=0"
            )
        used = torch.from_numpy(shard.count_W[take])
        token = torch.where(torch.arange(token.shape[1]) < used[:, None], token, -1)
    return WindowTargets(
        points_WFN2=made["points_BFN2"],
        visible_WFN=made["visible_BFN"],
        select_WN=made["select_BN"],
        mask_WFhw=made["token_mask_BFhw"],
        body_WFhw=bodies,
        teacher_WF=rows,
        token_WK=token,
        relation_WR=torch.from_numpy(shard.relation_WR[take]),
        teacher_EhwC=features,
        channels=shard.channels,
    )


def _features(shard: EpisodeTargets, take: np.ndarray, crops: Sequence[Crop | None]) -> tuple[Tensor, Tensor]:
    """-> features [E,h,w,C] of these windows, each window's rows int64 [W,F]. Cropped windows have rows of their own."""
    wanted = shard.rows_WF[take]
    plain = np.array([place for place, crop in enumerate(crops) if crop is None], dtype=np.int64)
    used, rows = np.unique(wanted[plain], return_inverse=True)
    parts, at = [torch.from_numpy(shard.features_EhwC[used])], torch.zeros(wanted.shape, dtype=torch.long)
    at[torch.from_numpy(plain)] = torch.from_numpy(rows.reshape(wanted[plain].shape))
    for place, crop in enumerate(crops):
        if crop is not None and wanted.shape[1]:
            own = crop.features(torch.from_numpy(shard.features_EhwC[wanted[place]]), shard.size)
            at[place] = torch.arange(len(own)) + sum(map(len, parts))
            parts.append(own)
    return torch.cat(parts), at
