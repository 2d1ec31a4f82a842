"""`physis report RUN`: write the report of a run folder, from the files that the run left there."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from .data import Curve, ReportData, SuccessRow, load_report
from .write import write_report

#: Keys of a training log that become curves when they are present, and what each means.
CURVES = {
    "loss": "the sum that training minimises",
    "loss_fm": "flow matching: how well the denoiser predicts the velocity",
    "loss_pix": "trajectory loss: squared distance of matched points, picture size = 1",
    "loss_sem": "relation loss: mean difference of feature similarities",
    "val_loss": "the same sum on windows that are not trained on",
}
BASELINES = ("noop", "no-op", "random", "retrieval")


def main(argv: list[str]) -> int:
    """Entry of ``physis report``."""
    parser = argparse.ArgumentParser(
        prog="physis report",
        description="Write report.html, report.md and report.json into a run folder.",
        epilog="example: physis report runs/demo",
    )
    parser.add_argument("run", type=Path, help="run folder (of demo, train or eval)")
    parser.add_argument("--json", action="store_true", help="print the paths as JSON")
    arguments = parser.parse_args(argv)
    page = write_report(from_run(arguments.run), arguments.run)
    paths = {kind: str(page.with_suffix(f".{kind}")) for kind in ("html", "md", "json")}
    print(json.dumps(paths) if arguments.json else f"report: {paths['html']}")
    return 0


def from_run(folder: str | Path) -> ReportData:
    """What the files of a run folder say.

    Reads ``report.json`` where a command wrote one; else ``metrics.jsonl`` (curves), ``results.jsonl`` (episodes) and
    ``provenance.json``. ``UserError`` when the folder has none of them.
    """
    folder = Path(folder)
    if (folder / "report.json").is_file():
        return load_report(folder / "report.json")
    curves = read_curves(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    success = read_success(folder / "results.jsonl") if (folder / "results.jsonl").is_file() else []
    if not curves and not success:
        fix = "name the folder that `physis demo`, `physis train` or `physis eval` printed"
        wanted = "a run folder with report.json, metrics.jsonl or results.jsonl"
        raise UserError("run", got=str(folder), wanted=wanted, fix=fix)
    return ReportData(
        title=f"Run {folder.resolve().name}",
        summary="Written from the log and results that the run left in its folder.",
        created=_created(folder),
        curves=curves,
        success=success,
        closed_loop=CLOSED_LOOP if success else "",
        provenance=read_provenance(folder / "provenance.json"),
    )


CLOSED_LOOP = (
    "Each row counts whole episodes in the simulator on scenes that no model was trained on; the task's own check "
    "decides. The bar is the 95 % Wilson interval: with few episodes it is wide, and the true rate may lie anywhere in "
    "it. Grey rows are baselines."
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


def read_curves(path: Path, names: dict[str, str] | None = None) -> list[Curve]:
    """Curves of a training log whose lines have ``step`` and loss terms."""
    curves = []
    lines = list(read_jsonl(path))
    for name, meaning in (names or CURVES).items():
        points = [
            (int(line["step"]), float(line[name])) for line in lines if "step" in line and line.get(name) is not None
        ]
        if points:
            steps, values = zip(*points, strict=True)
            curves.append(Curve(name=name, steps=list(steps), values=list(values), meaning=meaning))
    return curves


def read_success(path: Path) -> list[SuccessRow]:
    """Counts per (task, policy) of a results file (``core.results``); crashed episodes are counted apart."""
    from ..results import ResultsFile

    rows: dict[tuple[str, str], SuccessRow] = {}
    for line in ResultsFile(path).rows:
        task, policy = str(line.get("task", "")), str(line.get("policy", ""))
        baseline = policy in BASELINES
        empty = SuccessRow(task=task, policy=policy, successes=0, episodes=0, baseline=baseline)
        row = rows.setdefault((task, policy), empty)
        row.errors += line["status"] == "error"
        row.episodes += line["status"] != "error"
        row.successes += line["status"] == "success"
    return sorted(rows.values(), key=lambda row: (row.task, row.baseline, row.policy))


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
    import datetime

    newest = max(path.stat().st_mtime for path in folder.iterdir() if path.is_file())
    return datetime.datetime.fromtimestamp(newest, tz=datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
