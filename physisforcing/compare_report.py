"""What a comparison found, as summary, measurements and report."""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from physisforcing.core.lerobot_format import write_json
from physisforcing.core.report import Panel, Player, ReportData, Table, within_bytes, write_report
from physisforcing.planner.comparison import Comparison, ComparisonSettings, EpisodeOutcome, compare
from physisforcing.planner.comparison_controls import Sensitivity, control_verdicts
from physisforcing.planner.comparison_output import success_rows, tables
from physisforcing.planner.imagined_success import ImaginedSuccess, score_imagined_success

if TYPE_CHECKING:
    from .compare import CompareConfig, ComparisonPlan
    from .plan_scenes import Scenes

#: What becomes of an episode, in words.
WORDS = {"success": "succeeded", "failure": "did not succeed", "error": "crashed"}
LIMITS = [
    "Success on an easy task shows little by itself: read it beside retrieval and objects_erased.",
    "Tracks in imagined video come from an optical-flow tracker. Its own error on the real video of the same episode is given beside "
    "every figure (floor); an imagination cannot be told to be better than that.",
    "Robot and objects are the self-made pack unless provenance says otherwise; scores are not comparable with published figures.",
]


def write_comparison(
    config: CompareConfig,
    plan: ComparisonPlan,
    rows: Sequence[Mapping[str, Any]],
    sensitivity_rows: Sequence[Mapping[str, Any]] = (),
    *,
    command: str,
) -> dict[str, Any]:
    """``rows`` of episodes, and of ``compare_sensitivity``. Write ``report.*``, ``summary.json``, ``measurements.json`` and ``provenance.json``; returns the summary.

    Raises ``IncompleteCoverageError`` listing episodes that are missing.
    """
    from physisforcing.planner import measurements, worldarena

    from . import compare_sensitivity

    output = Path(config.output)
    outcomes = [_outcome(row, plan) for row in rows]
    settings = ComparisonSettings(paired_seeds=config.paired_seeds)
    found, verdicts = compare(outcomes, settings), control_verdicts(outcomes)
    success, sensitivity = imagined_success(rows), compare_sensitivity.summary_lines(sensitivity_rows)
    crashed = compare_sensitivity.sensitivity_errors(sensitivity_rows)
    found.errors += crashed
    found.notes += [plan.note] if plan.note else []
    if config.protocol == worldarena.NAME:
        found.notes.append(
            f"WorldArena's protocol; differs from it: {'; '.join(config.worldarena().deviations()) or 'nothing'}."
        )
    provenance = measurements.machine_provenance()
    summary = {
        **found.to_json(),
        "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts],
        "imagined_success": {name: value.to_json() for name, value in success.items()},
        "sensitivity": compare_sensitivity.plain(sensitivity),
        "skipped": plan.skipped,
        "scenes": plan.scenes.manifests,
        "errors": len(found.errors),
        "error_sentences": found.errors,
        "command": command,
        "provenance": provenance,
        "config": dataclasses.asdict(config),
    }
    write_json(output / "summary.json", summary)
    write_json(output / "provenance.json", provenance | {"command": command})
    shared: dict[str, Any] = {"command": command, "provenance": provenance}
    lines = measurement_lines(found, config, plan.scenes, **shared)
    lines += imagined_success_lines(success, config, plan.scenes.seeds, **shared)
    lines += compare_sensitivity.sensitivity_measurements(sensitivity, config, plan.scenes.seeds, **shared)
    write_json(output / "measurements.json", lines)
    data = report_data(config, plan, rows, found, [verdict.text for verdict in verdicts], success, sensitivity)
    data.skipped += [f"{sentence} (crashed, in no denominator)" for sentence in crashed]
    data.provenance = {"run": {name: str(value) for name, value in provenance.items()} | {"command": command}}
    write_report(data, output)
    return summary


def _outcome(row: Mapping[str, Any], plan: ComparisonPlan) -> EpisodeOutcome:
    model = plan.models.get(str(row["policy"]))
    return EpisodeOutcome(
        task=str(row["task"]),
        episode=str(row["seed"]),
        model=str(row["policy"]),
        status=str(row["status"]),
        recipe=model.recipe if model else "",
        training_seed=model.training_seed if model else None,
        scores=dict(row.get("scores") or {}),
        error=_last_line(str(row.get("error") or "")),
    )


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def imagined_success(rows: Sequence[Mapping[str, Any]]) -> dict[str, ImaginedSuccess]:
    """What the success classifier says of imagined pictures against what happened, by model: of the last plan against the episode's
    outcome, and of every plan against whether the task was done when its chunk had been executed."""
    found = {}
    for name in dict.fromkeys(str(row["policy"]) for row in rows if "imagined_success" in row):
        mine = [row for row in rows if row["policy"] == name and row["status"] != "error"]
        outcomes = [row["status"] == "success" for row in mine]
        found[name] = score_imagined_success([row.get("imagined_success") for row in mine], outcomes)
        ends = [(p, done, k) for k, row in enumerate(mine) for p, done in row.get("imagined_success_chunks", [])]
        if ends:
            p, done, episode = zip(*ends, strict=True)
            found[f"{name}, every chunk"] = score_imagined_success(p, done, episodes=episode)
    return found


