"""A comparison as tables of a report."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from physisforcing.core.report import SuccessRow, Table

from .comparison_controls import Sensitivity
from .comparison_rows import CONTROLS, Comparison, PairedSuccess, ScoreDifference, ScoreMean, SeedDifference
from .imagined_success import ImaginedSuccess

FEW = "-"
HOLM = "Adjusted by Holm over all {tests} tests of one family, which the end of the page lists."
PAIRED = (
    "A minus B on the episodes that both finished. Exact McNemar test; 95 % interval of the difference by Newcombe's method 10. "
) + HOLM
SCORES = (
    "Mean difference, A minus B, over the episodes in which both could be measured (n; the others are missing). Lower is better for all "
    "of them. Paired bootstrap interval (95 %; none for fewer than three episodes or equal differences), sign-flip test. "
) + HOLM
SEEDS = (
    "A training seed counts once, with its mean over episodes. Seeds of two recipes are no pairs unless that was declared. Smallest p: "
    "what this many seeds can give at best. "
) + HOLM
GAP = "How far a model stays behind under the same planner, and the real future without objects behind itself: first minus second on the same "
GAP += "episodes. Not tested."
MEANS = (
    "Mean over episodes with its bootstrap interval (95 %; none for fewer than three episodes or equal values); missing: finished episodes "
    "in which it could not be measured; floor: the same score of the video that was really rendered, which is what the measuring itself costs."
)
#: Ending of a score of the real video.
FLOOR = "_floor"
IMAGINED = (
    "Imagined success, as a classifier sees it, against what happened: at the end of an episode's last plan, and of every plan against "
    "whether the task was done when its chunk had been executed (interval over episodes). Balanced accuracy of .5 is chance."
)
SENSITIVITY = (
    "How often an imagination is nearer to what really follows from its own condition than to what follows from another one. A model that "
    "ignores its condition is nearer to neither, which does not count. Action: the expert's next control steps and random ones, executed from "
    "one state, each imagined. Instruction: what the expert does there, imagined with the episode's sentence (own) and with another task's "
    "(other), from the same noise; margin: how much further the other one is. Distances are of tracked points, as late as they can be followed in both."
)


def success_rows(comparison: Comparison) -> list[SuccessRow]:
    """For the report's closed-loop table. Sums over tasks are left out: they have no Wilson interval of their own."""
    return [
        SuccessRow(
            task=cell.task,
            policy=cell.model,
            successes=cell.successes,
            episodes=cell.n,
            errors=cell.errors,
            baseline=cell.model in CONTROLS,
            note="; ".join(filter(None, (CONTROLS.get(cell.model), _against(cell.against)))),
        )
        for cell in comparison.success
        if cell.task in comparison.episodes
    ]


def tables(
    comparison: Comparison,
    *,
    imagined: Mapping[str, ImaginedSuccess] | None = None,
    sensitivity: Sequence[Sensitivity] = (),
) -> list[Table]:
    """All tables of a comparison that have rows; ``imagined``: by model."""
    tests = str(comparison.tests)
    found = [
        _over_tasks(comparison),
        _seeds(comparison.seeds, SEEDS.format(tests=tests)),
        _paired("Paired success", PAIRED.format(tests=tests), comparison.paired, tested=True),
        _paired("Gap to the perfect model and to baselines", GAP, comparison.gaps, tested=False),
        _score_differences(comparison.score_differences, SCORES.format(tests=tests)),
        *_means(comparison),
        _imagined(imagined or {}),
        _sensitivity(sensitivity),
    ]
    return [table for table in found if table.rows]


def _over_tasks(comparison: Comparison) -> Table:
    rows = [
        [c.model, f"{c.successes}/{c.n}", _percent(c.rate), _range(c.low, c.high), str(c.errors)]
        for c in comparison.success
        if c.task not in comparison.episodes
    ]
    text = "Each task has the same weight; the interval joins the tasks' Wilson intervals."
    head = ["model", "success", "mean rate", "95 % interval", "errors"]
    return Table(title="Mean over tasks", text=text, head=head, rows=rows, numeric=[1, 2, 3, 4])


def _paired(title: str, text: str, found: Sequence[PairedSuccess], *, tested: bool) -> Table:
    head = ["task", "A", "B", "n", "dropped", "only A", "only B", "difference", "95 % interval"]
    head += ["p", "p (Holm)"] if tested else []
    rows = []
    for row in found:
        cells = [row.task, row.a, row.b, str(row.n), str(row.dropped), str(row.only_a), str(row.only_b)]
        cells += [_signed(row.difference), _range(row.low, row.high, signed=True)]
        rows.append(cells + ([_p(row.p), _p(row.p_holm)] if tested else []))
    return Table(title=title, text=text, head=head, rows=rows, numeric=list(range(3, len(head))))


