"""How much moves in a clip, and whether it is cut: numbers from small pictures, no weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Share of the picture that counts: an arm's hand covers a few per cent, and the rest of a scene stands still.
FASTEST = 0.05
#: A pixel moves only where its 3x3 mean differs by more than this (0-255) between the two pictures: flow over noise is noise.
CHANGED = 6.0
#: Thumbnail pixels that something may jerk from one frame to the next: a tenth of the picture, of 32.
REACH = 3
#: Thumbnails that are compared at once.
_AT_ONCE = 1024
#: Plain differences that stand out by less are no cut.
PEAK = 0.01


def motion_score(pictures_THWC: NDArray[np.uint8], seconds: float) -> float:
    """Mean speed of the fastest ``FASTEST`` of the pixels, in picture heights a second; 0 for a single picture.

    ``pictures``: RGB, some hundred pixels high, ``seconds`` apart. Speeds are OpenCV's DIS flow where the picture changed; its
    overall brightness is taken out first, so that a lamp is no motion. A camera that moves counts as motion.
    """
    import cv2

    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    grey = [_even(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)) for picture in pictures_THWC]
    blurred = [cv2.blur(picture, (3, 3)) for picture in grey]
    speeds = []
    for k in range(1, len(grey)):
        changed = cv2.absdiff(blurred[k - 1], blurred[k]) > CHANGED
        if not changed.any():
            speeds.append(0.0)
            continue
        found = flow.calc(grey[k - 1], grey[k], None)
        length = np.where(changed, np.hypot(found[..., 0], found[..., 1]), 0.0).ravel()
        count = max(1, round(FASTEST * length.size))
        speeds.append(float(np.partition(length, -count)[-count:].mean()))
    return float(np.mean(speeds)) / (pictures_THWC.shape[1] * seconds) if speeds else 0.0


def cut_score(thumbnails: Sequence[NDArray[np.uint8]]) -> float:
    """How far the largest change between two frames stands above the changes before and after it: 0 to 1.

    ``thumbnails``: small RGB pictures of every frame. A change is the mean absolute difference, in [0,1], of each pixel to the most
    similar one within ``REACH`` pixels of the other frame, so that what jerks from one frame to the next has changed little. Fast
    motion makes large changes in a row and a flash makes two; a cut makes one. 0 for fewer than four frames.
    """
    if len(thumbnails) < 4:
        return 0.0
    parts = range(0, len(thumbnails) - 1, _AT_ONCE)
    steps = [np.abs(np.diff(_unit(thumbnails[k : k + _AT_ONCE + 1]), axis=0)).mean(axis=(1, 2, 3)) for k in parts]
    step = np.concatenate(steps)
    # The first and the last step have one neighbour only: a still picture may stand at either end of a recording.
    peaks = np.nonzero(step[1:-1] - np.maximum(step[:-2], step[2:]) > PEAK)[0] + 1
    found = 0.0
    for k in peaks:
        before, one, two, after = _unit(thumbnails[k - 1 : k + 3])
        found = max(found, _change(one, two) - max(_change(before, one), _change(two, after)))
    return found


def _unit(thumbnails: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """In [0,1]. Never of all of a long recording: an hour at 30 a second would be 1.3 GB."""
    return np.stack(thumbnails).astype(np.float32) / 255


def _change(one_HWC: NDArray[np.float32], two_HWC: NDArray[np.float32]) -> float:
    """Either picture's mean distance from the other, places within ``REACH`` pixels alike: the larger of the two."""
    return max(_distance(one_HWC, two_HWC), _distance(two_HWC, one_HWC))


def _distance(one_HWC: NDArray[np.float32], two_HWC: NDArray[np.float32]) -> float:
    height, width = one_HWC.shape[:2]
    padded = np.pad(one_HWC, ((REACH, REACH), (REACH, REACH), (0, 0)), mode="edge")
    nearest = np.full((height, width), np.inf, np.float32)
    for down in range(2 * REACH + 1):
        for right in range(2 * REACH + 1):
            shifted = padded[down : down + height, right : right + width]
            nearest = np.minimum(nearest, np.abs(shifted - two_HWC).mean(2))
    return float(nearest.mean())


def sharpness(pictures_THWC: NDArray[np.uint8]) -> float:
    """Mean variance of the Laplacian over the variance of the grey values: falls when a copy is encoded again or enlarged."""
    import cv2

    grey = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32) for picture in pictures_THWC]
    values = [cv2.Laplacian(picture, cv2.CV_32F).var() / max(float(picture.var()), 1.0) for picture in grey]
    return float(np.mean(values))


def _even(grey_HW: NDArray[np.uint8]) -> Any:
    """The picture with its mean at 128."""
    import cv2

    return cv2.addWeighted(grey_HW, 1.0, grey_HW, 0.0, 128.0 - float(grey_HW.mean()))
