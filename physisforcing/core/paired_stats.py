"""Paired comparisons: proportions on the same episodes, sign flips, and training seeds as the unit; numpy and the standard library."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .stats import MIN_VALUES, all_equal, wilson

#: Up to this many pairs all sign flips are counted (2^16); beyond, they are drawn. So with regroupings of two groups.
EXACT_PAIRS, EXACT_REGROUPINGS = 16, 20_000
#: Flips or regroupings that are drawn.
DRAWS = 9_999


def paired_proportions(both: int, only_a: int, only_b: int, neither: int) -> tuple[float, float, float]:
    """Difference of two success rates (A minus B) on the same episodes and its 95 % interval.

    Newcombe's method 10 (Statistics in Medicine 17, 1998): Wilson intervals of both rates, squared and added with their correlation.
    Unlike a bootstrap it has a width where all episodes agree. ``ValueError`` without episodes.
    """
    n = both + only_a + only_b + neither
    if min(both, only_a, only_b, neither) < 0 or n == 0:
        raise ValueError(f"counts are >= 0 and not all 0, got {(both, only_a, only_b, neither)}")
    rate_a, rate_b = (both + only_a) / n, (both + only_b) / n
    (low_a, high_a), (low_b, high_b) = wilson(both + only_a, n), wilson(both + only_b, n)
    scale = math.sqrt(float((both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)))
    product = float(both * neither - only_a * only_b)
    # Newcombe's continuity correction of a positive correlation.
    product = max(product - n / 2, 0.0) if product > 0 else product
    phi = product / scale if scale else 0.0

    def width(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

    difference = rate_a - rate_b
    low = difference - width(rate_a - low_a, high_b - rate_b)
    high = difference + width(high_a - rate_a, rate_b - low_b)
    return difference, max(low, -1.0), min(high, 1.0)


def sign_flip_p(
    differences: Sequence[float], generator: np.random.Generator, *, draws: int = DRAWS
) -> tuple[float, bool]:
    """Two-sided p-value that the mean of paired differences is 0, and whether it is exact.

    Under the hypothesis each difference is as likely with the other sign. Up to 16 pairs all flips are counted, else ``draws`` are
    drawn and the one seen is added. ``ValueError`` without differences or with one that is not finite.
    """
    data = _finite(differences)
    seen, slack = abs(float(data.sum())), 1e-9 * float(np.abs(data).sum())
    if len(data) <= EXACT_PAIRS:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(data))))
        return float((np.abs(signs @ data) >= seen - slack).mean()), True
    count = 0
    for start in range(0, draws, 1000):
        signs = generator.integers(0, 2, (min(1000, draws - start), len(data))) * 2.0 - 1.0
        count += int((np.abs(signs @ data) >= seen - slack).sum())
    return (count + 1) / (draws + 1), False


def smallest_sign_flip_p(pairs: int, *, draws: int = DRAWS) -> float:
    """The smallest p-value that ``sign_flip_p`` can give for so many pairs: what all of one sign gives."""
    return 2 / 2**pairs if pairs <= EXACT_PAIRS else 1 / (draws + 1)


def paired_t(differences: Sequence[float], confidence: float = 0.95) -> tuple[float, float | None, float | None]:
    """Mean of paired differences and its Student t interval; None for fewer than ``MIN_VALUES`` or where all are equal, which is no
    reason to be certain. ``ValueError`` without differences."""
    data = _finite(differences)
    mean = float(data.mean())
    if len(data) < MIN_VALUES or all_equal(data):
        return mean, None, None
    half = student_t(confidence, len(data) - 1) * float(data.std(ddof=1)) / math.sqrt(len(data))
    return mean, mean - half, mean + half


def welch_t(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95
) -> tuple[float, float | None, float | None]:
    """Difference of two means (A minus B) and Welch's interval, for units that are no pairs; None for fewer than ``MIN_VALUES`` of
    either, and where neither varies. ``ValueError`` without values."""
    first, second = _finite(a), _finite(b)
    difference = float(first.mean() - second.mean())
    if min(len(first), len(second)) < MIN_VALUES or (all_equal(first) and all_equal(second)):
        return difference, None, None
    parts = [float(part.var(ddof=1)) / len(part) for part in (first, second)]
    variance = sum(parts)
    weights = sum(part**2 / (len(data) - 1) for part, data in zip(parts, (first, second), strict=True))
    half = student_t(confidence, variance**2 / weights) * math.sqrt(variance)
    return difference, difference - half, difference + half


def permutation_p_of_two(
    a: Sequence[float], b: Sequence[float], generator: np.random.Generator, *, draws: int = DRAWS
) -> tuple[float, bool]:
    """Two-sided p-value that two groups have one distribution, by their means, and whether all regroupings were counted (up to 20 000)."""
    first, second = _finite(a), _finite(b)
    pooled, size = np.concatenate([first, second]), len(first)
    seen = abs(float(first.mean() - second.mean()))
    slack = 1e-9 * float(np.abs(pooled).max() or 1.0)

    def difference(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        mean_a = pooled[rows].mean(1)
        mean_b: NDArray[np.float64] = (pooled.sum() - size * mean_a) / (len(pooled) - size)
        return np.abs(mean_a - mean_b)

    if math.comb(len(pooled), size) <= EXACT_REGROUPINGS:
        rows = np.array(list(itertools.combinations(range(len(pooled)), size)))
        return float((difference(rows) >= seen - slack).mean()), True
    rows = np.stack([generator.permutation(len(pooled))[:size] for _ in range(draws)])
    return (int((difference(rows) >= seen - slack).sum()) + 1) / (draws + 1), False


def smallest_permutation_p(size_a: int, size_b: int, *, draws: int = DRAWS) -> float:
    """The smallest p-value that ``permutation_p_of_two`` can give: groups that do not overlap; of equal size, their exchange too."""
    regroupings = math.comb(size_a + size_b, size_a)
    return (1 + (size_a == size_b)) / regroupings if regroupings <= EXACT_REGROUPINGS else 1 / (draws + 1)


def student_t(confidence: float, freedom: float) -> float:
    """The two-sided quantile: Student's t with ``freedom`` degrees of freedom (not only whole ones) stays below it with this chance.

    With t = sqrt(v) tan(angle) the density becomes cos(angle)^(v - 1), which Gauss-Legendre integrates; bisection over the angle.
    """
    if not 0 < confidence < 1 or freedom <= 0:
        raise ValueError(f"0 < confidence < 1 and freedom > 0, got {confidence} and {freedom}")
    nodes, weights = np.polynomial.legendre.leggauss(200)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(math.pi)

    def inside(angle: float) -> float:
        density = np.exp(log_scale + (freedom - 1) * np.log(np.cos(0.5 * angle * (nodes + 1))))
        return float(angle * (weights * density).sum())  # both halves of the symmetric density

    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if inside(middle) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(0.5 * (low + high))


def _finite(values: Sequence[float]) -> NDArray[np.float64]:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size == 0 or not np.isfinite(data).all():
        raise ValueError("wanted a non-empty list of finite numbers")
    return data
