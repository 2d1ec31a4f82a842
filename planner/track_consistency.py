"""Whether things in an imagined video keep their identity: points are tracked there and back, and must not vanish into nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .verifiers import VerifierInput, wanted_frames

#: Height in pixels at which videos are tracked, and the distance between the points of the grid.
HEIGHT, GRID_PX = 120, 6
#: A point further than this from where it was has moved.
MOVED_PX = 1.5
#: Where something covers a point, one of its own points is at most so far away: a grid's diagonal.
NEAR_PX = GRID_PX * np.sqrt(2)
#: Errors there and back count up to this, and so much does a point cost that vanishes.
WORST_PX = 8.0
#: Points that are taken to be right beforehand, so that a handful of lost points on a video that hardly moves weighs little.
PRIOR_POINTS = 30


@dataclass(slots=True, kw_only=True)
class Consistency:
    """``error_px``: mean distance from their start of the points that were followed to the end and back, of those that moved.
    ``vanished``, ``appeared``: points that are lost on the way, forwards and backwards, with nothing that covers them.
    ``moved``: points that moved and were found at the end."""

    error_px: float
    vanished: int
    appeared: int
    moved: int

    @property
    def score(self) -> float:
        """In pixels of a picture ``HEIGHT`` high, at most 0: minus the mean error of the points that matter, lost ones as ``WORST_PX``."""
        lost = self.vanished + self.appeared
        return -(self.error_px * self.moved + WORST_PX * lost) / (PRIOR_POINTS + self.moved + lost)


@dataclass(slots=True, kw_only=True, frozen=True)
class TrackConsistency:
    """``Consistency.score`` of each imagined video (at most 0, in pixels). About a second a video on one core.

    A video in which nothing moves is perfectly consistent: this judges what moves, not whether it should.
    """

    needs: frozenset[str] = field(default=frozenset({"frames"}))
    fingerprint: str = "track-consistency"

    def score(self, given: VerifierInput) -> NDArray[np.float64]:
        return np.array([track_there_and_back(video).score for video in wanted_frames(given)])


def track_there_and_back(video_THWC: NDArray[np.uint8]) -> Consistency:
    """Follow a grid from the first frame to the last, and the last frame's grid and the found points back again.

    A point that is lost on the way is explained where something covers it that came from elsewhere: where the points of the last
    frame round its place were elsewhere in the first one. Likewise backwards: what appears was hidden by something that has left.
    Cameras stand still (see ``worldmodel.teachers.classical``).
    """
    small = _small(video_THWC)
    grid_N2 = _grid(*small.shape[1:3])
    there_N2, seen_N = _follow(small, grid_N2)
    found = there_N2[seen_N]
    back_M2, seen_M = _follow(small[::-1], np.concatenate([grid_N2, found]))
    back_N2, from_start_N = back_M2[: len(grid_N2)], seen_M[: len(grid_N2)]
    inside_N, inside_back_N = _inside(there_N2, small), _inside(back_N2, small)
    moved_N = np.linalg.norm(there_N2 - grid_N2, axis=1) > MOVED_PX
    error_K = np.linalg.norm(back_M2[len(grid_N2) :] - grid_N2[seen_N], axis=1)
    # A point that is lost on the way back closes as badly as can be.
    error_K = np.where(seen_M[len(grid_N2) :], np.minimum(error_K, WORST_PX), WORST_PX)[moved_N[seen_N]]
    # What came from elsewhere, also from beyond the picture, and what went elsewhere.
    came_N = (np.linalg.norm(back_N2 - grid_N2, axis=1) > MOVED_PX) & (from_start_N | ~inside_back_N)
    left_N = moved_N & (seen_N | ~inside_N)
    vanished_N = ~seen_N & inside_N & ~_near(there_N2, grid_N2[came_N]) & ~_near(grid_N2, grid_N2[came_N])
    appeared_N = ~from_start_N & inside_back_N & ~_near(back_N2, grid_N2[left_N]) & ~_near(grid_N2, grid_N2[left_N])
    return Consistency(
        error_px=float(error_K.mean()) if len(error_K) else 0.0,
        vanished=int(vanished_N.sum()),
        appeared=int(appeared_N.sum()),
        moved=len(error_K),
    )


def _follow(video_THWC: NDArray[np.uint8], query_N2: NDArray[np.float32]) -> tuple[NDArray, NDArray[np.bool_]]:
    """Where the points of the first frame are in the last one [N,2], and whether they are seen there [N]."""
    import torch

    from physisforcing.worldmodel.teachers.classical import ClassicalTracker

    if not len(query_N2):
        return query_N2, np.zeros(0, bool)
    video = torch.from_numpy(np.ascontiguousarray(video_THWC))[None]
    tracks = ClassicalTracker().track(video, torch.from_numpy(query_N2.astype(np.float32))[None])
    return tracks.points_BTN2[0, -1].numpy(), tracks.visible_BTN[0, -1].numpy()


def _near(points_N2: NDArray, others_M2: NDArray) -> NDArray[np.bool_]:
    """Whether one of the others is within ``NEAR_PX`` of each point: [N]."""
    if not len(others_M2):
        return np.zeros(len(points_N2), bool)
    distance_NM = np.linalg.norm(points_N2[:, None] - others_M2[None], axis=-1)
    return np.asarray(distance_NM.min(axis=1) <= NEAR_PX)


def _inside(points_N2: NDArray, video_THWC: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Away from the border, where things come and go."""
    height, width = video_THWC.shape[1:3]
    low, high = GRID_PX, np.array([width, height]) - 1 - GRID_PX
    return np.asarray(((points_N2 >= low) & (points_N2 <= high)).all(axis=1))


def _grid(height: int, width: int) -> NDArray[np.float32]:
    ys, xs = np.mgrid[GRID_PX // 2 : height : GRID_PX, GRID_PX // 2 : width : GRID_PX]
    return np.stack([xs.ravel(), ys.ravel()], axis=-1).astype(np.float32)


def _small(video_THWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """At most ``HEIGHT`` high, averaged by area."""
    import cv2

    height, width = video_THWC.shape[1:3]
    if height <= HEIGHT:
        return video_THWC
    size = (max(16, round(width * HEIGHT / height)), HEIGHT)
    return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in video_THWC])
