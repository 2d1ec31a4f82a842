"""How good stated probabilities are: balanced accuracy, expected calibration error, and a temperature that calibrates logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Equal-width bins of the expected calibration error.
BINS = 10


def balanced_accuracy(probability_N: ArrayLike, truth_N: ArrayLike, *, threshold: float = 0.5) -> float:
    """Mean of the shares of positives and of negatives that are on the right side of ``threshold``; NaN unless there are both."""
    probability, truth = np.asarray(probability_N, np.float64), np.asarray(truth_N, bool)
    if truth.all() or not truth.any():
        return float("nan")
    said = probability >= threshold
    return float((said[truth].mean() + (~said[~truth]).mean()) / 2)


def expected_calibration_error(probability_N: ArrayLike, truth_N: ArrayLike, *, bins: int = BINS) -> float:
    """Mean over the samples of |share of positives - mean probability| of their bin (Naeini et al. 2015); NaN without samples."""
    probability, truth = np.asarray(probability_N, np.float64), np.asarray(truth_N, np.float64)
    if not len(probability):
        return float("nan")
    place = np.minimum((probability * bins).astype(int), bins - 1)
    gaps = [abs(truth[place == k].sum() - probability[place == k].sum()) for k in range(bins)]
    return float(np.sum(gaps) / len(probability))


def negative_log_likelihood(logit_N: NDArray[np.float64], truth_N: NDArray[np.bool_]) -> float:
    """Mean of -log p of what is true, in nats; logits of any size."""
    return float(np.logaddexp(0.0, np.where(truth_N, -logit_N, logit_N)).mean())


def fit_temperature(logit_N: ArrayLike, truth_N: ArrayLike) -> float:
    """The T in [0.05, 20] for which sigmoid(logit / T) has the least negative log likelihood (Guo et al. 2017), within 0.1 %.

    The likelihood is convex in 1/T, so a search that narrows round the best point of a grid finds the minimum. 1 unless there
    are both positives and negatives.
    """
    logit, truth = np.asarray(logit_N, np.float64), np.asarray(truth_N, bool)
    if truth.all() or not truth.any():
        return 1.0
    low, high = np.log(0.05), np.log(20.0)
    while high - low > 1e-3:
        grid = np.linspace(low, high, 21)
        best = int(np.argmin([negative_log_likelihood(logit / np.exp(t), truth) for t in grid]))
        low, high = grid[max(0, best - 1)], grid[min(20, best + 1)]
    return float(np.exp((low + high) / 2))
