"""Pictures of one size in the frame of another and back: stretched, or letterboxed with black bars."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import unknown_name

POLICIES = ("stretch", "letterbox")


def resize_picture(picture_HWC: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """RGB uint8 to ``height`` x ``width``: by area where no side grows, by Lanczos otherwise (as WorldArena enlarges its sources)."""
    if picture_HWC.shape[:2] == (height, width):
        return picture_HWC
    from PIL import Image

    smaller = height <= picture_HWC.shape[0] and width <= picture_HWC.shape[1]
    kernel = Image.Resampling.BOX if smaller else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(np.ascontiguousarray(picture_HWC)).resize((width, height), kernel))


def inner_box(source: tuple[int, int], target: tuple[int, int], policy: str) -> tuple[int, int, int, int]:
    """Where a picture of size ``source`` lies in the frame ``target``: (top, left, height, width). Raises ``UserError`` for a policy that
    does not exist."""
    if policy not in POLICIES:
        raise unknown_name("resize", policy, POLICIES, see="docs/bring_your_world_model.md")
    if policy == "stretch":
        return (0, 0, *target)
    scale = min(target[0] / source[0], target[1] / source[1])
    height, width = max(1, round(source[0] * scale)), max(1, round(source[1] * scale))
    return ((target[0] - height) // 2, (target[1] - width) // 2, height, width)


def place(picture_HWC: NDArray[np.uint8], height: int, width: int, policy: str) -> NDArray[np.uint8]:
    """A picture in a frame of ``height`` x ``width``, black where ``letterbox`` leaves bars."""
    top, left, inner_height, inner_width = inner_box(picture_HWC.shape[:2], (height, width), policy)
    inner = resize_picture(picture_HWC, inner_height, inner_width)
    if inner.shape[:2] == (height, width):
        return inner
    frame = np.zeros((height, width, 3), np.uint8)
    frame[top : top + inner_height, left : left + inner_width] = inner
    return frame


def take_back(frames_THWC: NDArray[np.uint8], height: int, width: int, policy: str) -> NDArray[np.uint8]:
    """Frames in which ``place`` put a picture of ``height`` x ``width`` -> frames of that size, without the bars."""
    top, left, inner_height, inner_width = inner_box((height, width), frames_THWC.shape[1:3], policy)
    inner = frames_THWC[:, top : top + inner_height, left : left + inner_width]
    return np.stack([resize_picture(frame, height, width) for frame in inner])
