"""From episode results to the table that a report prints: rates, intervals, tests against the baselines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from physisforcing.core.paired_stats import paired_proportions
from physisforcing.core.results import count
from physisforcing.core.stats import fisher_exact, mean_of_proportions, wilson

#: Baselines that a closed-loop figure has to beat at this level.
GATE_BASELINES, GATE_LEVEL = ("noop", "random"), 0.01
#: The planner with its model, and with the simulator itself as world model.
MODEL, PERFECT = "model", "perfect"
#: Numbers of a row that are averaged, with their units.
MEANS = {
    "joint_deg": "deg",
    "gripper_percent": "%",
    "tool_mm": "mm",
    "tool_mm_max": "mm",
    "tool_mm_end": "mm",
    "joint_deg_to_other": "deg",
    "joint_deg_other_to_scene": "deg",
}


def summarise(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """``{"tasks": {task: {policy: {...}}}}`` with counts, rate, 95 % Wilson interval, p-values against the gate baselines.

    Rows have ``task``, ``policy``, ``status`` and whatever was measured. Errors stand in no denominator.
    """
    grouped: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        grouped.setdefault(str(row["task"]), {}).setdefault(str(row["policy"]), []).append(row)
    tasks: dict[str, Any] = {}
    for task, policies in sorted(grouped.items()):
        tasks[task] = {name: _policy(part) for name, part in policies.items()}
        for name, entry in tasks[task].items():
            entry["against"] = {
                baseline: _p_value(entry, tasks[task][baseline])
                for baseline in GATE_BASELINES
                if baseline in tasks[task] and baseline != name
            }
        if {MODEL, PERFECT} <= policies.keys() and (gap := _gap(policies[PERFECT], policies[MODEL])):
            tasks[task][MODEL]["gap"] = gap
    return {"tasks": tasks}


def _gap(perfect: Sequence[Mapping[str, Any]], model: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Success of the perfect model minus the model's in the scenes that both finished; None where there are none."""
    won, other = (
        {int(row["seed"]): row["status"] == "success" for row in rows if row["status"] != "error"}
        for rows in (perfect, model)
    )
    seeds = sorted(won.keys() & other.keys())
    pairs = [(won[seed], other[seed]) for seed in seeds]
    if not pairs:
        return None
    both, only_perfect, only_model, neither = (
        pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))
    )
    difference, low, high = paired_proportions(both, only_perfect, only_model, neither)
    counts = {"n": len(pairs), "only_perfect": only_perfect, "only_model": only_model, "seeds": seeds}
    return {"difference": difference, "low": low, "high": high, **counts}


def _policy(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    counts = count(rows)
    low, high = wilson(counts["success"], counts["n"])
    entry: dict[str, Any] = {
        "successes": counts["success"],
        "n": counts["n"],
        "errors": counts["error"],
        "rate": counts["success"] / counts["n"] if counts["n"] else None,
        "low": low,
        "high": high,
        "seeds": sorted(int(r["seed"]) for r in rows),
    }
    for name in MEANS:
        values = [float(r[name]) for r in rows if r.get(name) is not None]
        if values:
            entry[name] = float(np.mean(values))
            entry[f"{name}_median"] = float(np.median(values))
    telemetry = [r["telemetry"] for r in rows if r.get("telemetry")]
    if telemetry:
        entry["telemetry"] = {k: float(np.mean([t[k] for t in telemetry if k in t])) for k in sorted(telemetry[0])}
    return entry


def _p_value(entry: Mapping[str, Any], baseline: Mapping[str, Any]) -> float | None:
    if not entry["n"] or not baseline["n"]:
        return None
    return fisher_exact(
        entry["successes"],
        entry["n"] - entry["successes"],
        baseline["successes"],
        baseline["n"] - baseline["successes"],
    )


def mean_over_tasks(entries: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Any]:
    """Mean of the tasks' rates with its 95 % interval (tasks weighted equally), n, errors and seeds; or ``skipped`` with the tasks that have no
    finished episode. ``entries``: task -> counts of one policy, as ``summarise`` gives them, None where it did not act."""
    missing = [task for task, entry in entries.items() if not (entry or {}).get("n")]
    if missing:
        return {"skipped": f"needs finished episodes of {', '.join(missing)}"}
    found = [entry for entry in entries.values() if entry is not None]
    rate, low, high = mean_of_proportions([(entry["successes"], entry["n"]) for entry in found])
    sums = {key: sum(entry[key] for entry in found) for key in ("n", "errors")}
    seeds = sorted({seed for entry in found for seed in entry.get("seeds", [])})
    return {"rate": rate, "low": low, "high": high, **sums, "seeds": seeds}


def means_table(means: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table of ``mean_over_tasks`` by policy."""
    rows = []
    for name, mean in means.items():
        if "skipped" in mean:
            rows.append([name, f"skipped: {mean['skipped']}", "-", "-", "-"])
            continue
        interval = f"{100 * mean['low']:.1f}-{100 * mean['high']:.1f} %"
        rows.append([name, f"{100 * mean['rate']:.1f} %", interval, str(mean["n"]), str(mean["errors"])])
    return table_lines(["policy", "mean success", "95 % interval", "n", "errors"], rows)


def table_lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def markdown(summary: Mapping[str, Any], *, title: str, notes: Sequence[str] = ()) -> str:
    """The table as Markdown."""
    lines = [f"# {title}", ""]
    for task, policies in summary["tasks"].items():
        measured = [name for name in MEANS if any(name in entry for entry in policies.values())]
        head = ["policy", "success", "rate", "95 % interval", "errors"]
        head += [f"p against {b}" for b in GATE_BASELINES if b in policies]
        head += [f"{name} ({MEANS[name]})" for name in measured]
        rows = []
        for name, entry in policies.items():
            rate = "skipped: no finished episode" if entry["rate"] is None else f"{100 * entry['rate']:.0f} %"
            cells = [name, f"{entry['successes']}/{entry['n']}", rate]
            cells += [f"{100 * entry['low']:.0f}-{100 * entry['high']:.0f} %", str(entry["errors"])]
            for baseline in GATE_BASELINES:
                if baseline in policies:
                    p = entry["against"].get(baseline)
                    cells.append("-" if p is None else f"{p:.2g}")
            cells += [f"{entry[m]:.2f}" if m in entry else "-" for m in measured]
            rows.append(cells)
        lines += [f"## {task}", "", *table_lines(head, rows)]
        if gap := policies.get(MODEL, {}).get("gap"):
            difference, low, high = (f"{100 * gap[name]:+.0f}" for name in ("difference", "low", "high"))
            scenes = "the scene" if gap["n"] == 1 else f"the {gap['n']} scenes"
            told = (
                f"Perfect model minus model in {scenes} that both finished: {difference} points (95 % {low} to {high})."
            )
            lines += ["", told]
        lines.append("")
    lines += [f"- {note}" for note in notes]
    return "\n".join(lines).rstrip() + "\n"
