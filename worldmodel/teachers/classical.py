"""A point tracker without a network: OpenCV's pyramidal Lucas-Kanade from frame to frame, checked by tracking back.

Runs anywhere in a few milliseconds a frame, knows nothing it did not see: a point that is lost stays hidden. Where the picture does not
change a point stands still, also on plain surfaces, which have nothing to follow. How far it is from the simulator's exact tracks
is measured by ``benchmarks/trackers.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from physisforcing.core.errors import UserError

from .protocols import TeacherInfo, Tracks

#: Side of the patch that is compared, in pixels, and levels of the pyramid above full size.
WINDOW, LEVELS = 15, 3
#: A patch that changes by less than this on average (grey levels of 255) from one frame to the next has not moved.
UNCHANGED = 0.5


class ClassicalTracker:
    """Satisfies ``PointTracker``; deterministic.

    ``tolerance_px``: a point that does not come back to within this when it is tracked back is lost; ``correction_px``: how far
    a comparison with its patch in the first frame may move a point, which takes slow drift out.
    """

    def __init__(self, *, tolerance_px: float = 1.0, correction_px: float = 1.5) -> None:
        for name, value in (("tolerance_px", tolerance_px), ("correction_px", correction_px)):
            if not value > 0:
                raise UserError(name, got=value, wanted="a positive number of pixels", fix="use 1.0")
        self.tolerance_px, self.correction_px = tolerance_px, correction_px

    @property
    def info(self) -> TeacherInfo:
        version = f"lk{WINDOW}x{LEVELS}/{UNCHANGED:g}/{self.tolerance_px:g}/{self.correction_px:g}"
        return TeacherInfo(name="classical", version=version, licence="Apache-2.0")

    def track(self, video_BTHWC: Tensor, queries_BN2: Tensor) -> Tracks:
        """``PointTracker.track``. Confidence falls linearly with the distance at which a point comes back."""
        if video_BTHWC.dtype != torch.uint8 or video_BTHWC.ndim != 5 or video_BTHWC.shape[-1] != 3:
            got = f"{video_BTHWC.dtype} {list(video_BTHWC.shape)}"
            raise UserError("video", got=got, wanted="uint8 [B,T,H,W,3]", fix="give the pictures as they were recorded")
        if queries_BN2.shape != (len(video_BTHWC), queries_BN2.shape[1], 2):
            wanted = f"[{len(video_BTHWC)},N,2], pixels of the first frame"
            raise UserError("queries", got=list(queries_BN2.shape), wanted=wanted, fix="one set of points a video")
        videos, queries = video_BTHWC.cpu().numpy(), queries_BN2.detach().float().cpu().numpy()
        found = [self._track(video, points) for video, points in zip(videos, queries, strict=True)]
        points, visible, confidence = (
            torch.from_numpy(np.stack(part)).to(queries_BN2.device) for part in zip(*found, strict=True)
        )
        return Tracks(points_BTN2=points, visible_BTN=visible, confidence_BTN=confidence)

    def _track(self, video_THWC: NDArray[np.uint8], query_N2: NDArray[np.float32]) -> tuple[NDArray, NDArray, NDArray]:
        import cv2

        frames = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in video_THWC]
        size = np.array([video_THWC.shape[2], video_THWC.shape[1]])
        place, alive = query_N2.astype(np.float32), _inside(query_N2, size)
        points, visible, confidence = [place], [alive], [alive.astype(np.float32)]
        for before, now in zip(frames, frames[1:], strict=False):
            moved = _flow(cv2, before, now, place)
            back = _flow(cv2, now, before, moved)
            same = _change(cv2, before, now, place) < UNCHANGED
            moved, back = np.where(same[:, None], place, moved), np.where(same[:, None], place, back)
            miss = np.linalg.norm(back - place, axis=1)
            fixed = _flow(cv2, frames[0], now, query_N2.astype(np.float32), start=moved)
            near = (np.linalg.norm(fixed - moved, axis=1) < self.correction_px) & ~same
            moved = np.where(near[:, None], fixed, moved)
            alive = alive & (miss < self.tolerance_px) & _inside(moved, size)
            # A lost point stays where it was last seen: whatever its patch matches now is something else.
            place = np.where(alive[:, None], moved, place)
            points.append(place)
            visible.append(alive)
            confidence.append((alive * np.clip(1 - miss / self.tolerance_px, 0, 1)).astype(np.float32))
        return np.stack(points), np.stack(visible), np.stack(confidence)


def _flow(
    cv2: Any, before: NDArray, now: NDArray, place_N2: NDArray, start: NDArray | None = None
) -> NDArray[np.float32]:
    """Where patches of ``before`` stand in ``now``; searched from ``start`` at full size only where that is given."""
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 30, 0.01)
    options = {"winSize": (WINDOW, WINDOW), "criteria": criteria, "maxLevel": LEVELS}
    if start is not None:
        options |= {"maxLevel": 0, "flags": cv2.OPTFLOW_USE_INITIAL_FLOW}
    guess = None if start is None else start[:, None].copy()
    found, status, _ = cv2.calcOpticalFlowPyrLK(before, now, place_N2[:, None], guess, **options)
    # Far away where the patch was not found, so that the way back misses.
    return np.where(status.astype(bool), found[:, 0], np.float32(1e6)).astype(np.float32)


def _change(cv2: Any, before: NDArray, now: NDArray, place_N2: NDArray) -> NDArray[np.float32]:
    """Mean absolute difference of the patches at these places, [N]."""
    difference = cv2.blur(cv2.absdiff(before, now).astype(np.float32), (WINDOW, WINDOW))
    column, row = np.clip(np.rint(place_N2).astype(int), 0, [now.shape[1] - 1, now.shape[0] - 1]).T
    return difference[row, column]


def _inside(points_N2: NDArray, size: NDArray) -> NDArray[np.bool_]:
    return ((points_N2 >= -0.5) & (points_N2 < size - 0.5)).all(-1)
