"""Which clips are the same recording: encoded again, cropped, brighter or darker, cut a little earlier or later.

Robot data of one lab looks alike all the way: one table, one camera, one arm. Likeness of appearance or of hashes of pictures cannot
tell two takes of a task from two copies of one. So candidates come from appearance, and each candidate is registered: shifted in time,
moved and scaled in the picture until it fits, and compared where something moves and where something stands.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .alignment import nearest
from .decode import Span, SpanReader

#: Part of the key of a remembered likeness: raise it when the number changes.
VERSION = 3
#: Pictures a second that are compared, of the first ``MOST`` s; time shifts that are tried are ``STEP`` s apart.
RATE, MOST, STEP = 8.0, 20.0, 1 / 32
#: Height of the pictures; a time shift is found on ones ``COARSE`` times smaller.
HEIGHT, COARSE = 96, 6
#: Grey values from which on a pixel may have been cut off.
WHITE, BLACK = 250, 5
#: A picture may be this share of the other, or anything near it.
CROPS = (0.94, 0.88)
#: Clips must share this share of the shorter one.
OVERLAP = 0.5
#: Bytes of films that are kept: some hundred clips of ten seconds.
REMEMBERED = 1 << 29
#: Coarse likeness below which no registration is tried.
HOPEFUL = 0.5


def candidates(seen_ND: NDArray[np.float32], count: int) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of which one is among the ``count`` clips that look most like the other; in ascending order."""
    pairs = {(min(i, j), max(i, j)) for i, others in enumerate(nearest(seen_ND, count)) for j in others}
    return sorted(pairs)


