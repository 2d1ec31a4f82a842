"""Physics targets of training windows, in memory on the training device: what ``PhysisForcing`` reads, one row a
window.

Tracks are reduced to latent times and masks once, when they are loaded; batches are then mere gathers. The options of
eq. (1)-(4) in ``PhysicsConfig`` may change without any target being computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from physisforcing.core.errors import DatasetError
from physisforcing.core.lerobot import LeRobotDataset

from ..physics.config import PhysicsConfig
from ..physics.regions import in_frame, informative_points, normalise_points, token_bodies, token_mask
from ..physics.trajectory import latent_targets
from .target_shards import SUBPIXELS, EpisodeTargets, TargetRecipe, read_shard
from .targets import build

_PER_WINDOW = ("points_WFN2", "visible_WFN", "select_WN", "mask_WFhw", "teacher_WF", "body_WFhw")


@dataclass(slots=True, kw_only=True)
class WindowTargets:
    """Targets of W windows.

    ``points_WFN2`` float32 in [0,1], ``visible_WFN`` bool or a weight, ``select_WN``, ``mask_WFhw`` bool, ``teacher_WF`` int64
    rows of ``teacher_EhwC`` float16: windows that overlap share encoded frames. ``body_WFhw`` int32: the rigid body in each
    token, where relations are made from bodies ([W,0,h,w] otherwise).
    """

    points_WFN2: Tensor
    visible_WFN: Tensor
    select_WN: Tensor
    mask_WFhw: Tensor
    teacher_WF: Tensor
    body_WFhw: Tensor
    teacher_EhwC: Tensor

    def __len__(self) -> int:
        return len(self.select_WN)

    @property
    def grid(self) -> tuple[int, int, int]:
        """(F, h, w): the token grid that features must have."""
        _, frames, height, width = self.mask_WFhw.shape
        return frames, height, width

    @property
    def teacher_dim(self) -> int:
        return self.teacher_EhwC.shape[-1]

    def to(self, device: str | torch.device) -> WindowTargets:
        return WindowTargets(**{item.name: getattr(self, item.name).to(device) for item in fields(self)})

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
        return targets | {"teacher_BFhwC": self.teacher_EhwC[self.teacher_WF[rows_B]].float()}


def load_window_targets(
    windows: Sequence[tuple[str, int, int]],
    physics: PhysicsConfig,
    *,
    recipe: TargetRecipe | None = None,
    cache: str | Path | None = None,
    device: str | torch.device = "cpu",
    build_missing: bool = True,
    workers: int = 2,
    progress: bool = False,
) -> WindowTargets:
    """Targets of windows (dataset folder, episode index, start), row for row.

    ``build_missing``: compute what is not cached (as ``physis data targets`` does). Raises ``DatasetError`` for a
    start without targets (starts are multiples of ``recipe.start_stride``), for missing ground truth and for damaged
    shards.
    """
    recipe = recipe or TargetRecipe()
    datasets = {root: LeRobotDataset(root) for root in dict.fromkeys(root for root, _, _ in windows)}
    rows: dict[tuple[str, int], list[int]] = {}
    for row, (root, episode, _) in enumerate(windows):
        rows.setdefault((root, episode), []).append(row)
    for root, dataset in datasets.items() if build_missing else ():
        wanted = [episode for where, episode in rows if where == root]
        build(dataset, recipe, cache=cache, episodes=wanted, device=str(device), workers=workers, progress=progress)
    per_window: dict[str, Tensor] = {}
    encoded: list[Tensor] = []
    for (root, episode), places in rows.items():
        shard = read_shard(datasets[root], episode, recipe, cache)
        starts = [windows[place][2] for place in places]
        part = reduce_shard(shard, starts, datasets[root].episode(episode).length, recipe, physics)
        part.teacher_WF += sum(map(len, encoded))
        encoded.append(part.teacher_EhwC)
        for name in _PER_WINDOW:
            value = getattr(part, name)
            if name not in per_window:
                per_window[name] = value.new_empty((len(windows), *value.shape[1:]))
            per_window[name][torch.tensor(places)] = value
    return WindowTargets(**per_window, teacher_EhwC=torch.cat(encoded)).to(device)


def reduce_shard(
    shard: EpisodeTargets, starts: Sequence[int], length: int, recipe: TargetRecipe, physics: PhysicsConfig
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
    points = normalise_points(torch.from_numpy(shard.points_WTN2[take]).float() / SUBPIXELS, shard.size)
    visible = torch.from_numpy(shard.visible_WTN[take]) & in_frame(points)
    depth = torch.from_numpy(shard.depth_WN[take].astype(np.float32))
    select = informative_points(points, visible, depth, shard.size, physics)
    at_latents, seen = latent_targets(points, visible, time=physics.time, visibility=physics.visibility)
    teacher = torch.from_numpy(shard.teacher_EChw).permute(0, 2, 3, 1).contiguous()
    grid = teacher.shape[1], teacher.shape[2]
    bodies = torch.zeros(len(take), 0, *grid, dtype=torch.int32)
    if physics.relations == "rigid":
        bodies = token_bodies(points, visible, torch.from_numpy(shard.body_WN[take]).long(), grid).int()
    steps = {int(step): place for place, step in enumerate(shard.encoded_steps_E)}
    return WindowTargets(
        points_WFN2=at_latents,
        visible_WFN=seen,
        select_WN=select,
        mask_WFhw=token_mask(points, visible, select, grid, kind=physics.mask, size=shard.size),
        body_WFhw=bodies,
        teacher_WF=torch.tensor([[steps[int(s)] for s in recipe.latent_steps(start, length)] for start in starts]),
        teacher_EhwC=teacher,
    )
