"""Which clips are the same recording: encoded again, cropped, brighter or darker, cut a little earlier or later.

Robot data of one lab looks alike all the way: one table, one camera, one arm. Likeness of appearance or of hashes of pictures cannot
tell two takes of a task from two copies of one. So candidates come from appearance, and each candidate is registered: shifted in time,
moved and scaled in the picture until it fits, and compared where something moves and where something stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .alignment import nearest
from .decode import Span, SpanReader

#: Part of the key of a remembered likeness: raise it when the number changes.
VERSION = 1
#: Pictures a second, the most of them (half a minute), their height; a time shift is found on ones ``COARSE`` times smaller.
RATE, MOST, HEIGHT, COARSE = 8.0, 240, 48, 4
#: Clips must share this share of the shorter one.
OVERLAP = 0.5
#: Coarse likeness below which no registration is tried.
HOPEFUL = 0.4


def candidates(seen_ND: NDArray[np.float32], count: int) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of which one is among the ``count`` clips that look most like the other; in ascending order."""
    pairs = {(min(i, j), max(i, j)) for i, others in enumerate(nearest(seen_ND, count)) for j in others}
    return sorted(pairs)


@dataclass(slots=True, kw_only=True, frozen=True)
class GreyFilm:
    """A clip made small: grey pictures float32 [T,h,w], of mean 0 and deviation 1 over the clip, ``RATE`` a second."""

    frames_THW: NDArray[np.float32]

    @property
    def still_HW(self) -> NDArray[np.float32]:
        return np.median(self.frames_THW, axis=0)


@lru_cache(maxsize=512)
def grey_film(span: Span) -> GreyFilm:
    """Read from the file; the last 512 are remembered. ``DatasetError`` as ``SpanReader``."""
    import cv2
    from av.video.reformatter import Interpolation, VideoReformatter

    reformatter, frames = VideoReformatter(), []
    with SpanReader(span) as reader:
        size = HEIGHT, max(16, round(HEIGHT * reader.header.width / reader.header.height))
        for time, frame in reader.frames():
            if time >= len(frames) / RATE - 1e-3:
                flags = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
                small = reformatter.reformat(
                    frame, width=2 * size[1], height=2 * size[0], format="gray", interpolation=flags, threads=1
                )
                frames.append(cv2.resize(small.to_ndarray(), size[::-1], interpolation=cv2.INTER_AREA))
            if len(frames) == MOST:
                break
    film = np.stack(frames).astype(np.float32)
    return GreyFilm(frames_THW=(film - film.mean()) / max(float(film.std()), 1e-3))


def likeness(a: Span, b: Span, shift: float) -> float:
    """How much two clips are one recording: 0 to 1, the same from both sides up to rounding.

    The time shift (up to ``shift`` s) and the affine change of the picture that fit best are taken out; then it is the smaller of two
    correlations, that of what stands (medians over time) and that of what moves (differences from them).
    """
    one, two = grey_film(a).frames_THW, grey_film(b).frames_THW
    if one.shape[1:] != two.shape[1:]:
        two = _resized(two, one.shape[1:])
    start_one, start_two, length, coarse = _best_shift(one, two, round(shift * RATE))
    if length == 0 or coarse < HOPEFUL:
        return max(0.0, min(1.0, coarse))
    one, two = one[start_one : start_one + length], two[start_two : start_two + length]
    warped, inside = _registered(one, two)
    if warped is None:
        return max(0.0, min(1.0, coarse, HOPEFUL))
    still_one, still_two = np.median(one, 0), np.median(warped, 0)
    standing = _correlation(still_one[inside], still_two[inside])
    moving = _correlation((one - still_one)[:, inside], (warped - still_two)[:, inside])
    return max(0.0, min(standing, moving))


def _best_shift(one_THW: NDArray[np.float32], two_THW: NDArray[np.float32], most: int) -> tuple[int, int, int, float]:
    """Where the common part starts in each, how many pictures it has, and the correlation of what moves in it, coarsely."""
    small = [_resized(film, (film.shape[1] // COARSE, film.shape[2] // COARSE)) for film in (one_THW, two_THW)]
    moving = [film - np.median(film, 0) for film in small]
    needed = max(1, round(OVERLAP * min(len(one_THW), len(two_THW))))
    best = (0, 0, 0, -1.0)
    for shift in range(-most, most + 1):
        start_one, start_two = max(0, shift), max(0, -shift)
        length = min(len(one_THW) - start_one, len(two_THW) - start_two)
        if length >= needed:
            parts = moving[0][start_one : start_one + length], moving[1][start_two : start_two + length]
            found = _correlation(*parts)
            if found > best[3] + 1e-9:
                best = start_one, start_two, length, found
    return best


def _registered(one_THW: NDArray[np.float32], two_THW: NDArray[np.float32]) -> tuple[Any, NDArray[np.bool_]]:
    """``two`` in the picture of ``one``, and where it has pixels; (None, ...) where no plausible change of the picture is found."""
    import cv2

    matrix = np.eye(2, 3, dtype=np.float32)
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 60, 1e-5)
    try:
        _, matrix = cv2.findTransformECC(one_THW.mean(0), two_THW.mean(0), matrix, cv2.MOTION_AFFINE, stop, None, 3)
    except cv2.error:  # it does not converge
        return None, np.zeros(one_THW.shape[1:], bool)
    height, width = one_THW.shape[1:]
    if abs(np.linalg.det(matrix[:, :2]) - 1) > 0.6 or (np.abs(matrix[:, 2]) > (0.3 * width, 0.3 * height)).any():
        return None, np.zeros((height, width), bool)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    warped = np.stack([cv2.warpAffine(frame, matrix, (width, height), flags=flags) for frame in two_THW])
    cover = cv2.warpAffine(np.ones((height, width), np.float32), matrix, (width, height), flags=flags)
    return warped, cover > 0.99


def _resized(film_THW: NDArray[np.float32], size: tuple[int, ...]) -> NDArray[np.float32]:
    import cv2

    return np.stack([cv2.resize(frame, size[::-1], interpolation=cv2.INTER_AREA) for frame in film_THW])


def _correlation(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    x, y = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size > 1e-9 else 0.0


def keep_best(order: Sequence[int], same: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Dropped clip -> the kept clip that it repeats. ``order``: clips, best first; each is kept unless it repeats a kept one.

    Not by connected groups: three takes of which neighbours are alike need not be one recording.
    """
    partners: dict[int, list[int]] = {}
    for a, b in same:
        partners.setdefault(a, []).append(b)
        partners.setdefault(b, []).append(a)
    kept: set[int] = set()
    dropped: dict[int, int] = {}
    place = {clip: rank for rank, clip in enumerate(order)}
    for clip in order:
        originals = [other for other in partners.get(clip, ()) if other in kept]
        if originals:
            dropped[clip] = min(originals, key=place.__getitem__)
        else:
            kept.add(clip)
    return dropped
