"""What the controls say about a comparison, in sentences, and how much imaginations depend on actions and instructions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from physisforcing.core.results import count
from physisforcing.core.stats import bootstrap_mean, fisher_exact, wilson

from .comparison_rows import EpisodeOutcome, PairedSuccess
from .comparison_table import EpisodeTable
from .summary import GATE_LEVEL

#: Scores of the control ``other``: RMSE in degrees between decoded targets and those of the own and of the other episode.
TO_OWN, TO_OTHER = "joint_deg", "joint_deg_to_other"
#: The robot follows the other episode when its error to it is below this share of the error to its own.
FOLLOWS = 0.25


@dataclass(slots=True, kw_only=True)
class Verdict:
    """``holds``: whether the control came out as it must for the comparison to mean anything; None: it cannot be said."""

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


def control_verdicts(outcomes: Iterable[EpisodeOutcome]) -> list[Verdict]:
    """One sentence a control and task, for the controls that ran."""
    table = EpisodeTable(list(outcomes))
    found = []
    for task in table.tasks:
        ideal = next((name for name in ("oracle", "perfect") if name in table.controls), None)
        if "other" in table.controls:
            found.append(_other(table, task))
        if "objects_erased" in table.controls and ideal:
            found.append(_objects_erased(table, task, ideal))
        found += [_like_noop(table, task, name) for name in ("noise", "black") if name in table.controls]
        if "frozen" in table.controls:
            found += [_frozen(table.paired(task, model, "frozen", test=True)) for model in table.models]
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


def _objects_erased(table: EpisodeTable, task: str, ideal: str) -> Verdict:
    row = table.paired(task, ideal, "objects_erased", test=False)
    erased, whole = (
        count({"status": o.status} for o in table.cells(n, task).values()) for n in ("objects_erased", ideal)
    )
    rates = (
        f"{erased['success']} of {erased['n']} episodes succeed on {task} when the objects are erased from the real future, "
        f"{whole['success']} of {whole['n']} with {ideal}"
    )
    if row.difference is None or row.low is None or row.high is None:
        text = f"No episode of {task} was finished both by {ideal} and with erased objects."
        return Verdict(control="objects_erased", task=task, holds=None, text=text)
    difference = f"difference {row.difference:+.0%}, 95 % interval {row.low:+.0%} to {row.high:+.0%}, n={row.n}"
    if not whole["success"]:
        text = f"{rates}: without a success of {ideal} this control says nothing."
        return Verdict(control="objects_erased", task=task, holds=None, text=text)
    if row.low > 0:
        text = f"{rates} ({difference}): what the imagination shows of the objects matters for success on this task."
        return Verdict(control="objects_erased", task=task, holds=True, text=text)
    text = f"{rates} ({difference}): equal within the interval, so success on this task cannot show object physics."
    return Verdict(control="objects_erased", task=task, holds=False, text=text)


def _like_noop(table: EpisodeTable, task: str, name: str) -> Verdict:
    """Noise and black pictures carry no plan: they must do no better than holding still."""
    shown, still = (
        count({"status": o.status} for o in table.cells(n, task).values()) if n in table.controls else None
        for n in (name, "noop")
    )
    if shown is None or still is None or not shown["n"] or not still["n"]:
        text = f"The control '{name}' on {task} has no finished no-op episodes to stand beside."
        return Verdict(control=name, task=task, holds=None, text=text)
    k, n, k0, n0 = shown["success"], shown["n"], still["success"], still["n"]
    p = fisher_exact(k, n - k, k0, n0 - k0)
    better = k / n > k0 / n0 and p < GATE_LEVEL
    counts = f"{k} of {n} episodes succeed on {task} with {name}, {k0} of {n0} when nothing moves (Fisher p={p:.2g})"
    text = f"{counts}: the decoder finds no plan where there is none."
    if better:
        text = (
            f"{counts}: the decoder succeeds without a video, so success on this task is not owed to the imagination."
        )
    return Verdict(control=name, task=task, holds=not better, text=text)


def _frozen(row: PairedSuccess) -> Verdict:
    if row.difference is None or row.low is None or row.high is None:
        text = f"No episode of {row.task} was finished both by {row.a} and with a frozen picture."
        return Verdict(control="frozen", task=row.task, holds=None, text=text)
    numbers = f"{row.difference:+.0%}, 95 % interval {row.low:+.0%} to {row.high:+.0%}, exact McNemar p={row.p:.2g}, n={row.n}"
    if row.low > 0:
        text = f"{row.a} succeeds more often on {row.task} than the first picture repeated ({numbers})."
    else:
        text = f"{row.a} is not shown to succeed more often on {row.task} than the first picture repeated ({numbers})."
    return Verdict(control="frozen", task=row.task, holds=row.low > 0, text=text)


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
