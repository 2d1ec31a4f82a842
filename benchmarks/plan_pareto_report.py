"""Table, Pareto plot and measurements of ``plan_pareto.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from physisforcing.core.files import replace_text
from physisforcing.core.paired_stats import paired_proportions
from physisforcing.core.stats import holm, mcnemar, wilson
from physisforcing.planner.measurements import measurement, write_measurements

COLOURS = {
    "": "#444444",
    "spread": "#0072b2",
    "random": "#999999",
    "smoothness": "#e69f00",
    "track_consistency": "#009e73",
}
COLOURS |= {"combined": "#d55e00", "success": "#cc79a7"}
#: Of a cell that was cut off: an evaluation writes where it ran when it ends.
UNKNOWN = dict.fromkeys(("commit", "hardware", "date"), "not recorded") | {"versions": {}}
MARKERS = {1: "o", 4: "s", 16: "D"}


@dataclass(slots=True, kw_only=True)
class CellResult:
    """A cell and its episodes (lines of ``results.jsonl``); errors stand in no denominator. ``provenance``: of the run, which may have
    been on another machine than the report."""

    name: str
    steps: int
    candidates: int
    verifier: str
    wanted: int
    rows: list[dict[str, Any]]
    manifests: Mapping[str, str]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def finished(self, task: str = "") -> list[dict[str, Any]]:
        return [row for row in self.rows if row["status"] != "error" and task in ("", row["task"])]

    def successes(self, task: str = "") -> int:
        return sum(row["status"] == "success" for row in self.finished(task))

    def total(self, name: str) -> float:
        return float(sum(row["telemetry"].get(name, 0.0) for row in self.finished()))

    @property
    def plans(self) -> float:
        return max(1.0, self.total("plans"))

    @property
    def evaluations(self) -> float:
        """Calls of the denoiser for one sample, a plan; candidates that were imagined again included."""
        imagined = self.total("candidates") if self.candidates > 1 else self.total("plans") + self.total("resampled")
        return self.steps * imagined / self.plans


@dataclass(slots=True, kw_only=True)
class Comparison:
    """A cell with several candidates against the single one of the same steps, on the episodes that both finished."""

    cell: CellResult
    n: int
    only_cell: int
    only_single: int
    difference: float
    low: float
    high: float
    p: float


def compare(cells: Sequence[CellResult]) -> list[Comparison]:
    """Every cell with several candidates that has a single one beside it."""
    singles = {cell.steps: cell for cell in cells if cell.candidates == 1}
    found = []
    for cell in cells:
        if cell.candidates == 1 or cell.steps not in singles:
            continue
        mine, single = _by_episode(cell), _by_episode(singles[cell.steps])
        pairs = [(mine[key], single[key]) for key in mine if key in single]
        if not pairs:
            continue
        counts = [sum(pair == kind for pair in pairs) for kind in ((1, 1), (1, 0), (0, 1), (0, 0))]
        difference, low, high = paired_proportions(*counts)
        p = mcnemar(counts[1], counts[2])
        found.append(
            Comparison(
                cell=cell,
                n=len(pairs),
                only_cell=counts[1],
                only_single=counts[2],
                difference=difference,
                low=low,
                high=high,
                p=p,
            )
        )
    return found


def _by_episode(cell: CellResult) -> dict[tuple[str, int], int]:
    return {(row["task"], row["seed"]): int(row["status"] == "success") for row in cell.finished()}


def front(cells: Sequence[CellResult]) -> list[CellResult]:
    """The cells that no other beats: none is as cheap and more often successful. Cheapest first."""
    best: list[CellResult] = []
    for cell in sorted(cells, key=lambda c: (c.evaluations, -_rate(c))):
        if not best or _rate(cell) > _rate(best[-1]):
            best.append(cell)
    return best


def _rate(cell: CellResult) -> float:
    return cell.successes() / max(1, len(cell.finished()))


def report_name(settings: Mapping[str, Any]) -> str:
    """Of the files of a report: ``plan_pareto`` and what ``--name`` says, else the scenes where they are not the test set's. Each has
    claims of its own."""
    manifest = str(settings["manifest"])
    name = settings.get("name") or ("" if manifest in ("auto", "test") else Path(manifest).stem)
    return f"plan_pareto_{name}" if name else "plan_pareto"


def write_report(
    cells: Sequence[CellResult], docs: Path, *, command: str, settings: Mapping[str, Any], rehearsal: bool
) -> Path:
    """``results/<report_name>.md`` and ``.json``, ``images/<report_name>.png`` below ``docs``; returns the page. Cells without a finished
    episode are listed as missing."""
    known = [cell for cell in cells if cell.finished()]
    folder = docs / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (docs / "images").mkdir(parents=True, exist_ok=True)
    name = report_name(settings)
    plot(known, docs / "images" / f"{name}.png")
    write_measurements(folder / f"{name}.json", _lines(known, command, name))
    page = folder / f"{name}.md"
    replace_text(page, _page(cells, known, command, settings, rehearsal))
    return page


def plot(cells: Sequence[CellResult], path: Path) -> None:
    """Success of all episodes against denoiser calls a plan, 95 % Wilson intervals, the Pareto front as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, axes = plt.subplots(figsize=(8.0, 5.0), dpi=150)
    verifiers = list(dict.fromkeys(cell.verifier for cell in cells))
    for cell in cells:
        n, rate = len(cell.finished()), _rate(cell)
        low, high = wilson(cell.successes(), n)
        beside = sorted({c.verifier for c in cells if (c.steps, c.candidates) == (cell.steps, cell.candidates)})
        place = cell.evaluations * 1.04 ** (beside.index(cell.verifier) - (len(beside) - 1) / 2)  # they cost the same
        axes.errorbar(
            place,
            100 * rate,
            yerr=[[100 * (rate - low)], [100 * (high - rate)]],
            marker=MARKERS.get(cell.candidates, "^"),
            color=COLOURS.get(cell.verifier, "#000000"),
            markersize=6,
            capsize=2,
            linestyle="none",
            linewidth=0.8,
        )
        axes.annotate(str(cell.steps), (place, 100 * rate), xytext=(4, -9), textcoords="offset points", fontsize=7)
    best = front(cells)
    axes.step(
        [c.evaluations for c in best], [100 * _rate(c) for c in best], where="post", color="#444444", linewidth=0.8
    )
    for verifier in verifiers:
        axes.plot([], [], color=COLOURS.get(verifier, "#000000"), linewidth=4, label=verifier or "single candidate")
    for number in sorted({cell.candidates for cell in cells}):
        axes.plot([], [], color="#444444", marker=MARKERS.get(number, "^"), linestyle="none", label=f"N = {number}")
    axes.set_xscale("log")
    axes.set_xticks(sorted({cell.evaluations for cell in cells}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("denoiser calls a plan (steps x candidates); numbers: denoising steps; line: Pareto front")
    axes.set_ylabel("success, % (95 % Wilson interval)")
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    lowest = min(_rate(cell) for cell in cells)
    axes.legend(fontsize=7, loc="lower right" if lowest > 0.5 else "upper right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def _lines(cells: Sequence[CellResult], command: str, name: str) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    compared = {comparison.cell.name: comparison for comparison in compare(cells)}
    for cell in cells:
        shared: dict[str, Any] = {"command": command, "provenance": cell.provenance or UNKNOWN}
        path, tasks = f"planner/{name.removeprefix('plan_')}/{cell.name}", sorted({row["task"] for row in cell.rows})
        for task in tasks:
            n = len(cell.finished(task))
            if not n:
                continue
            low, high = wilson(cell.successes(task), n)
            seeds = [row["seed"] for row in cell.finished(task)]
            against = {"scenes": cell.manifests[task]}
            value = cell.successes(task) / n
            lines.append(
                measurement(
                    f"{path}/{task}/success",
                    value,
                    unit="share",
                    n=n,
                    low=low,
                    high=high,
                    seeds=seeds,
                    against=against,
                    **shared,
                )
            )
        n = len(cell.finished())
        low, high = wilson(cell.successes(), n)
        shared["seeds"] = sorted({row["seed"] for row in cell.finished()})
        lines.append(measurement(f"{path}/success", _rate(cell), unit="share", n=n, low=low, high=high, **shared))
        lines.append(measurement(f"{path}/denoiser_calls", cell.evaluations, unit="calls a plan", n=n, **shared))
        if cell.name in compared:
            c = compared[cell.name]
            against = {
                "single": f"steps{cell.steps}-n1",
                "only_here": c.only_cell,
                "only_single": c.only_single,
                "mcnemar_p": c.p,
            }
            lines.append(
                measurement(
                    f"{path}/gain", c.difference, unit="share", n=c.n, low=c.low, high=c.high, against=against, **shared
                )
            )
    return lines


def _runs(cells: Sequence[CellResult]) -> list[str]:
    """On what machine and commit which cells ran: of a cell that was continued, the last run."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        about = cell.provenance or UNKNOWN
        found.setdefault(
            f"{about['hardware']}; commit {about['commit']}; {about['date'].partition('T')[0]}", []
        ).append(cell.name)
    return [f"- {where}: {', '.join(names)}." for where, names in found.items()]


def _page(
    cells: Sequence[CellResult],
    known: Sequence[CellResult],
    command: str,
    settings: Mapping[str, Any],
    rehearsal: bool,
) -> str:
    tasks, name = sorted({row["task"] for cell in known for row in cell.rows}), report_name(settings)
    best = {cell.name for cell in front(known)}
    lines = ["# Success against compute", ""]
    if rehearsal:
        lines += ["**A rehearsal with a handful of episodes: it shows that the benchmark runs, and nothing else.**", ""]
    lines += [
        f"Measurements: [{name}.json]({name}.json), written by the command below. Denoising steps x candidates a plan; a",
        "verifier chooses among candidates. All cells plan in the same frozen scenes with the same noise seeds: from one state the candidate",
        "of N = 1 is among those of N = 4 and N = 16; once other actions were chosen, the states differ.",
        "",
        f"![success against denoiser calls a plan](../images/{name}.png)",
        "",
        f"| steps | N | verifier | {' | '.join(tasks)} | all | 95 % | denoiser calls a plan | front |",
        "|" + " --- |" * (7 + len(tasks)),
    ]
    for cell in known:
        n = len(cell.finished())
        low, high = wilson(cell.successes(), n)
        each = [f"{cell.successes(task)}/{len(cell.finished(task))}" for task in tasks]
        row = [str(cell.steps), str(cell.candidates), cell.verifier or "-", *each, f"{100 * _rate(cell):.0f} %"]
        row += [f"{100 * low:.0f}-{100 * high:.0f} %", f"{cell.evaluations:.1f}"]
        lines.append("| " + " | ".join([*row, "yes" if cell.name in best else ""]) + " |")
    lines += ["", *_compared(known)]
    errors = sum(row["status"] == "error" for cell in known for row in cell.rows)
    missing = [cell.name for cell in cells if len(cell.rows) < cell.wanted]
    lines += [
        f"- Errors, in no denominator: {errors}. Cells that are not complete: {', '.join(missing) if missing else 'none'}.",
        f"- The report was written for device {settings['device']}, scenes `manifest={settings['manifest']}`,"
        f" weights {settings['world_model']}; one training seed of each network.",
        *_runs(known),
        f"- `{command}`",
    ]
    return "\n".join(lines) + "\n"


def _compared(cells: Sequence[CellResult]) -> list[str]:
    compared = compare(cells)
    if not compared:
        return []
    adjusted = holm([comparison.p for comparison in compared])
    lines = ["## Each verifier against a single candidate", ""]
    lines += ["Same steps, same episodes; exact McNemar, Holm over this table.", ""]
    lines += [
        "| steps | N | verifier | episodes | gain | 95 % | solved only here | only by N = 1 | p (Holm) |",
        "|" + " --- |" * 9,
    ]
    for comparison, p in zip(compared, adjusted, strict=True):
        cell = comparison.cell
        row = [str(cell.steps), str(cell.candidates), cell.verifier, str(comparison.n)]
        row += [
            f"{100 * comparison.difference:+.0f} %",
            f"{100 * comparison.low:+.0f} to {100 * comparison.high:+.0f} %",
        ]
        row += [str(comparison.only_cell), str(comparison.only_single), f"{p:.2g}"]
        lines.append("| " + " | ".join(row) + " |")
    gains = np.array([comparison.difference for comparison in compared if comparison.cell.verifier == "random"])
    note = (
        f"The control `random` gains {100 * gains.mean():+.0f} % on average: what choosing by chance is worth."
        if len(gains)
        else ""
    )
    return [*lines, "", *([note, ""] if note else [])]
