"""Dense optical flow as point tracker: OpenCV's DIS flow from frame to frame, for a camera that stands still.

Three additions, each measured on simulator clips (``benchmarks/trackers.py``). What lies on something that rests stays exactly where
it was: a smooth flow field drags the background and moving shadows along with an arm, and over plain surfaces it knows nothing
better. The flow straight from frame 0 is taken where it is surer, which brings back points that something had covered. A point that
has lost its colour counts as hidden.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from physisforcing.core.errors import UserError

from .protocols import TeacherInfo, Tracks

#: Part of every cache key: raise it when tracks change.
VERSION = 1
#: Flow and its reverse must close to within this many pixels plus this share of the way there and back.
CLOSES_PX, CLOSES_SHARE = 1.0, 0.05
#: Mean difference of the channels (0-255) from the point's colour in frame 0 up to which it can be the same point.
SAME_COLOUR = 25.0
#: The confidence is exp(-(closing error + change of colour)), each in units of its limit. Visible are points above this: exp(-1).
SURE = float(np.exp(-1))
#: A pixel has changed when a channel of the 3x3 mean differs by more than this (0-255) from frame 0.
UNCHANGED = 4.0
#: A pixel is plain when no channel (0-255) varies by this much within 3x3 pixels: soft shadows do not cut a plain region in two.
PLAIN = 12
#: Smaller regions, in pixels, are texture.
SMALLEST = 30
#: A plain region rests while more than this share of its outline is unchanged. Larger regions need less, and none from ``BACKGROUND``
#: (share of the picture) on: arms cover most of the outline of a table without moving it.
OUTLINE, BACKGROUND = 0.4, 0.25


class ClassicalTracker:
    """``PointTracker`` on OpenCV alone: no weights, deterministic, about 2 s a window of 17 frames of 240x320 on one core.

    A point is visible where the confidence is above exp(-1), see ``SURE``; what rests has no closing error, and beyond the picture
    the confidence is 0. A point that is lost goes on with the flow of what covers it, and is found again by the flow from frame 0
    or where it rests, never by what it has followed meanwhile.
    """

    @property
    def info(self) -> TeacherInfo:
        return TeacherInfo(name="classical", version=f"dis{VERSION}-opencv{_cv2().__version__}", licence="Apache-2.0")

    def track(self, video_BTHWC: Tensor, queries_BN2: Tensor) -> Tracks:
        """``PointTracker.track``, clip by clip on the CPU. Sides of 16 pixels or more. ``UserError`` for another dtype or shape."""
        check_request(video_BTHWC, queries_BN2)
        if min(video_BTHWC.shape[2:4]) < 16:
            got = f"{video_BTHWC.shape[2]}x{video_BTHWC.shape[3]}"
            raise UserError("video", got=got, wanted="16 pixels or more a side", fix="give larger pictures")
        videos, queries = video_BTHWC.cpu().numpy(), queries_BN2.cpu().numpy().astype(np.float64)
        parts = [_Clip(frames).track(query) for frames, query in zip(videos, queries, strict=True)]
        points, visible, confidence = (np.stack(part) for part in zip(*parts, strict=True))
        home = video_BTHWC.device
        return Tracks(
            points_BTN2=torch.from_numpy(points.astype(np.float32)).to(home),
            visible_BTN=torch.from_numpy(visible).to(home),
            confidence_BTN=torch.from_numpy(confidence.astype(np.float32)).to(home),
        )


class _Clip:
    """One video uint8 [T,H,W,3] with what the flow needs of it."""

    def __init__(self, frames_THWC: NDArray[np.uint8]) -> None:
        cv2 = self.cv2 = _cv2()
        self.first = frames_THWC[0]
        self.size = np.array([frames_THWC.shape[2], frames_THWC.shape[1]])
        self.grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames_THWC]
        self.colour = [cv2.blur(frame, (3, 3)) for frame in frames_THWC]
        self.changed_THW = np.stack([cv2.absdiff(self.colour[0], c).max(2) > UNCHANGED for c in self.colour])
        self.flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        # The preset ends at half size: off by a tenth of a pixel a frame, which adds up to a pixel over a window.
        self.flow.setFinestScale(0)
        self.flow.setPatchStride(3)
        self.flow.setVariationalRefinementIterations(10)

    def track(self, query_N2: NDArray[np.float64]) -> tuple[NDArray, NDArray, NDArray]:
        """-> points [T,N,2], visible [T,N], confidence [T,N]."""
        found = [(query_N2, np.ones(len(query_N2)))]
        colour, rests_TN = self._at(self.colour[0], query_N2), self._rests(query_N2)
        for frame in range(1, len(self.grey)):
            before, sure_before = found[-1]
            points, sure = self._follow(frame - 1, frame, before, colour)
            sure = np.where(sure_before > SURE, sure, np.minimum(sure, sure_before))
            if frame > 1:
                direct, sure_direct = self._follow(0, frame, query_N2, colour)
                better = (sure_direct > sure) & (sure_direct > SURE)
                points, sure = np.where(better[:, None], direct, points), np.where(better, sure_direct, sure)
            rests, sure_resting = rests_TN[frame], np.exp(-self._change(frame, query_N2, colour))
            found.append((np.where(rests[:, None], query_N2, points), np.where(rests, sure_resting, sure)))
        points_TN2, sure_TN = (np.stack(part) for part in zip(*found, strict=True))
        return points_TN2, sure_TN > SURE, sure_TN

    def _follow(
        self, start: int, end: int, points_N2: NDArray[np.float64], colour_N3: NDArray[np.float32]
    ) -> tuple[NDArray, NDArray]:
        """Where points of frame ``start`` are in frame ``end``, and how surely."""
        forward = self.flow.calc(self.grey[start], self.grey[end], None)
        backward = self.flow.calc(self.grey[end], self.grey[start], None)
        there = self._at(forward, points_N2)
        arrived = points_N2 + there
        back = self._at(backward, arrived)
        limit = CLOSES_PX + CLOSES_SHARE * (np.linalg.norm(there, axis=1) + np.linalg.norm(back, axis=1))
        opening = np.linalg.norm(there + back, axis=1) / limit
        inside = ((arrived >= -0.5) & (arrived < self.size - 0.5)).all(1)
        return arrived, np.exp(-opening - self._change(end, arrived, colour_N3)) * inside

    def _change(
        self, frame: int, points_N2: NDArray[np.float64], colour_N3: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """How far the colours at these places are from those of frame 0, in units of ``SAME_COLOUR``: [N]."""
        change: NDArray[np.float32] = np.abs(self._at(self.colour[frame], points_N2) - colour_N3).mean(1) / SAME_COLOUR
        return change

    def _rests(self, query_N2: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Whether what a point lies on is where it was in frame 0: [T,N].

        Texture and edges show it themselves. A plain region shows it at its outline, and for all of its points at once.
        """
        cv2 = self.cv2
        column, row = np.clip(np.rint(query_N2).astype(int), 0, self.size - 1).T
        near = [cv2.dilate(changed.astype(np.uint8), np.ones((3, 3), np.uint8)) for changed in self.changed_THW]
        rests_TN = np.stack(near)[:, row, column] == 0
        range_HW = cv2.morphologyEx(self.first, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)).max(2)
        _, region_HW, boxes, _ = cv2.connectedComponentsWithStats((range_HW < PLAIN).astype(np.uint8), connectivity=4)
        region_N = region_HW[row, column]
        for region in np.unique(region_N[region_N > 0]):
            x, y, width, height, area = boxes[region]
            if area >= SMALLEST:
                box = slice(max(y - 2, 0), y + height + 2), slice(max(x - 2, 0), x + width + 2)
                wanted = OUTLINE * (1 - area / (BACKGROUND * region_HW.size))
                unchanged_T = 1 - self._changed_outline(region_HW[box] == region, self.changed_THW[:, *box])
                rests_TN[:, region_N == region] = (unchanged_T > wanted)[:, None]
        return rests_TN

    def _changed_outline(self, inside_HW: NDArray[np.bool_], changed_THW: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Share [T] of the two pixels around a region that changed; nil where the region fills the picture."""
        wide = self.cv2.dilate(inside_HW.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
        outline_TP = changed_THW[:, wide & ~inside_HW]
        return outline_TP.mean(1) if outline_TP.shape[1] else np.zeros(len(outline_TP))

    def _at(self, picture: NDArray, points_N2: NDArray[np.float64]) -> NDArray[np.float32]:
        """Bilinear samples [N,C]; beyond the border, the border's value."""
        cv2, place = self.cv2, points_N2.astype(np.float32)[:, None]
        sampled = cv2.remap(picture, place[..., 0], place[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return sampled[:, 0].astype(np.float32)


def check_request(video_BTHWC: Tensor, queries_BN2: Tensor) -> None:
    """``UserError`` unless these are what ``PointTracker.track`` takes."""
    shape = list(video_BTHWC.shape)
    if video_BTHWC.dtype != torch.uint8 or len(shape) != 5 or shape[-1] != 3 or 0 in shape:
        got, fix = f"{video_BTHWC.dtype}{shape}", "give recorded pictures as they are"
        raise UserError("video", got=got, wanted="uint8 [B,T,H,W,3], nothing empty", fix=fix)
    shape = list(queries_BN2.shape)
    if queries_BN2.dtype != torch.float32 or len(shape) != 3 or shape[::2] != [len(video_BTHWC), 2] or 0 in shape:
        got, wanted = f"{queries_BN2.dtype}{shape}", f"float32 [{len(video_BTHWC)},N,2], N at least 1"
        raise UserError("queries", got=got, wanted=wanted, fix="give pixels (x, y) of frame 0 for every clip")


def _cv2() -> Any:
    import cv2

    return cv2
