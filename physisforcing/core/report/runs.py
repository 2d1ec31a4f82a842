"""From the files that a run leaves in its folder to a ``ReportData``."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..results import ResultsFile
from ..types import DT
from .data import Curve, Figure, LossChange, ReportData, SuccessRow, load_report

#: Keys of a training log that become curves when they are present, and what each means.
CURVES = {
    "loss": "what training minimises: the weighted sum of the terms",
    "fm": "L_FM: how well the denoiser predicts the velocity",
    "pix": "L_pix: how well the features find points again",
    "sem": "L_sem: how well feature similarities match the encoder's",
    "action": "squared error of the predicted velocity of the actions",
    "video": "squared error of the predicted velocity of the video",
    "l1": "mean absolute error of the autoencoder's pictures, range 2",
}
#: Loss terms: key in the trainer's files -> name and meaning.
TERMS = {
    "fm": ("L_FM, flow matching", "squared error of the predicted velocity, weighted towards what moves"),
    "pix": ("L_pix, trajectory", "squared distance between matched and true point positions, picture size = 1"),
    "action": ("actions", "squared error of the predicted velocity of the actions"),
    "video": ("video", "squared error of the predicted velocity of the video"),
    "sem": ("L_sem, relation", "mean difference between the features' and the frozen encoder's similarities"),
}
#: Policies of a closed loop: name in results -> name in reports, and what it does. What is not here keeps its name.
POLICIES = {
    "model": ("world model + inverse dynamics", "imagines, decodes, executes, imagines again"),
    "noop": ("no-op", "holds the first joint targets"),
    "random": ("random", "a new random target every 16 steps"),
    "retrieval": ("retrieval", "replays the actions of the most similar training demonstration"),
    "retrieval_video": ("retrieval through the decoder", "decodes the video of the most similar demonstration"),
    "oracle": ("oracle", "decodes the real video of the same scene"),
    "black": ("oracle, black pictures", "decodes a black video"),
    "other": ("oracle, another episode", "decodes the video of another episode"),
    "recorded": ("recorded actions", "replays the recorded actions of the same scene"),
}
#: What a run appends to while it goes on.
LOGS = ("metrics.jsonl", "results.jsonl")
#: Parts of a result's key that are equal within one evaluation of one policy on one task.
KEY = ("manifest", "fingerprint", "config")
#: Policies that are measured, not compared with.
MEASURED = ("model", "oracle")
CLOSED_LOOP = (
    "Each row counts whole episodes in the simulator on scenes that no model was trained on; the task's own check decides. "
    "The bar is the 95 % Wilson interval: with few episodes it is wide, and the true rate may lie anywhere in it. Grey rows "
    "are baselines."
)
#: Videos of one task in a report.
VIDEOS_A_TASK = 3


def from_run(folder: str | Path) -> ReportData:
    """What the files of a run folder say.

    Reads ``report.json`` in a folder that holds no log and no results (the demo's); else ``metrics.jsonl`` (curves), ``heldout.json`` (losses before and
    after), ``results.jsonl`` with its videos (episodes) and ``provenance.json``. ``UserError`` when the folder has none.
    """
    folder = Path(folder)
    # Beside a log or results it is the twin of an earlier report, and the run may have gone on since.
    if (folder / "report.json").is_file() and not any((folder / name).is_file() for name in LOGS):
        return load_report(folder / "report.json")
    curves = read_curves(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    rows = ResultsFile(folder / "results.jsonl").rows
    if not curves and not rows:
        fix = "name the folder that `physis demo`, `physis train` or `physis eval` printed"
        wanted = "a run folder with report.json, metrics.jsonl or results.jsonl"
        if (folder / "metrics.jsonl").is_file():
            wanted, fix = "a log with two lines or more", "train further, or write lines more often (run.log_every)"
        raise UserError("run", got=str(folder), wanted=wanted, fix=fix)
    heldout = folder / "heldout.json"
    return ReportData(
        title=f"Run {folder.resolve().name}",
        summary="Written from the log and results that the run left in its folder.",
        created=_created(folder),
        imagined=read_pairs(folder, folder, rows),
        curves=curves,
        losses=read_losses(json.loads(heldout.read_text(encoding="utf-8"))) if heldout.is_file() else [],
        held_out="The same held-out windows, noise and timesteps before and after training.",
        success=read_success(rows),
        closed_loop=CLOSED_LOOP if rows else "",
        provenance=read_provenance(folder / "provenance.json"),
    )


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a JSONL file; a last line cut off by a kill is left out, damage elsewhere is a ``UserError``."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return
            raise UserError(f"{path}:{number}", got=str(error), wanted="JSON", fix="delete this line") from error


def read_curves(path: Path) -> list[Curve]:
    """Curves of a training log whose lines have ``step`` and loss terms."""
    curves = []
    lines = [line for line in read_jsonl(path) if "step" in line]
    for name, meaning in CURVES.items():
        points = [(int(line["step"]), float(line[name])) for line in lines if line.get(name) is not None]
        if len(points) > 1:
            steps, values = zip(*points, strict=True)
            curves.append(Curve(name=name, steps=list(steps), values=list(values), meaning=meaning))
    return curves


def read_losses(heldout: Mapping[str, Mapping[str, float]]) -> list[LossChange]:
    """Terms of ``heldout.json`` that were measured before and after; empty while a run is unfinished."""
    before, after = heldout.get("before", {}), heldout.get("after", {})
    return [
        LossChange(term=name, meaning=meaning, before=before[f"heldout_{key}"], after=after[f"heldout_{key}"])
        for key, (name, meaning) in TERMS.items()
        if f"heldout_{key}" in before and f"heldout_{key}" in after
    ]


def read_success(rows: Iterable[Mapping[str, Any]]) -> list[SuccessRow]:
    """Counts per task, policy and key of episode results (``core.results``); crashed episodes are counted apart.

    Episodes of other scenes, weights or settings are other measurements: they get a row of their own, whose note says what
    differs. The row of the last evaluation is the one in its ``summary.json``.
    """
    groups = _groups(rows)
    order = {name: place for place, name in enumerate(POLICIES)}
    table = []
    for (task, policy, *key), mine in sorted(groups.items(), key=lambda item: (item[0][0], order.get(item[0][1], 99))):
        name, note = POLICIES.get(policy, (policy, ""))
        statuses = [row["status"] for row in mine]
        errors = statuses.count("error")
        table.append(
            SuccessRow(
                task=task,
                policy=name,
                successes=statuses.count("success"),
                episodes=len(statuses) - errors,
                errors=errors,
                baseline=policy in POLICIES and policy not in MEASURED,
                note="; ".join(
                    filter(None, [note, _difference(key, [k[2:] for k in groups if k[:2] == (task, policy)])])
                ),
            )
        )
    return table


def _groups(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, ...], list[Mapping[str, Any]]]:
    """Rows by task, policy and the parts of the key that one evaluation keeps."""
    found: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(str(row.get(name, "")) for name in ("task", "policy", *KEY)), []).append(row)
    return found


def _difference(key: Sequence[str], keys: Sequence[Sequence[str]]) -> str:
    """The parts of ``key`` in which the ``keys`` differ, in words; empty when there is one key."""
    return ", ".join(
        f"{name} {value}"
        for name, value, all_ in zip(KEY, key, zip(*keys, strict=True), strict=True)
        if len(set(all_)) > 1
    )


def read_pairs(folder: Path, base: Path, rows: Iterable[Mapping[str, Any]], limit: int = VIDEOS_A_TASK) -> list[Figure]:
    """The first ``limit`` filmed episodes a task and evaluation, in the order of their seeds, whatever came of them.

    ``row["video"]`` is relative to ``base``, figures' paths to ``folder``.
    """
    figures: list[Figure] = []
    groups = _groups(row for row in rows if row.get("video"))
    for (task, policy, *key), mine in sorted(groups.items(), key=lambda item: item[0][0]):
        difference = _difference(key, [k[2:] for k in groups if k[:2] == (task, policy)])
        for row in sorted(mine, key=lambda row: row["seed"])[:limit]:
            figures.append(_pair(folder, base / row["video"], row))
            figures[-1].title += f" ({difference})" if difference else ""
    return figures


def _pair(folder: Path, video: Path, row: Mapping[str, Any]) -> Figure:
    outcome = {"success": "succeeded", "failure": "did not succeed", "error": "crashed"}[row["status"]]
    telemetry = row.get("telemetry") or {}
    plans, resampled = int(telemetry.get("plans", 0)), int(telemetry.get("resampled", 0))
    imagines = "resampled" in telemetry
    planning = f" {plans} plan{'s' * (plans != 1)}"
    planning += f", {resampled} imagined again because they would not have moved the robot." if imagines else "."
    pair = imagines or row["policy"] in POLICIES
    panels = ["imagined by the model" if plans else "video that was decoded", "executed in the simulator"]
    description = "Left: the video that the model imagined. Right: the video that the simulator rendered."
    return Figure(
        path=video.relative_to(folder).as_posix(),
        title=f"{row['task']}, scene {row['seed']}: {outcome}",
        caption=(
            f"Instruction: {row.get('instruction', '')} {row.get('steps', 0)} control steps "
            f"({row.get('steps', 0) * DT:.1f} s, real time).{planning if plans else ''}"
        ),
        description=description if pair else "The video that the simulator rendered.",
        panels=panels if pair else [f"executed in the simulator by {row['policy']}"],
    )


def read_provenance(path: Path) -> dict[str, dict[str, str]]:
    """``provenance.json``: nested values become groups, the rest goes into one group; empty when there is no file."""
    if not path.is_file():
        return {}
    plain = json.loads(path.read_text(encoding="utf-8"))
    groups: dict[str, dict[str, str]] = {}
    for key, value in plain.items():
        if isinstance(value, dict):
            groups[str(key)] = {str(k): _short(v) for k, v in value.items()}
        else:
            groups.setdefault("run", {})[str(key)] = _short(value)
    return groups


def _short(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def _created(folder: Path) -> str:
    newest = max(path.stat().st_mtime for path in folder.iterdir() if path.is_file())
    return datetime.datetime.fromtimestamp(newest, tz=datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
