"""Canvases on a GPU, byte for byte those of ``canvas.compose``, for a policy that waits for its picture.

Pillow's filter is two matrices of integers, one an axis, with a rounding behind each. Here they are products in float64, where whole numbers of this
size are exact in whatever order they are added.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .canvas import camera_pictures, canvas_layout, compose

#: Fractional bits of Pillow's weights for pictures of 8 bits.
BITS = 32 - 8 - 2


def compose_on(device: torch.device, name: str, pictures: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """``canvas.compose`` with the resizing done on ``device``; the canvas is on the CPU. ``UserError`` as there."""
    layout = canvas_layout(name)
    if not layout.tiles:
        return compose(name, pictures)
    found = camera_pictures(name, pictures)
    canvas_3HW = torch.zeros(3, layout.height, layout.width, dtype=torch.uint8, device=device)
    for (top, left, height, width), picture in zip(layout.tiles, found.values(), strict=True):
        sent = torch.from_numpy(np.ascontiguousarray(picture)).to(device, non_blocking=True)
        canvas_3HW[:, top : top + height, left : left + width] = resized(sent.permute(2, 0, 1), height, width)
    return canvas_3HW.permute(1, 2, 0).contiguous().cpu().numpy()


def resized(picture_3hw: Tensor, height: int, width: int) -> Tensor:
    """Pillow's bilinear filter, columns first, for whole numbers from 0 to 255 [3,h,w]; float64 [3,height,width]."""
    made = picture_3hw.double()
    if made.shape[2] != width:
        made = _rounded(made @ weights(made.shape[2], width, made.device).T)
    if made.shape[1] != height:
        made = _rounded(weights(made.shape[1], height, made.device) @ made)
    return made


def _rounded(made: Tensor) -> Tensor:
    return ((made + 2.0 ** (BITS - 1)) * 2.0**-BITS).floor()


@functools.lru_cache(maxsize=32)
def weights(count: int, wanted: int, device: torch.device) -> Tensor:
    """float64 [wanted,count] of whole numbers: ``2 ** BITS`` times the weight of each of ``count`` rows in each of ``wanted`` ones. A triangle as
    wide as what a row covers, but at least of two rows; at the borders what is left of it."""
    scale = count / wanted
    support = max(scale, 1.0)
    made = np.zeros((wanted, count))
    for row in range(wanted):
        centre = (row + 0.5) * scale
        first, end = max(0, int(centre - support + 0.5)), min(count, int(centre + support + 0.5))
        found = [max(0.0, 1.0 - abs((place - centre + 0.5) * (1.0 / support))) for place in range(first, end)]
        total = sum(found)
        made[row, first:end] = [math.floor(0.5 + value / total * 2**BITS) for value in found]
    return torch.from_numpy(made).to(device)
