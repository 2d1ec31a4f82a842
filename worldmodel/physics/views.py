"""Several cameras in one picture: a view's tokens cut out of a collage, so that it is treated as a stream of its own.

A collage is one canvas that holds the cameras side by side (Fast-WAM puts two wrist pictures below the head's). Tracks, masks and
softmax belong to one camera each: a point of the left wrist cannot be found in the right one. Targets are therefore
made for each view on its own picture, with coordinates in [0,1] of that picture, whether the views share a canvas or not.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

#: (top, left, height, width), in pixels of the canvas or in tokens.
Rect = tuple[int, int, int, int]


def token_rects(tiles: Sequence[Rect], canvas: tuple[int, int], grid: tuple[int, int]) -> list[Rect]:
    """The tokens of each tile of a canvas (H, W) that has ``grid`` (h, w) tokens.

    ``ValueError`` for a tile that leaves the canvas or cuts a token in two: its tokens would show two cameras.
    """
    cell = canvas[0] // grid[0], canvas[1] // grid[1]
    if canvas != (cell[0] * grid[0], cell[1] * grid[1]):
        raise ValueError(f"a canvas of {canvas} has no whole tokens on a grid of {grid}")
    rects = []
    for tile in tiles:
        top, left, height, width = tile
        if any(side % cell[k % 2] for k, side in enumerate(tile)):
            raise ValueError(f"tile {tile} cuts through tokens of {cell[0]}x{cell[1]} pixels")
        if min(top, left) < 0 or top + height > canvas[0] or left + width > canvas[1] or min(height, width) < 1:
            raise ValueError(f"tile {tile} is not inside the canvas {canvas}")
        rects.append((top // cell[0], left // cell[1], height // cell[0], width // cell[1]))
    return rects


def cut(tokens_BFhwD: Tensor, rect: Rect) -> Tensor:
    """The tokens of one view, [B,F,h',w',D] (or [B,F,h',w'] of a map)."""
    top, left, height, width = rect
    return tokens_BFhwD[:, :, top : top + height, left : left + width]