def measurement_lines(
    found: Comparison,
    config: CompareConfig,
    scenes: Scenes,
    *,
    command: str,
    provenance: Mapping[str, Any],
) -> list[Any]:
    """One line a success rate, a score, and a difference of either: between models on the same episodes, to the perfect model and to
    baselines, between recipes. Each says in which scenes, and what differs from a protocol that is named."""
    from physisforcing.planner import worldarena
    from physisforcing.planner.measurements import measurement

    shared: dict[str, Any] = {"command": command, "provenance": provenance}
    lines = []

    everywhere = sorted({seed for seeds in scenes.seeds.values() for seed in seeds})
    told = {}
    if config.protocol == worldarena.NAME:
        told["deviations"] = "; ".join(config.worldarena().deviations()) or "none"

    def add(task: str, claim: str, value: float | None, *, against: Mapping[str, Any], **more: Any) -> None:
        if value is not None:
            where = {"scenes": scenes.manifests[task]} if task in scenes.manifests else {}
            about = {**against, **where, **told}
            claim = f"compare/{config.claims}/{claim}"
            seeds = scenes.seeds.get(task) or everywhere
            lines.append(measurement(claim, value, seeds=seeds, against=about, **more, **shared))

    for cell in found.success:
        against: dict[str, Any] = {f"{name}_fisher_p_unadjusted": p for name, p in cell.against.items()}
        claim = f"{cell.model}/{_word(cell.task)}/success"
        add(cell.task, claim, cell.rate, unit="share", n=cell.n, low=cell.low, high=cell.high, against=against)
    for mean in found.scores:
        claim, against = f"{mean.model}/{_word(mean.task)}/{mean.score}", {"missing": mean.missing}
        add(mean.task, claim, mean.mean, unit=unit(mean.score), n=mean.n, low=mean.low, high=mean.high, against=against)
    for row in [*found.paired, *found.gaps]:
        claim = f"{row.a}-minus-{row.b}/{_word(row.task)}/success_difference"
        against = {"only_a": row.only_a, "only_b": row.only_b, "dropped": row.dropped}
        against |= {"mcnemar_p": row.p, "p_holm": row.p_holm} if row.p is not None else {}
        add(row.task, claim, row.difference, unit="share", n=row.n, low=row.low, high=row.high, against=against)
    for score in found.score_differences:
        claim = f"{score.a}-minus-{score.b}/{_word(score.task)}/{score.score}_difference"
        against = {"missing": score.missing, "sign_flip_p": score.p, "p_holm": score.p_holm}
        interval = {"low": score.low, "high": score.high}
        add(score.task, claim, score.difference, unit=unit(score.score), n=score.n, against=against, **interval)
    for seed in found.seeds:
        claim = f"recipes/{seed.a}-minus-{seed.b}/{_word(seed.task)}/{seed.measure}_difference"
        against = {"p": seed.p, "p_holm": seed.p_holm, "p_smallest": seed.p_smallest, "method": seed.method}
        n = seed.seeds_a if seed.method.startswith("paired") else seed.seeds_a + seed.seeds_b
        about = {"unit": "share" if seed.measure == "success" else unit(seed.measure), "n": n}
        add(seed.task, claim, seed.difference, low=seed.low, high=seed.high, against=against, **about)
    return lines


def imagined_success_lines(
    found: Mapping[str, ImaginedSuccess],
    config: CompareConfig,
    scene_seeds: Mapping[str, Sequence[int]],
    *,
    command: str,
    provenance: Mapping[str, Any],
) -> list[Any]:
    """Balanced accuracy and calibration of every model's imagined success; what one class alone cannot show has no line."""
    from physisforcing.planner.measurements import measurement

    seeds = sorted({seed for seeds in scene_seeds.values() for seed in seeds})
    shared: dict[str, Any] = {"seeds": seeds, "command": command, "provenance": provenance}
    lines = []
    for name, score in found.items():
        claim = f"compare/{config.claims}/{name.replace(', ', '/').replace(' ', '_')}/imagined_success"
        against = {"missing": score.missing, "successes": score.successes, "note": score.note}
        if score.balanced_accuracy is not None:
            interval = {"low": score.low, "high": score.high}
            value = score.balanced_accuracy
            lines.append(
                measurement(
                    f"{claim}/balanced_accuracy", value, unit="share", n=score.n, against=against, **interval, **shared
                )
            )
        for word, measured_in in (("ece", "probability"), ("brier", "probability^2"), ("brier_base", "probability^2")):
            if (value := getattr(score, word)) is not None:
                lines.append(
                    measurement(f"{claim}/{word}", value, unit=measured_in, n=score.n, against=against, **shared)
                )
    return lines


def _word(task: str) -> str:
    return task.replace(" ", "_")


