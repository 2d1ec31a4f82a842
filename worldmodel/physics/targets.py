"""From a teacher's tracks to the dictionary that ``PhysisForcing`` reads, eq. (1)-(4) and the latent times of (7)."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import PhysicsConfig
from .regions import in_frame, informative_points, token_mask
from .trajectory import latent_targets


def point_targets(
    points_BTN2: Tensor,
    visible_BTN: Tensor,
    depth_BN: Tensor,
    size: tuple[int, int],
    grid: tuple[int, int],
    config: PhysicsConfig,
    *,
    depth_kind: str = "metric",
) -> dict[str, Tensor]:
    """``points_BFN2``, ``visible_BFN``, ``select_BN`` and ``token_mask_BFhw`` of ``physics.forcing``.

    ``points_BTN2``: normalised to [0,1] (``normalise_points``), T = 1 + 4 (F - 1) frames; points outside the picture and
    coordinates that are no numbers count as hidden. ``depth_BN``, ``depth_kind``: depth under the queries and what it is
    (``point_scores``). ``size``: (H, W) of the picture that was tracked, in pixels. ``grid``: (h, w) tokens.
    """
    known_BTN = points_BTN2.isfinite().all(-1)
    points_BTN2 = torch.where(known_BTN[..., None], points_BTN2, 0)  # a product with a mask of 0 would keep NaN
    visible_BTN = visible_BTN & known_BTN & in_frame(points_BTN2)
    select = informative_points(points_BTN2, visible_BTN, depth_BN, size, config, depth_kind=depth_kind)
    at_latents, seen = latent_targets(points_BTN2, visible_BTN, time=config.time, visibility=config.visibility)
    return {
        "points_BFN2": at_latents,
        "visible_BFN": seen,
        "select_BN": select,
        "token_mask_BFhw": token_mask(points_BTN2, visible_BTN, select, grid, kind=config.mask, size=size),
    }