def _score_differences(found: Sequence[ScoreDifference], text: str) -> Table:
    head = ["task", "score", "A", "B", "n", "missing", "difference", "95 % interval", "p", "p (Holm)"]
    rows = [
        [r.task, r.score, r.a, r.b, str(r.n), str(r.missing), _number(r.difference), _numbers(r.low, r.high), _p(r.p), _p(r.p_holm)]
        for r in found
    ]  # fmt: skip
    return Table(title="Paired differences of scores", text=text, head=head, rows=rows, numeric=list(range(4, 10)))


def _seeds(found: Sequence[SeedDifference], text: str) -> Table:
    head = [
        "task",
        "measure",
        "A",
        "B",
        "seeds",
        "mean A",
        "mean B",
        "difference",
        "95 % interval",
        "p",
        "smallest p",
        "p (Holm)",
        "how",
    ]
    rows = [
        [r.task, r.measure, r.a, r.b, f"{r.seeds_a}, {r.seeds_b}", _number(r.mean_a), _number(r.mean_b), _number(r.difference),
         _numbers(r.low, r.high), _p(r.p), _p(r.p_smallest), _p(r.p_holm), r.method]
        for r in found
    ]  # fmt: skip
    return Table(title="Recipes over training seeds", text=text, head=head, rows=rows, numeric=list(range(4, 12)))


def _means(comparison: Comparison) -> list[Table]:
    """One table a task: scores down, models across; the measuring floor of a score stands in its cell."""
    found = []
    for task, group in itertools.groupby(comparison.scores, key=lambda row: row.task):
        cells = {(row.score, row.model): row for row in group}
        models = [c.model for c in comparison.success if c.task == task and any(m == c.model for _, m in cells)]
        names = list(dict.fromkeys(score for score, _ in cells))
        own = [name for name in names if not (name.endswith(FLOOR) and name.removesuffix(FLOOR) in names)]
        rows = [
            [name, *(_mean_cell(cells.get((name, m)), cells.get((f"{name}{FLOOR}", m))) for m in models)]
            for name in own
        ]
        numeric, head = list(range(1, len(models) + 1)), ["score", *models]
        found.append(Table(title=f"Scores, {task}", text=MEANS, head=head, rows=rows, numeric=numeric, folded=True))
    return found


def _mean_cell(row: ScoreMean | None, floor: ScoreMean | None) -> str:
    missing = f", {row.missing} missing" if row is not None and row.missing else ""
    if row is None or row.mean is None:
        return f"{FEW}{missing}"
    beside = f"; floor {_number(floor.mean)}" if floor is not None and floor.mean is not None else ""
    interval = "no interval" if row.low is None else _numbers(row.low, row.high)
    return f"{_number(row.mean)} ({interval}) n={row.n}{missing}{beside}"


def _imagined(found: Mapping[str, ImaginedSuccess]) -> Table:
    head = ["model", "n", "missing", "successes", "balanced accuracy", "95 % interval", "sensitivity", "specificity", "ECE", "Brier",
            "Brier of the base rate", "note"]  # fmt: skip
    rows = [
        [model, str(s.n), str(s.missing), str(s.successes), _number(s.balanced_accuracy), _numbers(s.low, s.high),
         _number(s.sensitivity), _number(s.specificity), _number(s.ece), _number(s.brier), _number(s.brier_base), s.note]
        for model, s in found.items()
    ]  # fmt: skip
    return Table(title="Imagined against true success", text=IMAGINED, head=head, rows=rows, numeric=list(range(1, 11)))


def _sensitivity(found: Sequence[Sensitivity]) -> Table:
    head = [
        "model",
        "condition",
        "task",
        "n",
        "missing",
        "nearer to its own",
        "95 % interval",
        "margin (px)",
        "95 % interval",
    ]
    rows = [
        [s.model, s.kind, s.task, str(s.n), str(s.missing), _percent(s.share), _range(s.low, s.high), _number(s.margin),
         _numbers(s.margin_low, s.margin_high)]
        for s in found
    ]  # fmt: skip
    title = "Sensitivity to actions and instructions"
    return Table(title=title, text=SENSITIVITY, head=head, rows=rows, numeric=list(range(3, 9)))


def _against(found: Mapping[str, float | None]) -> str:
    return ", ".join(f"Fisher p={_p(p)} against {name}, unadjusted" for name, p in found.items())


def _percent(value: float | None) -> str:
    return FEW if value is None else f"{100 * value:.0f} %"


def _signed(value: float | None) -> str:
    return FEW if value is None else f"{100 * value:+.0f} %"


def _range(low: float | None, high: float | None, *, signed: bool = False) -> str:
    if low is None or high is None:
        return FEW
    return f"{100 * low:+.0f} to {100 * high:+.0f} %" if signed else f"{100 * low:.0f} to {100 * high:.0f} %"


def _number(value: float | None) -> str:
    return FEW if value is None else f"{value:.3g}"


def _numbers(low: float | None, high: float | None) -> str:
    return FEW if low is None or high is None else f"{low:.3g} to {high:.3g}"


def _p(value: float | None) -> str:
    return FEW if value is None else f"{value:.2g}"
