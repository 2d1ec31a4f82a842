"""Exact tracks made as wrong as a learned tracker's: what training loses by its teacher's errors, measured without that teacher.

The kinds of error (drift, jitter, wrong visibility, points that jump to something else and stay there) are those of point
trackers. Their default magnitudes are our assumption, not a measurement of CoTracker3: they are set so that the share of visible
points within 1, 2, 4, 8 and 16 pixels of a 256x256 picture, averaged over the five (TAP-Vid's delta_avg), lies near the 78.0 %
(RoboTAP) and 85.0 % (RGB-Stacking) that the README of facebookresearch/co-tracker gives for CoTracker3 offline. Those videos are
longer than a training window, where real errors should be smaller. The rates of wrong visibility follow no published figure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError
from physisforcing.core.types import PointTracks

#: Height of the picture in whose pixels ``TrackErrors`` are given.
HEIGHT = 240


@dataclass(slots=True, kw_only=True)
class TrackErrors:
    """Magnitudes, lengths in pixels of a picture 240 high (other sizes are scaled).

    ``drift_px``: standard deviation per axis of a random walk's step from frame to frame. ``jitter_px``: standard deviation per
    axis of an error that every frame draws anew. ``false_hidden``, ``false_visible``: share of the seen frames of a point called
    hidden, of the hidden ones called visible, each frame by itself. ``failures``: share of points that jump, at a frame drawn
    evenly from all but the first, to the visible point nearest to them on another body (or on any, where there is none) and
    follow that one until the end, its visibility included.
    """

    drift_px: float = 0.35
    jitter_px: float = 0.5
    false_hidden: float = 0.05
    false_visible: float = 0.2
    failures: float = 0.1


def degrade(tracks: PointTracks, generator: np.random.Generator, errors: TrackErrors | None = None) -> PointTracks:
    """Tracks with ``teacher="degraded"`` and the bodies and depths of the exact ones; frame 0 keeps its queries and flags.

    Raises ``UserError`` for a negative length or a share outside [0, 1].
    """
    errors = errors or TrackErrors()
    _check(errors)
    points = tracks.points_TN2.astype(np.float64)
    visible = tracks.visible_TN.copy()
    frames, count = visible.shape
    # Everything is drawn before anything depends on the magnitudes: equal seeds give equal places of failure at all of them.
    step, white = generator.normal(size=(2, frames, count, 2))
    flip = generator.random((frames, count))
    fails = generator.random(count) < errors.failures
    since = 1 + (generator.random(count) * max(frames - 1, 0)).astype(np.int64)
    if frames > 1:
        for point in np.flatnonzero(fails):
            start = since[point]
            other = _nearest_other(tracks, int(start), int(point))
            if other is not None:
                points[start:, point] = tracks.points_TN2[start:, other]
                visible[start:, point] = tracks.visible_TN[start:, other]
    step[0] = white[0] = 0.0
    scale = tracks.size[0] / HEIGHT
    points += scale * (errors.drift_px * np.cumsum(step, axis=0) + errors.jitter_px * white)
    wrong = flip < np.where(visible, errors.false_hidden, errors.false_visible)
    wrong[0] = False
    return replace(tracks, points_TN2=points.astype(np.float32), visible_TN=visible ^ wrong, teacher="degraded")


def _nearest_other(tracks: PointTracks, frame: int, point: int) -> int | None:
    """The point that a tracker which has lost ``point`` in ``frame`` would follow; None where no other is visible."""
    candidates = tracks.visible_TN[frame].copy()
    candidates[point] = False
    elsewhere = candidates & (tracks.body_N != tracks.body_N[point])
    candidates = elsewhere if elsewhere.any() else candidates
    if not candidates.any():
        return None
    distance: NDArray[np.float32] = np.linalg.norm(tracks.points_TN2[frame] - tracks.points_TN2[frame, point], axis=-1)
    return int(np.argmin(np.where(candidates, distance, np.inf)))


def _check(errors: TrackErrors) -> None:
    for name in ("drift_px", "jitter_px"):
        if not 0 <= (length := getattr(errors, name)) < np.inf:
            raise UserError(name, got=length, wanted="a length of 0 or more", fix=f"write {name}=0.5, for example")
    for name in ("false_hidden", "false_visible", "failures"):
        if not 0 <= (share := getattr(errors, name)) <= 1:
            raise UserError(name, got=share, wanted="a share in [0, 1]", fix=f"write {name}=0.05, for example")
