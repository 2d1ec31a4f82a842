"""How points on one body moved in the picture: the turn, scaling and shift that most of them agree on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Pairs of points closer than this, in pixels, do not fix an angle.
SHORTEST_PX = 3.0
#: Points from which pairs are drawn, evenly over the list: all pairs of so many are tried.
MOST_POINTS = 48


@dataclass(slots=True, kw_only=True)
class Similarity:
    """``x + iy -> turn * (x + iy) + shift``; ``inliers_N``: the points that follow it within the tolerance."""

    turn: complex
    shift: complex
    inliers_N: NDArray[np.bool_]

    @property
    def degrees(self) -> float:
        """Rotation in the picture, -180..180; with y downwards positive is clockwise."""
        return float(np.degrees(np.angle(self.turn)))

    def apply(self, points_N2: NDArray[np.floating]) -> NDArray[np.float64]:
        moved = self.turn * _complex(points_N2) + self.shift
        return np.stack([moved.real, moved.imag], -1)


def fit_similarity(
    before_N2: NDArray[np.floating], after_N2: NDArray[np.floating], known_N: NDArray[np.bool_], *, tolerance_px: float
) -> Similarity | None:
    """The similarity that most of the ``known_N`` points follow within ``tolerance_px``, refined by least squares on those.

    All pairs of up to 48 points are tried, so nothing is drawn and half of the points may be wrong. None where no pair is left.
    """
    before, after = _complex(before_N2), _complex(after_N2)
    places = np.flatnonzero(known_N)
    if len(places) < 2:
        return None
    sampled = places[np.unique(np.linspace(0, len(places) - 1, min(len(places), MOST_POINTS)).round().astype(int))]
    first, second = (sampled[i] for i in np.triu_indices(len(sampled), 1))
    apart = np.abs(before[second] - before[first]) >= SHORTEST_PX
    first, second = first[apart], second[apart]
    if not len(first):
        return None
    turn_K = (after[second] - after[first]) / (before[second] - before[first])
    shift_K = after[first] - turn_K * before[first]
    residual_KN = np.abs(turn_K[:, None] * before[places] + shift_K[:, None] - after[places])
    # Beyond the tolerance every point costs the same: the count decides first, closeness among equals.
    best = int(np.minimum(residual_KN, tolerance_px).sum(1).argmin())
    turn, shift = complex(turn_K[best]), complex(shift_K[best])
    for _ in range(2):
        inliers_N = known_N & (np.abs(turn * before + shift - after) <= tolerance_px)
        if inliers_N.sum() < 2:
            return None
        turn, shift = _least_squares(before[inliers_N], after[inliers_N])
    inliers_N = known_N & (np.abs(turn * before + shift - after) <= tolerance_px)
    return Similarity(turn=turn, shift=shift, inliers_N=inliers_N)


def _least_squares(before: NDArray[np.complex128], after: NDArray[np.complex128]) -> tuple[complex, complex]:
    centre_before, centre_after = before.mean(), after.mean()
    spread = before - centre_before
    size = float((np.abs(spread) ** 2).sum())
    turn = complex((np.conj(spread) * (after - centre_after)).sum() / size) if size > 0 else 1.0 + 0.0j
    return turn, complex(centre_after - turn * centre_before)


def _complex(points_N2: NDArray[np.floating]) -> NDArray[np.complex128]:
    points = np.asarray(points_N2, np.float64)
    return np.asarray(points[..., 0] + 1j * points[..., 1])
