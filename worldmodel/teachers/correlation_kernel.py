"""The Triton kernel of ``fast_cotracker.correlate``; imported only where there is Triton and a GPU."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

#: Frames of one point that a program goes through, with the features of its query in registers.
CHUNK = 9


@triton.jit
def _kernel(
    level, support, places, out,
    frames, height, width, scale, out_row,
    CHANNELS: tl.constexpr, FRAMES: tl.constexpr,
):  # fmt: skip
    point = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * FRAMES
    tile = tl.arange(0, 64)
    channel = tl.arange(0, CHANNELS)
    query = tl.load(support + (point * 64 + tile)[:, None] * CHANNELS + channel[None, :])
    # Rows: the 7x7 places. Columns: the 8x8 whole pixels, x outermost in both.
    right = (tile // 8)[None, :] - (tile // 7)[:, None]
    down = (tile % 8)[None, :] - (tile % 7)[:, None]
    kept = (tile[:, None] < 49) & (tile[None, :] < 56)
    for frame in range(first, tl.minimum(first + FRAMES, frames)):
        row = point * frames + frame
        x = tl.load(places + row * 2) * scale
        y = tl.load(places + row * 2 + 1) * scale
        x = tl.minimum(tl.maximum(x, -4.0), width + 3.0)
        y = tl.minimum(tl.maximum(y, -4.0), height + 3.0)
        whole_x, whole_y = tl.floor(x), tl.floor(y)
        x, y = x - whole_x, y - whole_y
        column = tl.minimum(tl.maximum(whole_x.to(tl.int32) - 3 + tile // 8, 0), width - 1)
        line = tl.minimum(tl.maximum(whole_y.to(tl.int32) - 3 + tile % 8, 0), height - 1)
        pixel = (frame * height + line.to(tl.int64)) * width + column
        patch = tl.load(level + pixel[:, None] * CHANNELS + channel[None, :])
        found = tl.dot(patch, tl.trans(query))
        blend = tl.where(right == 0, 1 - x, tl.where(right == 1, x, 0.0))
        blend *= tl.where(down == 0, 1 - y, tl.where(down == 1, y, 0.0))
        found = tl.dot(blend, found)
        place = out + row * out_row + tile[:, None] * 56 + tile[None, :]
        tl.store(place, found.to(out.dtype.element_ty), mask=kept)


def launch(level_ThwC: Tensor, support_NTC: Tensor, places_NT2: Tensor, out_NTK: Tensor, scale: float) -> None:
    frames, height, width, channels = level_ThwC.shape
    points = len(places_NT2)
    assert level_ThwC.is_contiguous() and support_NTC.is_contiguous() and places_NT2.is_contiguous()
    assert support_NTC.shape == (points, 64, channels) and out_NTK.shape == (points, frames, 49 * 56)
    assert out_NTK.stride(2) == 1 and out_NTK.stride(0) == frames * out_NTK.stride(1)
    grid = (points, triton.cdiv(frames, CHUNK))
    _kernel[grid](
        level_ThwC, support_NTC, places_NT2, out_NTK,
        frames, height, width, scale, out_NTK.stride(1),
        CHANNELS=channels, FRAMES=CHUNK, num_warps=4,
    )  # fmt: skip
