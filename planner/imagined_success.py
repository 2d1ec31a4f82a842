"""Does an imagination that looks like success end in success? Probabilities of a success classifier against what happened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from physisforcing.core.errors import UserError
from physisforcing.core.stats import mean_of_proportions, wilson

#: Equal bins of probability for calibration.
BINS = 10


@dataclass(slots=True, kw_only=True)
class ReliabilityBin:
    """Episodes whose probability is in [low, high): mean probability, and the share that succeeded with its Wilson interval."""

    low: float
    high: float
    n: int
    probability: float
    success: float
    success_low: float
    success_high: float


@dataclass(slots=True, kw_only=True)
class ImaginedSuccess:
    """``n`` episodes with an outcome and a probability, ``missing`` without one of them.

    ``sensitivity``: share of successes called success, ``specificity``: of failures called failure, at ``threshold``; their mean is
    ``balanced_accuracy`` (.5 is chance) with its 95 % interval. ``ece``: expected calibration error over equal bins, ``brier``: mean
    squared error of the probability, ``brier_base``: what the rate of success alone would score. What one class alone cannot show is
    None, and ``note`` says so. The unit is an episode: chunks of one episode are not independent.
    """

    n: int
    missing: int
    successes: int
    threshold: float
    sensitivity: float | None
    specificity: float | None
    balanced_accuracy: float | None
    low: float | None
    high: float | None
    ece: float | None
    brier: float | None
    brier_base: float | None
    bins: list[ReliabilityBin]
    note: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def score_imagined_success(
    probabilities: Sequence[float | None], outcomes: Sequence[bool | None], *, threshold: float = 0.5
) -> ImaginedSuccess:
    """``probabilities[i]`` that the imagination of episode i shows success; None where no classifier ran, or no outcome is known.

    Raises ``UserError`` for lists of different lengths and probabilities outside 0..1.
    """
    if len(probabilities) != len(outcomes):
        got = f"{len(probabilities)} probabilities, {len(outcomes)} outcomes"
        raise UserError("probabilities", got=got, wanted="one an episode", fix="give None where there is none")
    pairs = [
        (float(p), bool(o)) for p, o in zip(probabilities, outcomes, strict=True) if p is not None and o is not None
    ]
    wrong = [p for p, _ in pairs if not 0 <= p <= 1]
    if wrong:
        raise UserError("probabilities", got=wrong[0], wanted="0 to 1", fix="give probabilities, not logits")
    p_N, o_N = np.array([p for p, _ in pairs]), np.array([o for _, o in pairs], bool)
    called_N = p_N >= threshold
    won, lost = int(o_N.sum()), int((~o_N).sum())
    hits, rejections = int((called_N & o_N).sum()), int((~called_N & ~o_N).sum())
    balanced, low, high = (None, None, None)
    if won and lost:
        balanced, low, high = mean_of_proportions([(hits, won), (rejections, lost)])
    bins = _bins(p_N, o_N)
    return ImaginedSuccess(
        n=len(pairs),
        missing=len(outcomes) - len(pairs),
        successes=won,
        threshold=threshold,
        sensitivity=hits / won if won else None,
        specificity=rejections / lost if lost else None,
        balanced_accuracy=balanced,
        low=low,
        high=high,
        ece=sum(b.n * abs(b.probability - b.success) for b in bins) / len(pairs) if pairs else None,
        brier=float(((p_N - o_N) ** 2).mean()) if pairs else None,
        brier_base=float((o_N.mean() - o_N).var()) if pairs else None,
        bins=bins,
        note=_note(won, lost),
    )


def _note(won: int, lost: int) -> str:
    if not won + lost:
        return "No episode has both a probability and an outcome."
    if won and lost:
        return ""
    same = "succeeded" if won else "failed"
    unseen = "failures" if won else "successes"
    return f"All {won + lost} episodes {same}: there are no {unseen}, so balanced accuracy is not defined."


def _bins(p_N: np.ndarray, o_N: np.ndarray) -> list[ReliabilityBin]:
    """Bins that hold an episode; a probability of 1 belongs to the last."""
    place_N = np.minimum((p_N * BINS).astype(int), BINS - 1)
    found = []
    for place in np.unique(place_N):
        inside = place_N == place
        n, won = int(inside.sum()), int(o_N[inside].sum())
        low, high = wilson(won, n)
        found.append(
            ReliabilityBin(
                low=float(place) / BINS, high=float(place + 1) / BINS, n=n, probability=float(p_N[inside].mean()),
                success=won / n, success_low=low, success_high=high,
            )
        )  # fmt: skip
    return found
