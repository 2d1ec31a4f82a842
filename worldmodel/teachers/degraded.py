"""Exact tracks made as bad as a learned tracker's: what do the losses lose when the teacher errs?

The kinds of error are those that learned trackers make: jitter of each frame, drift that grows with time, points that hop onto
something else and stay there, wrong visibility. The default magnitudes are assumptions, chosen to be clearly worse than sub-pixel
and far from useless; ``benchmarks/trackers.py`` prints what they amount to on simulator clips.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from physisforcing.core.errors import UserError
from physisforcing.core.types import PointTracks


@dataclass(slots=True, kw_only=True)
class Degradation:
    """Magnitudes, in pixels of a 240x320 picture (scaled with the picture's height).

    ``jitter_px``: standard deviation of each frame's error per axis; ``drift_px``: of the step of a random walk per frame and
    axis. ``lost``: share of points that hop once, at a random time, by ``hop_px`` (standard deviation per axis) and keep that offset.
    ``missed``: share of visible (point, frame) pairs said to be hidden; ``imagined``: of hidden ones said to be visible.
    """

    jitter_px: float = 0.5
    drift_px: float = 0.15
    lost: float = 0.05
    hop_px: float = 12.0
    missed: float = 0.05
    imagined: float = 0.1

    def __post_init__(self) -> None:
        for name in ("jitter_px", "drift_px", "hop_px"):
            if not getattr(self, name) >= 0:
                raise UserError(
                    f"degradation.{name}", got=getattr(self, name), wanted="0 or more", fix="use 0 for none"
                )
        for name in ("lost", "missed", "imagined"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"degradation.{name}", got=getattr(self, name), wanted="a share", fix="use 0 for none")


def degraded(tracks: PointTracks, generator: np.random.Generator, magnitude: Degradation | None = None) -> PointTracks:
    """``tracks`` with errors; the query frame stays exact, as a tracker is given it."""
    magnitude = magnitude or Degradation()
    frames, points = tracks.visible_TN.shape
    unit = tracks.size[0] / 240
    error = generator.normal(0, magnitude.jitter_px, (frames, points, 2))
    error += generator.normal(0, magnitude.drift_px, (frames, points, 2)).cumsum(0)
    hops = generator.random(points) < magnitude.lost
    when = generator.integers(1, max(2, frames), points)
    offset = generator.normal(0, magnitude.hop_px, (points, 2))
    error += (np.arange(frames)[:, None] >= when)[..., None] * hops[None, :, None] * offset
    error[0] = 0
    flipped = generator.random((frames, points))
    visible = np.where(tracks.visible_TN, flipped >= magnitude.missed, flipped < magnitude.imagined)
    visible[0] = tracks.visible_TN[0]
    moved = (tracks.points_TN2 + unit * error).astype(np.float32)
    return dataclasses.replace(tracks, points_TN2=moved, visible_TN=visible, teacher="degraded")
