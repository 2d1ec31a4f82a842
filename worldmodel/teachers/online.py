"""Targets computed from the pictures of a batch while training, instead of read from a cache."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from physisforcing.core.errors import UserError
from physisforcing.core.types import ViewLayout

from ..physics.config import PhysicsConfig
from ..physics.regions import normalise_points
from ..physics.targets import point_targets
from ..physics.views import Rect, token_rects
from .ground_truth import GRID, query_grid
from .lookup import at_points
from .selection import BUILT_IN, Teachers, check_served


class OnlineTeachers:
    """``teachers(video_BTHWC, (F, h, w))`` -> the ``targets`` dictionary of ``physics.forcing``.

    All three teachers look at the video; exact truth is not in it and must come from a cache. ``grid``: rows and columns of the
    queries. Raises ``UserError`` for teachers that do not see pictures and for relations of rigid bodies.
    """

    def __init__(self, teachers: Teachers, physics: PhysicsConfig, *, grid: tuple[int, int] = GRID) -> None:
        for kind in ("tracker", "depth"):
            name = getattr(teachers.config, kind).name
            if name in set(BUILT_IN[kind]) - {"none"}:
                fix = "data.targets=cache, or teacher=permissive"
                raise UserError(f"teacher.{kind}.name", got=name, wanted="a teacher that sees pictures", fix=fix)
        check_served(teachers.config.tracker.name, teachers.config.encoder.name, physics)
        teachers.load()
        self.teachers, self.physics, self.grid = teachers, physics, grid

    @property
    def identity(self) -> dict[str, Any]:
        """Name, version, licence and checksum of each teacher."""
        return {kind: asdict(self.teachers.info(kind)) for kind in ("tracker", "depth", "encoder")}

    @property
    def channels(self) -> int:
        encoder = self.teachers.encoder
        return 0 if encoder is None else encoder.channels

    @torch.no_grad()
    def __call__(self, video_BTHWC: Tensor, tokens: tuple[int, int, int]) -> dict[str, Tensor]:
        """``video_BTHWC``: uint8, T = 1 + 4 (F - 1). ``tokens``: (F, h, w) of the denoiser. Tensors are on the video's device."""
        tracker, estimator, encoder = self.teachers.tracker, self.teachers.depth, self.teachers.encoder
        assert tracker is not None
        home, size = video_BTHWC.device, (int(video_BTHWC.shape[2]), int(video_BTHWC.shape[3]))
        queries = torch.from_numpy(query_grid(self.grid, size)).float().to(home).expand(len(video_BTHWC), -1, -1)
        tracks = tracker.track(video_BTHWC, queries)
        depth, kind = torch.zeros(queries.shape[:2], device=home), "off"
        if estimator is not None:
            depth, kind = at_points(estimator.depth(video_BTHWC[:, 0]).to(home), queries, size), estimator.kind
        points = normalise_points(tracks.points_BTN2.to(home), size)
        visible = tracks.visible_BTN.to(home)
        targets = point_targets(points, visible, depth, size, tokens[1:], self.physics, depth_kind=kind)
        if encoder is None:
            features = torch.zeros(len(video_BTHWC), *tokens, 0, device=home)
        else:
            features = encoder.encode(video_BTHWC, tokens).to(home)
        return targets | {"teacher_BFhwC": features}

    def views(
        self, video_BTHWC: Tensor, tokens: tuple[int, int, int], layout: ViewLayout
    ) -> tuple[list[dict[str, Tensor]], list[Rect]]:
        """Targets of each camera of a collage, made on its own picture, and its tokens: what ``PhysisForcing`` takes as ``targets``
        and ``views``. The same as those of separate streams. Raises ``ValueError`` where a tile cuts through tokens."""
        rects = token_rects(layout.tiles, (layout.height, layout.width), tokens[1:])
        parts = layout.split(video_BTHWC).values()
        made = [self(part.contiguous(), (tokens[0], *rect[2:])) for part, rect in zip(parts, rects, strict=True)]
        return made, rects
