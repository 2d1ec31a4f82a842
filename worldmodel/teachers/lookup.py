"""Maps of a teacher read at points."""

from __future__ import annotations

import torch.nn.functional as nnf
from torch import Tensor

from ..physics.regions import normalise_points


def at_points(maps_BHW: Tensor, points_BN2: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear values [B,N] of maps at pixels (x, y) of a picture of ``size`` (H, W), whatever the size of the maps; beyond the
    centres of the outer pixels, the value there."""
    place = normalise_points(points_BN2, size) * 2 - 1
    found = nnf.grid_sample(
        maps_BHW[:, None].float(), place[:, None], mode="bilinear", padding_mode="border", align_corners=False
    )
    return found[:, 0, 0]
