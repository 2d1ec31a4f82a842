"""Imagined beside executed video, and their writing with an honest label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.types import FPS

from .frame_store import resize_to

#: Control steps between two imagined frames, and between two frames of the written video.
STRIDE = 2


class ImaginationRecorder:
    """``core.protocols.VideoRecorderHook`` that keeps every imagined video of an episode."""

    def __init__(self) -> None:
        self.videos: list[tuple[int, NDArray[np.uint8]]] = []

    def imagined(self, step: int, frames_THWC: NDArray[np.uint8]) -> None:
        self.videos.append((step, frames_THWC))


def side_by_side(
    imagined: Sequence[tuple[int, NDArray[np.uint8]]], executed: Mapping[int, NDArray[np.uint8]]
) -> NDArray[np.uint8]:
    """[T,H,2W,3]: left what the plan of the moment imagined, right what happened, every ``STRIDE`` control steps.

    ``executed``: control step -> picture (240x320). Stops at the last executed step.
    """
    assert imagined and executed
    first = imagined[0][1][0]
    height, width = first.shape[:2]
    rows = []
    for step in range(0, max(executed) + 1, STRIDE):
        if step not in executed:
            continue
        start, frames = max((v for v in imagined if v[0] <= step), key=lambda v: v[0])
        left = frames[min((step - start) // STRIDE, len(frames) - 1)]
        right = resize_to(executed[step][None], height, width)[0]
        rows.append(np.concatenate([left, right], axis=1))
    return np.stack(rows)


def write_labelled(path: str | Path, frames_THWC: NDArray[np.uint8], *, label: str, scale: int = 2) -> Path:
    """MP4 at real time, enlarged ``scale`` times without smoothing; ``label`` goes into its metadata."""
    from physisforcing.core.video import write_mp4

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    enlarged = frames_THWC.repeat(scale, axis=1).repeat(scale, axis=2)
    write_mp4(path, enlarged, FPS / STRIDE, {"comment": label})
    return path