#: What a score is measured in, by how its name ends once the horizon, ``_floor`` and ``_to_other`` are taken off.
UNITS = {
    "px": "px of 240x320",
    "mm": "mm",
    "deg": "deg",
    "steps": "control steps",
    "seconds": "s",
    "chunks": "chunks",
    **dict.fromkeys(
        ("lost", "unjudged", "unseen", "missing", "missed", "false", "unknown", "melted", "persists"), "share"
    ),
}
UNKNOWN_UNIT = "unit not known"


def unit(score: str) -> str:
    """Of a score, from its name."""
    name = re.sub(r"_\d+(\.\d+)?s$", "", score.removesuffix("_floor")).removesuffix("_to_other")
    return UNITS.get(name.rsplit("_", 1)[-1], UNKNOWN_UNIT)


def report_data(
    config: CompareConfig,
    plan: ComparisonPlan,
    rows: Sequence[Mapping[str, Any]],
    found: Comparison,
    verdicts: list[str],
    success: Mapping[str, ImaginedSuccess],
    sensitivity: Sequence[Sensitivity] = (),
) -> ReportData:
    """Everything on the page."""
    output = Path(config.output)
    filmed, hidden = within_bytes(scene_players(plan, rows), output)
    failed = [player for row in rows if (player := failure_player(row, plan)) is not None]
    spent = sum((output / panel.path).stat().st_size for player in filmed for panel in player.panels)
    failures, hidden_failures = within_bytes(failed, output, max(0, 12 * 2**20 - spent))
    scenes = ", ".join(f"{task} ({name})" for task, name in plan.scenes.manifests.items())
    return ReportData(
        title=found.title,
        summary=f"{', '.join(plan.models) or 'No world model'} under the same planner and decoder in the same scenes: {scenes}; control {config.control}, "
        f"{config.planner.execute_horizon} steps executed a plan. " + " ".join(found.notes),
        created=datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        success=success_rows(found),
        closed_loop="Whole episodes in the simulator on scenes that no model was trained on. Bars: 95 % Wilson intervals. Grey: controls.",
        players=filmed,
        players_note=_left_out(hidden),
        failures=failures,
        failures_note=_left_out(hidden_failures),
        tables=tables(found, imagined=success, sensitivity=sensitivity),
        verdicts=verdicts,
        skipped=[f"{name}: skipped: needs {what}" for name, what in plan.skipped.items()],
        crashed=found.errors,
        published=published_tables(),
        limits=[*LIMITS, found.family],
    )


def _left_out(count: int) -> str:
    return f"{count} more are in the run folder: the page is kept below its size." if count else ""


# ---------------------------------------------------------------------------------------------------------------- players


def scene_players(plan: ComparisonPlan, rows: Sequence[Mapping[str, Any]]) -> list[Player]:
    """One player a filmed scene: of every model and control what it imagined, with its tracks, and what was executed."""
    found = []
    for task, seed in sorted(plan.filmed):
        mine = {str(r["policy"]): r for r in rows if (r["task"], r["seed"]) == (task, seed) and r.get("panels")}
        panels = [panel for name in plan.names if name in mine for panel in _panels(mine[name])]
        if panels:
            sentence = next(iter(mine.values())).get("instruction", "")
            outcomes = ", ".join(f"{name} {WORDS[row['status']]}" for name, row in mine.items())
            found.append(Player(title=f"{task}, scene {seed}", caption=f"{sentence} {outcomes}.", panels=panels))
    return found


def failure_player(row: Mapping[str, Any], plan: ComparisonPlan) -> Player | None:
    """An episode of a model that did not succeed."""
    if row["status"] != "failure" or not row.get("panels") or row["policy"] not in plan.models:
        return None
    shown = ("object_px_0.96s", "pose_mm", "onset_error_steps", "object_melted")
    scores = row.get("scores") or {}
    told = ", ".join(f"{name} {scores[name]:.3g}" for name in shown if scores.get(name) is not None)
    return Player(
        title=f"{row['policy']} on {row['task']}, scene {row['seed']}",
        caption=f"{row.get('instruction', '')} {row.get('steps', 0)} control steps. {told}",
        panels=_panels(row),
        outcome="failure",
    )


def _panels(row: Mapping[str, Any]) -> list[Panel]:
    return [Panel(**panel) for panel in row["panels"]]


# ---------------------------------------------------------------------------------------------------------------- others


def published_tables() -> list[Table]:
    """Published rows of WorldArena's planner, apart from ours."""
    from physisforcing.planner.worldarena import published

    told = published()
    names = list(told["tasks"])
    rows = [
        [row["planner"], *(f"{row[t]:g} %" for t in names), f"{row['mean']:g} %", ", ".join(row["sources"])]
        for row in told["rows"]
    ]
    sources = "; ".join(f"{short}: {long}" for short, long in told["sources"].items())
    head = ["planner", *names, "mean", "source"]
    return [Table(title=told["title"], text=f"{told['note']} {sources}.", head=head, rows=rows, numeric=[1, 2, 3])]
