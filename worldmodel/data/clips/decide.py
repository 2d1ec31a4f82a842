"""Which clips are kept, and why the others are not: measurements in, a reason a clip out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .alignment import LooksItself, PredictedAlignment, TextAlignment
from .config import ClipsConfig
from .duplicates import candidates, keep_best, reading_order
from .measure import Measured, stacked
from .sources import ClipSource

#: Reason -> what it means, in the order in which they are looked at; a clip has the first that holds.
REASONS = {
    "unreadable": "the video is missing or damaged",
    "no_caption": "there is no caption",
    "short": "shorter than min_seconds",
    "static": "hardly anything moves: motion below motion.least",
    "cut": "a cut between two shots: cut above motion.cut",
    "duplicate": "repeats a kept clip: likeness from duplicates.likeness on",
    "task_full": "its task has duplicates.per_task better clips",
    "misaligned": "caption and pictures disagree: alignment below alignment.least",
}
#: Cosine below which a caption is not what the clip's look lets one expect.
PREDICTED_LEAST = 0.32
#: Likeness of two clips, by their numbers.
Likeness = Callable[[int, int], float]


@dataclass(slots=True, kw_only=True)
class Decision:
    """``reason``: one of ``REASONS``, "" for a kept clip. ``scores``: what was looked at. ``original``: number of the clip that this
    one repeats, -1 for none. ``detail``: more, for people."""

    reason: str = ""
    detail: str = ""
    original: int = -1
    scores: dict[str, float] = field(default_factory=dict)


def decide(
    sources: Sequence[ClipSource],
    measured: Sequence[Measured],
    config: ClipsConfig,
    likeness: Likeness,
    alignment: TextAlignment | None = None,
    *,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> list[Decision]:
    """One ``Decision`` a clip. ``likeness(i, j)``: called for the candidates only, i < j, once each (``candidate_pairs``).

    ``alignment``: what scores captions (``PredictedAlignment``). ``pairs``: the candidates, where they are known already.
    """
    made = [_alone(source, one, config) for source, one in zip(sources, measured, strict=True)]
    rest = [i for i, decision in enumerate(made) if not decision.reason]
    pairs = candidate_pairs(sources, measured, config) if pairs is None else pairs
    same = _same(rest, made, measured, config, {pair: likeness(*pair) for pair in pairs})
    least = -np.inf
    if "alignment" in config.filters and rest:
        least = _align(rest, made, sources, measured, config, same, alignment)
    order = sorted(rest, key=lambda i: _rank(i, made[i], measured[i], least))
    for clip, original in keep_best(order, same).items():
        made[clip].reason, made[clip].original = "duplicate", original
    if config.duplicates.per_task and "duplicates" in config.filters:
        _limit_tasks(order, made, sources, config.duplicates.per_task)
    for i in rest:
        if not made[i].reason and made[i].scores.get("alignment", np.inf) < least:
            made[i].reason = "misaligned"
    return made


def candidate_pairs(
    sources: Sequence[ClipSource], measured: Sequence[Measured], config: ClipsConfig
) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of clips that may be one recording, in ``reading_order``; none without the filter. Clips that are dropped for
    what they are alone and second copies of a file are in none."""
    if "duplicates" not in config.filters:
        return []
    rest = [i for i, pair in enumerate(zip(sources, measured, strict=True)) if not _alone(*pair, config).reason]
    unique = sorted(_first_of_each(rest, measured).values())
    if len(unique) < 2:
        return []
    seen = stacked((measured[i] for i in unique), "appearance")
    return reading_order([(unique[a], unique[b]) for a, b in candidates(seen, config.duplicates.neighbours)])


def _first_of_each(clips: Sequence[int], measured: Sequence[Measured]) -> dict[str, int]:
    """Id of a file's piece -> the first clip that has it."""
    first: dict[str, int] = {}
    for i in clips:
        first.setdefault(measured[i].id, i)
    return first


def least_alignment(config: ClipsConfig) -> float:
    """The threshold in force."""
    if config.alignment.least is not None:
        return config.alignment.least
    return PREDICTED_LEAST


def _alone(source: ClipSource, one: Measured, config: ClipsConfig) -> Decision:
    """What a clip's own measurements say."""
    if one.error:
        return Decision(reason="unreadable", detail=one.error)
    scores = {"motion": one.motion, "cut": one.cut, "sharpness": one.sharpness}
    decision = Decision(scores=scores)
    if not source.caption:
        decision.reason = "no_caption"
    elif one.frames / one.fps < config.min_seconds:
        decision.reason, decision.detail = "short", f"{one.frames / one.fps:.2f} s"
    elif "motion" in config.filters and one.motion < config.motion.least:
        decision.reason, decision.detail = "static", f"motion {one.motion:.4f}"
    elif "motion" in config.filters and one.cut > config.motion.cut:
        decision.reason, decision.detail = "cut", f"cut {one.cut:.4f}"
    return decision


def _same(
    rest: list[int],
    made: list[Decision],
    measured: Sequence[Measured],
    config: ClipsConfig,
    likeness: Mapping[tuple[int, int], float],
) -> list[tuple[int, int]]:
    """Pairs of clips that are one recording. A copy of a file, known by its id, needs no comparison."""
    if "duplicates" not in config.filters:
        return []
    first, same = _first_of_each(rest, measured), []
    for i in rest:
        if (original := first[measured[i].id]) != i:
            same.append((original, i))
            made[i].scores["likeness"] = made[original].scores["likeness"] = 1.0
    for (i, j), value in sorted(likeness.items()):
        for clip in (i, j):
            made[clip].scores["likeness"] = max(value, made[clip].scores.get("likeness", 0.0))
        if value >= config.duplicates.likeness:
            same.append((i, j))
    return same


def _align(
    rest: list[int],
    made: list[Decision],
    sources: Sequence[ClipSource],
    measured: Sequence[Measured],
    config: ClipsConfig,
    same: list[tuple[int, int]],
    alignment: TextAlignment | None,
) -> float:
    """Fill in the alignment of every clip that is left, and return the threshold."""
    model = alignment or PredictedAlignment()
    seen = stacked((measured[i] for i in rest), "picture" if isinstance(model, LooksItself) else "scene")
    place = {clip: row for row, clip in enumerate(rest)}
    copies = [(place[a], place[b]) for a, b in same]
    for i, value in zip(rest, model.scores(seen, [sources[i].caption for i in rest], copies), strict=True):
        made[i].scores["alignment"] = float(value)
    return least_alignment(config)


def _rank(i: int, decision: Decision, one: Measured, least: float) -> tuple[bool, float, int, float, int]:
    """Better clips first: those whose caption fits, the longer, the larger, the sharper, the earlier in the input."""
    misaligned = decision.scores.get("alignment", np.inf) < least
    return misaligned, -round(one.frames / one.fps, 1), -one.height * one.width, -one.sharpness, i


def _limit_tasks(order: list[int], made: list[Decision], sources: Sequence[ClipSource], most: int) -> None:
    count: dict[str, int] = {}
    for i in order:
        if made[i].reason:
            continue
        task = sources[i].task or " ".join(sources[i].caption.lower().split())
        count[task] = count.get(task, 0) + 1
        if count[task] > most:
            made[i].reason, made[i].detail = "task_full", task