def reading_order(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pairs in an order in which those that share clips are near each other: reading a film takes longer than comparing two, and
    only the last films are remembered. Clips are numbered so that neighbours have near numbers (reverse Cuthill-McKee)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import reverse_cuthill_mckee

    if not pairs:
        return []
    one, two = np.array(pairs, dtype=np.int32).T
    count = int(max(one.max(), two.max())) + 1
    ends = np.concatenate([one, two]), np.concatenate([two, one])
    graph = coo_array((np.ones(len(ends[0])), ends), shape=(count, count)).tocsr()
    place = np.empty(count, np.int64)
    place[reverse_cuthill_mckee(graph, symmetric_mode=True)] = np.arange(count)
    return sorted(pairs, key=lambda pair: sorted((int(place[pair[0]]), int(place[pair[1]]))))


@dataclass(slots=True, kw_only=True, frozen=True)
class GreyFilm:
    """A clip made small: every frame of its first ``MOST`` s, grey uint8 [T,h,w], h at most ``HEIGHT``, and when each is shown, in
    seconds [T]."""

    frames_THW: NDArray[np.uint8]
    times_T: NDArray[np.float64]

    def near(self, times: NDArray[np.float64]) -> NDArray[np.intp]:
        """Number of the frame nearest to each time."""
        after = np.clip(np.searchsorted(self.times_T, times), 1, max(1, len(self.times_T) - 1))
        after = np.minimum(after, len(self.times_T) - 1)
        before = np.maximum(after - 1, 0)
        return np.where(times - self.times_T[before] <= self.times_T[after] - times, before, after)

    def resized(self, size: tuple[int, ...]) -> GreyFilm:
        if self.frames_THW.shape[1:] == size:
            return self
        return GreyFilm(frames_THW=_resized(self.frames_THW, size), times_T=self.times_T)


def grey_film(span: Span) -> GreyFilm:
    """Read from the file as it is now; the last ones are remembered, up to ``REMEMBERED`` bytes. ``DatasetError`` as ``SpanReader``."""
    state = span.path.stat() if os.path.isfile(span.path) else None
    key = span, state and (state.st_mtime_ns, state.st_size)
    film = _films.pop(key, None) or _read_film(span)
    _films[key] = film  # the newest is last
    while len(_films) > 2 and sum(one.frames_THW.nbytes for one in _films.values()) > REMEMBERED:
        del _films[next(iter(_films))]
    return film


_films: dict[tuple[Span, tuple[int, int] | None], GreyFilm] = {}


def _read_film(span: Span) -> GreyFilm:
    import cv2
    from av.video.reformatter import Interpolation, VideoReformatter

    reformatter, frames, times = VideoReformatter(), [], []
    flags = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
    with SpanReader(span) as reader:
        height = max(16, min(HEIGHT, reader.header.height))
        size = height, max(16, round(height * reader.header.width / reader.header.height))
        for time, frame in reader.frames():
            if time > MOST:
                break
            grey = reformatter.reformat(frame, format="gray", interpolation=flags, threads=1).to_ndarray()
            frames.append(cv2.resize(grey, size[::-1], interpolation=cv2.INTER_AREA))
            times.append(time)
    return GreyFilm(frames_THW=np.stack(frames), times_T=np.array(times))


def likeness(a: Span, b: Span, shift: float) -> float:
    """How much two clips are one recording: 0 to 1.

    Brightness and contrast do not count. The time shift (up to ``shift`` s) and the affine change of the picture that fit best are
    taken out; then it is the smaller of two correlations, that of what stands (medians over time) and that of what moves (differences
    from them). Where the first comparison is hopeless it is that one's correlation.
    """
    one, two = grey_film(a), grey_film(b)
    size = min(one.frames_THW.shape[1:], two.frames_THW.shape[1:])  # no finer than both are
    one, two = (film.resized(size) for film in (one, two))
    matrix = _guess(one.frames_THW.mean(0, np.float32), two.frames_THW.mean(0, np.float32))
    for _ in range(2):  # a better place in the picture finds a better time, and the other way round
        rows_one, rows_two, coarse = _best_shift(one, two, matrix, shift)
        if coarse < HOPEFUL:
            return max(0.0, coarse)
        film_one, film_two = (f.frames_THW[r].astype(np.float32) for f, r in ((one, rows_one), (two, rows_two)))
        refined = _refined(film_one.mean(0), film_two.mean(0), matrix)
        if refined is None:
            return HOPEFUL
        matrix = refined
    film_two = np.stack([_warped(frame, matrix) for frame in film_two])
    inside = np.isfinite(film_two[0])
    x, y = _same_light(film_one[:, inside], film_two[:, inside])
    still_x, still_y = np.median(x, 0), np.median(y, 0)
    return max(0.0, min(_correlation(still_x, still_y), _correlation(x - still_x, y - still_y)))


def _same_light(one_TN: NDArray[np.float32], two_TN: NDArray[np.float32]) -> tuple[NDArray, NDArray]:
    """Both at the brightness and contrast of the second, cut off where either is: a brighter copy has lost what was nearly white."""
    sound = (one_TN < WHITE) & (one_TN > BLACK) & (two_TN < WHITE) & (two_TN > BLACK)
    x, y = one_TN[sound].astype(np.float64), two_TN[sound].astype(np.float64)
    spread = float(((x - x.mean()) ** 2).sum()) if len(x) > 1 else 0.0
    gain = float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread > 0 else 0.0
    if gain <= 0:
        return one_TN, two_TN
    lift = float(y.mean() - gain * x.mean())
    low, high = max(BLACK, gain * BLACK + lift), min(WHITE, gain * WHITE + lift)
    return np.clip(gain * one_TN + lift, low, high), np.clip(two_TN, low, high)


def _guess(one_HW: NDArray[np.float32], two_HW: NDArray[np.float32]) -> NDArray[np.float32]:
    """Where the second picture lies in the first, roughly: the same picture, or either of the two a part of the other."""
    return max(_guesses(one_HW.shape), key=lambda matrix: _fit(one_HW, two_HW, matrix))


@lru_cache(maxsize=16)
def _guesses(size: tuple[int, int]) -> list[NDArray[np.float32]]:
    height, width = size
    found = [np.eye(2, 3, dtype=np.float32)]
    for share in CROPS:
        for down in (0.0, 0.5, 1.0):
            for right in (0.0, 0.5, 1.0):
                left, top = right * (1 - share) * width, down * (1 - share) * height
                part = np.array([[share, 0, left], [0, share, top]], np.float32)
                whole = np.array([[1 / share, 0, -left / share], [0, 1 / share, -top / share]], np.float32)
                found += [part, whole]
    return found


def _fit(one_HW: NDArray[np.float32], two_HW: NDArray[np.float32], matrix: NDArray[np.float32]) -> float:
    """Correlation of two pictures where the second, taken by ``matrix``, covers the first."""
    warped = _warped(two_HW, matrix)
    inside = np.isfinite(warped)
    return _correlation(one_HW[inside], warped[inside])


def _best_shift(
    one: GreyFilm, two: GreyFilm, guess: NDArray[np.float32], most: float
) -> tuple[NDArray[np.intp], NDArray[np.intp], float]:
    """Frames of each that are shown at one time where they fit best, and the correlation of what moves in them, coarsely (-1: no fit)."""
    size = one.frames_THW.shape[1] // COARSE, one.frames_THW.shape[2] // COARSE
    place = guess.copy()
    place[:, 2] /= COARSE
    films = [_resized(film.frames_THW, size).astype(np.float32) for film in (one, two)]
    films[1] = np.stack([_warped(frame, place) for frame in films[1]])
    inside = np.isfinite(films[1][0])
    small = [film[:, inside] for film in films]
    moving = [film - np.median(film, 0) for film in small]
    grid = np.arange(0.0, one.times_T[-1] + 1e-6, 1 / RATE)
    rows = one.near(grid)
    needed = max(1.0, OVERLAP * RATE * min(one.times_T[-1], two.times_T[-1]))
    best: tuple[NDArray[np.intp], NDArray[np.intp], float] = (rows[:0], rows[:0], -1.0)
    for late in np.arange(-most, most + STEP / 2, STEP):
        there = one.times_T[rows] - late
        common = (there >= -STEP) & (there <= two.times_T[-1] + STEP)
        if common.sum() >= needed:
            other = two.near(there[common])
            found = _correlation(moving[0][rows[common]], moving[1][other])
            if found > best[2] + 1e-9:
                best = rows[common], other, found
    return best


def _refined(
    one_HW: NDArray[np.float32], two_HW: NDArray[np.float32], guess: NDArray[np.float32]
) -> NDArray[np.float32] | None:
    """The affine change that takes the second picture to the first, None where no plausible one is found.

    Maximising their correlation may end in a place that is worse than where it began, in one direction more than in the other: the best of
    both and of the ``guess`` is taken.
    """
    there, back = _aligned(one_HW, two_HW, guess), _aligned(two_HW, one_HW, _inverse(guess))
    reached = [matrix for matrix in (there, None if back is None else _inverse(back)) if matrix is not None]
    found = [matrix for matrix in reached if _plausible(matrix, one_HW.shape)]
    if not found:  # two different scenes
        return None
    return max((guess, *found), key=lambda matrix: _fit(one_HW, two_HW, matrix))


def _plausible(matrix: NDArray[np.float32], size: tuple[int, ...]) -> bool:
    """Whether copies are moved and scaled as much: at most 0.3 of a side, and to 0.4 to 1.6 times the area."""
    height, width = size
    far = (np.abs(matrix[:, 2]) > (0.3 * width, 0.3 * height)).any()
    return not far and abs(np.linalg.det(matrix[:, :2]) - 1) <= 0.6


def _aligned(
    one_HW: NDArray[np.float32], two_HW: NDArray[np.float32], guess: NDArray[np.float32]
) -> NDArray[np.float32] | None:
    """Where enhanced correlation coefficients (ECC) lead from ``guess``, None where they do not converge."""
    import cv2

    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 60, 1e-5)
    try:
        _, matrix = cv2.findTransformECC(one_HW, two_HW, guess.copy(), cv2.MOTION_AFFINE, stop, None, 3)
    except cv2.error:
        return None
    return matrix if abs(np.linalg.det(matrix[:, :2])) > 1e-3 else None


def _inverse(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    import cv2

    return cv2.invertAffineTransform(matrix).astype(np.float32)


def _warped(picture_HW: NDArray[np.float32], matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """The picture taken by ``matrix``, NaN where it has no pixels."""
    import cv2

    size, flags = picture_HW.shape[::-1], cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    out: NDArray[np.float32] = cv2.warpAffine(picture_HW, matrix, size, flags=flags, borderValue=float("nan"))
    return out


def _resized(film_THW: NDArray, size: tuple[int, ...]) -> NDArray:
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
