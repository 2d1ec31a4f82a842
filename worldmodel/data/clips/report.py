"""What was dropped and why: ``report.json``, ``report.md`` and a sheet of pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from physisforcing.core.errors import DatasetError
from physisforcing.core.files import replace_text

from .decide import REASONS
from .decode import Span, cover, sample
from .manifest import ClipRecord, summary_of

#: Examples of a reason in the report and on the sheet.
EXAMPLES, PICTURED = 20, 6
#: Scores that are summarised.
SCORES = ("motion", "cut", "sharpness", "likeness", "alignment")
TILE = (96, 128)


def build_report(
    records: Sequence[ClipRecord], wheres: Sequence[str], layout: str, settings: dict[str, Any], fingerprint: str
) -> dict[str, Any]:
    """The report as data: counts, thresholds, quantiles of the scores, and every clip that was dropped. No times, no paths of a
    machine beyond those of the manifest: equal inputs give equal reports."""
    dropped = [
        {
            "reason": record.reason,
            "detail": record.detail,
            "where": where,
            "path": record.path,
            "id": record.id,
            "scores": record.scores,
        }
        for record, where in zip(records, wheres, strict=True)
        if not record.kept
    ]
    return {
        **summary_of(records),
        "layout": layout,
        "settings": settings,
        "fingerprint": fingerprint,
        "scores": {name: found for name in SCORES if (found := _quantiles(records, name)) is not None},
        "dropped_clips": dropped,
    }


def write_report(folder: Path, report: dict[str, Any], *, sheet: bool) -> None:
    """``report.json`` and ``report.md``; the page shows ``dropped.png`` where there is one."""
    replace_text(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    replace_text(folder / "report.md", markdown(report, sheet=sheet))


def markdown(report: dict[str, Any], *, sheet: bool) -> str:
    """The report for people."""
    lines = [
        "# Clips",
        "",
        f"{report['kept']} of {report['clips']} clips kept ({report['seconds_kept']:g} s), from a {report['layout']}.",
        "",
        "| reason | clips | what it means |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {report['dropped'].get(name, 0)} | {meaning} |" for name, meaning in REASONS.items()]
    if report["scores"]:
        lines += ["", "| score | 5 % | 25 % | median | 75 % | 95 % | clips |", "|---|---|---|---|---|---|---|"]
        for name, found in report["scores"].items():
            values = " | ".join(f"{value:.4f}" for value in found["quantiles"])
            lines.append(f"| {name} | {values} | {found['clips']} |")
    if sheet:
        lines += ["", "![Dropped clips](dropped.png)"]
    for name in REASONS:
        some = [one for one in report["dropped_clips"] if one["reason"] == name]
        if some:
            lines += ["", f"## {name}", ""]
            # Videos that cannot be read are somebody's work to mend: all of them are named.
            shown = some if name == "unreadable" else some[:EXAMPLES]
            lines += [f"- {one['where']}, `{one['path']}`{_told(one)}" for one in shown]
            if len(some) > len(shown):
                lines.append(f"- {len(some) - len(shown)} more in `report.json`")
    thresholds = json.dumps(report["settings"], sort_keys=True)
    return "\n".join([*lines, "", f"Settings: `{thresholds}`. Kept clips: `{report['fingerprint']}`.", ""])


def write_sheet(path: Path, records: Sequence[ClipRecord], spans: Sequence[Span], originals: Sequence[int]) -> bool:
    """A PNG with up to ``PICTURED`` dropped clips of each reason, a row each; beside a copy, what it repeats. False where none fits."""
    from PIL import Image

    rows = []
    for reason in REASONS:
        chosen = [i for i, record in enumerate(records) if record.reason == reason and record.frames]
        tiles = [tile for i in chosen[:PICTURED] for tile in _tiles(i, records, spans, originals)]
        if tiles:
            rows.append(_row(reason, tiles[: 2 * PICTURED]))
    if not rows:
        return False
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 4), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    Image.fromarray(np.concatenate(padded)).save(path)
    return True


def _tiles(i: int, records: Sequence[ClipRecord], spans: Sequence[Span], originals: Sequence[int]) -> list[Any]:
    shown = [i] if originals[i] < 0 else [i, originals[i]]
    tiles = []
    for clip in shown:
        try:
            middle = 0.5 * records[clip].seconds
            tiles.append(cover(sample(spans[clip], [middle])[0], TILE))
        except DatasetError:  # gone since it was measured
            tiles.append(np.full((*TILE, 3), 128, np.uint8))
    return tiles


def _row(label: str, tiles: Sequence[Any]) -> Any:
    from PIL import Image, ImageDraw

    pictures = np.concatenate([np.pad(tile, ((0, 0), (0, 4), (0, 0)), constant_values=255) for tile in tiles], axis=1)
    title = Image.new("RGB", (pictures.shape[1], 16), "white")
    ImageDraw.Draw(title).text((2, 2), label, fill="black")
    return np.concatenate([np.asarray(title), pictures])


def _quantiles(records: Sequence[ClipRecord], name: str) -> dict[str, Any] | None:
    values = [record.scores[name] for record in records if name in record.scores]
    if not values:
        return None
    found = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
    return {"quantiles": [round(float(value), 6) for value in found], "clips": len(values)}


def _told(one: dict[str, Any]) -> str:
    return f": {one['detail']}" if one["detail"] else ""
