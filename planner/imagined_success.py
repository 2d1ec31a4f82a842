"""Does an imagination that looks like success end in success? Probabilities of a success classifier against what happened."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError
from physisforcing.core.executed import ExecutedChunk
from physisforcing.core.stats import MIN_VALUES, mean_of_proportions, wilson
from physisforcing.core.types import DT

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
    success_low: float | None
    success_high: float | None


@dataclass(slots=True, kw_only=True)
class ImaginedSuccess:
    """``n`` episodes with an outcome and a probability, ``missing`` without one of them.

    ``sensitivity``: share of successes called success, ``specificity``: of failures called failure, at ``threshold``; their mean is
    ``balanced_accuracy`` (.5 is chance) with its 95 % interval. ``ece``: expected calibration error over equal bins, ``brier``: mean
    squared error of the probability, ``brier_base``: what the rate of success alone would score. What one class alone cannot show is
    None, and ``note`` says so. The unit is an episode, or every chunk's end: then chunks of one episode are not independent, the interval
    is a bootstrap over episodes, and bins have none.
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
    probabilities: Sequence[float | None],
    outcomes: Sequence[bool | None],
    *,
    threshold: float = 0.5,
    episodes: Sequence[Hashable] | None = None,
) -> ImaginedSuccess:
    """``probabilities[i]`` that imagination i shows success; None where no classifier ran, or no outcome is known. ``episodes``: which
    episode each belongs to, where one has several.

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
    if won and lost and episodes is not None:
        known = zip(probabilities, outcomes, episodes, strict=True)
        names = [name for p, o, name in known if p is not None and o is not None]
        low, high = _over_episodes(called_N, o_N, names)
    bins = _bins(p_N, o_N, intervals=episodes is None)
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
        note=_note(won, lost, "episodes" if episodes is None else "chunks"),
    )


def chunk_end(
    frames_THWC: NDArray[np.uint8], times_T: NDArray[np.float64], chunk: ExecutedChunk
) -> tuple[NDArray[np.uint8], bool] | None:
    """What was imagined of an executed chunk up to its end, and whether the task was done then; None with fewer than two pictures.

    An imagination that goes on beyond the last executed step is cut there, unless the task was done: that does not change any more.
    """
    done = bool(chunk.success_T[-1])
    within_T = times_T <= chunk.steps * DT + 1e-6
    shown = frames_THWC if done else frames_THWC[within_T]
    return (shown, done) if len(shown) > 1 else None


def _over_episodes(
    called_N: NDArray[np.bool_], o_N: NDArray[np.bool_], names: Sequence[Hashable], *, resamples: int = 4000
) -> tuple[float | None, float | None]:
    """95 % bootstrap interval of the balanced accuracy over episodes; None for fewer than three or where no resample differs."""
    places = {name: i for i, name in enumerate(dict.fromkeys(names))}
    if len(places) < MIN_VALUES:
        return None, None
    of_N = np.array([places[name] for name in names])
    kinds = (called_N & o_N, o_N, ~called_N & ~o_N, ~o_N)
    counts_4E = np.stack([np.bincount(of_N, weights=kind, minlength=len(places)) for kind in kinds])
    drawn_RE = np.random.default_rng(len(names)).integers(0, len(places), (resamples, len(places)))
    hits_R, won_R, right_R, lost_R = counts_4E[:, drawn_RE].sum(-1)
    both_R = (won_R > 0) & (lost_R > 0)
    value_R = (hits_R[both_R] / won_R[both_R] + right_R[both_R] / lost_R[both_R]) / 2
    if not len(value_R) or np.ptp(value_R) == 0:
        return None, None
    low, high = np.quantile(value_R, [0.025, 0.975])
    return float(low), float(high)


def _note(won: int, lost: int, unit: str) -> str:
    if not won + lost:
        return "No episode has both a probability and an outcome."
    if won and lost:
        return ""
    same = "succeeded" if won else "failed"
    unseen = "failures" if won else "successes"
    return f"All {won + lost} {unit} {same}: there are no {unseen}, so balanced accuracy is not defined."


def _bins(p_N: np.ndarray, o_N: np.ndarray, *, intervals: bool) -> list[ReliabilityBin]:
    """Bins that hold an episode; a probability of 1 belongs to the last."""
    place_N = np.minimum((p_N * BINS).astype(int), BINS - 1)
    found = []
    for place in np.unique(place_N):
        inside = place_N == place
        n, won = int(inside.sum()), int(o_N[inside].sum())
        low, high = wilson(won, n) if intervals else (None, None)
        found.append(
            ReliabilityBin(
                low=float(place) / BINS, high=float(place + 1) / BINS, n=n, probability=float(p_N[inside].mean()),
                success=won / n, success_low=low, success_high=high,
            )
        )  # fmt: skip
    return found
