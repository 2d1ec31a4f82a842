"""What the controls say about a comparison, in sentences, and how much imaginations depend on actions and instructions.

A difference of success is decided by its paired 95 % interval, not adjusted for how many sentences there are: beyond 0 it is shown,
within ``MARGIN`` the two are equal, and anything else is undecided. That no difference was found is never said to be equality.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from physisforcing.core.results import count
from physisforcing.core.stats import bootstrap_mean, wilson

from .comparison_rows import EpisodeOutcome, PairedSuccess
from .comparison_table import EpisodeTable

#: Success rates that differ by no more than this (10 points) count as equal; the whole interval of the difference must lie within.
MARGIN = 0.10
FEW = "n too small to say"
#: Scores of the control ``other``: RMSE in degrees between decoded targets and those of the own and of the other episode.
TO_OWN, TO_OTHER = "joint_deg", "joint_deg_to_other"
#: The robot follows the other episode when its error to it is below this share of the error to its own.
FOLLOWS = 0.25


@dataclass(slots=True, kw_only=True)
class Verdict:
    """``holds``: whether the control came out as it must for the comparison to mean anything; None: undecided, or nothing to say."""

    control: str
    task: str
    holds: bool | None
    text: str


@dataclass(slots=True, kw_only=True)
class SensitivityPair:
    """One imagination against what really follows from its own condition and from the other one, in pixels of 240x320.

    ``kind``: ``action`` (two chunks executed from one state) or ``instruction`` (the sentence swapped, both imaginations against what the
    expert does), with the points that were followed. None: not measured.
    """

    model: str
    kind: str
    task: str
    episode: str
    own: float | None
    other: float | None


@dataclass(slots=True, kw_only=True)
class Sensitivity:
    """Share of pairs in which an imagination is nearer to its own outcome, 95 % Wilson interval; ``margin``: mean of other minus own
    with its bootstrap interval. Ties count as not nearer: a model that ignores its condition is nearer to neither."""

    model: str
    kind: str
    task: str
    n: int
    missing: int
    nearer_own: int
    share: float | None
    low: float
    high: float
    margin: float | None
    margin_low: float | None
    margin_high: float | None


def control_verdicts(outcomes: Iterable[EpisodeOutcome], *, margin: float = MARGIN) -> list[Verdict]:
    """One sentence a control and task (and model, for ``frozen``), for the controls that ran. ``margin``: see ``MARGIN``."""
    table = EpisodeTable(list(outcomes))
    found = []
    for task in table.tasks:
        ideal = next((name for name in ("oracle", "perfect") if name in table.controls), None)
        if "other" in table.controls:
            found.append(_other(table, task))
        if "objects_erased" in table.controls and ideal:
            found.append(_objects_erased(table, task, ideal, margin))
        if "noise" in table.controls:
            found.append(_noise(table, task, margin))
        if "frozen" in table.controls:
            found += [_frozen(table.paired(task, model, "frozen", test=False), margin) for model in table.models]
    return found


def _other(table: EpisodeTable, task: str) -> Verdict:
    cells = table.cells("other", task).values()
    pairs = [(o.scores.get(TO_OTHER), o.scores.get(TO_OWN)) for o in cells]
    known = [(float(x), float(y)) for x, y in pairs if x is not None and y is not None]
    if not known:
        text = f"The control 'other' on {task} has no decoded errors, so it cannot be said whether the robot follows the video."
        return Verdict(control="other", task=task, holds=None, text=text)
    to_other, to_own = np.mean(known, axis=0)
    follows = bool(to_other < FOLLOWS * to_own)
    measured = (
        f"Given another episode's video on {task}, the decoded targets are {to_other:.2f} degrees from that episode's and {to_own:.2f} "
        f"from its own (n={len(known)}, {len(pairs) - len(known)} not measured)"
    )
    limit = f"{FOLLOWS:.0%} of the error to its own"
    text = f"{measured}: the robot follows the video it is shown, below {limit}."
    if not follows:
        text = f"{measured}, not below {limit}: the decoder does not follow the video, and success says little about the imagination."
    return Verdict(control="other", task=task, holds=follows, text=text)


def _objects_erased(table: EpisodeTable, task: str, ideal: str, margin: float) -> Verdict:
    row = table.paired(task, ideal, "objects_erased", test=False)
    whole = count({"status": o.status} for o in table.cells(ideal, task).values())
    rates = (
        f"{_rate(table, 'objects_erased', task)} episodes succeed on {task} when the objects are erased from the real future, "
        f"{_rate(table, ideal, task)} with {ideal}"
    )
    if row.difference is None or row.low is None or row.high is None:
        text = f"No episode of {task} was finished both by {ideal} and with erased objects."
        return Verdict(control="objects_erased", task=task, holds=None, text=text)
    if not whole["success"]:
        text = f"{rates}: without a success of {ideal} this control says nothing."
        return Verdict(control="objects_erased", task=task, holds=None, text=text)
    within, holds = f"within {100 * margin:.0f} points", None
    if -margin <= row.low and row.high <= margin:
        says = f"equal {within}, so success on this task cannot show object physics"
        holds = False
    elif row.low > 0:
        says = "what the imagination shows of the objects matters for success on this task"
        holds = True
    elif row.high < 0:
        says = "more succeed without the objects, so success on this task cannot show object physics"
        holds = False
    else:
        says = f"neither different nor equal {within}, {FEW} whether success on this task can show object physics"
    return Verdict(control="objects_erased", task=task, holds=holds, text=f"{rates} ({_interval(row)}): {says}.")


def _noise(table: EpisodeTable, task: str, margin: float) -> Verdict:
    """Noise carries no plan: it must do no better than holding still."""
    row = table.paired(task, "noise", "noop", test=False) if "noop" in table.controls else None
    if row is None or row.difference is None or row.low is None or row.high is None:
        text = f"The control 'noise' on {task} has no finished no-op episodes to stand beside."
        return Verdict(control="noise", task=task, holds=None, text=text)
    holds, points = None, f"{100 * margin:.0f} points"
    if row.high <= margin:
        says, holds = f"at most {points} better, so the decoder finds no plan where there is none", True
    elif row.low > 0:
        says = "the decoder succeeds without a video, so success on this task is not owed to the imagination"
        holds = False
    else:
        says = f"neither better nor shown to be at most {points} better, {FEW} whether the decoder succeeds without a video"
    rates = f"{_rate(table, 'noise', task)} episodes succeed on {task} with noise, {_rate(table, 'noop', task)} when nothing moves"
    return Verdict(control="noise", task=task, holds=holds, text=f"{rates} ({_interval(row)}): {says}.")


def _frozen(row: PairedSuccess, margin: float) -> Verdict:
    if row.difference is None or row.low is None or row.high is None:
        text = f"No episode of {row.task} was finished both by {row.a} and with a frozen picture."
        return Verdict(control="frozen", task=row.task, holds=None, text=text)
    holds, points = None, f"{100 * margin:.0f} points"
    if row.high <= margin:
        says, holds = f"succeeds at most {points} more often on {row.task} than the first picture repeated", False
    elif row.low > 0:
        says, holds = f"succeeds more often on {row.task} than the first picture repeated", True
    else:
        says = f"and the first picture repeated on {row.task}: {FEW} which succeeds more often"
    return Verdict(control="frozen", task=row.task, holds=holds, text=f"{row.a} {says} ({_interval(row)}).")


def _rate(table: EpisodeTable, name: str, task: str) -> str:
    counts = count({"status": o.status} for o in table.cells(name, task).values())
    return f"{counts['success']} of {counts['n']}"


def _interval(row: PairedSuccess) -> str:
    return f"difference {row.difference:+.0%}, unadjusted 95 % interval {row.low:+.0%} to {row.high:+.0%}, n={row.n}"


def summarise_sensitivity(pairs: Sequence[SensitivityPair], *, seed: int = 0) -> list[Sensitivity]:
    """By model, kind and task."""
    groups: dict[tuple[str, str, str], list[SensitivityPair]] = {}
    for pair in pairs:
        groups.setdefault((pair.model, pair.kind, pair.task), []).append(pair)
    found = []
    for (model, kind, task), members in sorted(groups.items()):
        known = [(float(p.own), float(p.other)) for p in members if p.own is not None and p.other is not None]
        nearer = sum(own < other for own, other in known)
        low, high = wilson(nearer, len(known))
        margin: tuple[float | None, ...] = (None, None, None)
        if known:
            margin = bootstrap_mean([other - own for own, other in known], np.random.default_rng([seed, len(known)]))
        found.append(
            Sensitivity(
                model=model, kind=kind, task=task, n=len(known), missing=len(members) - len(known), nearer_own=nearer,
                share=nearer / len(known) if known else None, low=low, high=high, margin=margin[0],
                margin_low=margin[1], margin_high=margin[2],
            )
        )  # fmt: skip
    return found
