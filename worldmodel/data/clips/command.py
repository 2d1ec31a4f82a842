"""``physis data prepare OUT IN to=clips``: clips of a table, a folder or a dataset, filtered, as ``clips.jsonl`` with a report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from physisforcing.core.errors import IncompleteCoverageError
from physisforcing.core.shards import parse_shard

from .alignment import PredictedAlignment, TextAlignment
from .config import ClipsConfig
from .decide import Decision, candidate_pairs, decide, least_alignment
from .manifest import NAME, ClipManifest, ClipRecord, relative, write_records
from .measure import Measured, Measurer
from .pairs import PairLikeness
from .report import build_report, write_report, write_sheet
from .sources import ClipSource, list_clips


def prepare_clips(
    output: str | Path, root: str | Path, config: ClipsConfig | None = None, *, progress: bool = False
) -> dict[str, Any]:
    """Measure, decide, write; returns the summary (counts, the fingerprint of the kept clips, paths).

    ``UserError`` for settings and tables that do not fit. A video that cannot be read is dropped as ``unreadable`` and counted.
    """
    config = config or ClipsConfig()
    config.check()
    output = Path(output)
    layout, sources = list_clips(
        root, columns=config.columns, videos=config.videos, captions=config.captions, camera=config.camera
    )
    alignment = _alignment(config)
    measurer = Measurer(output, alignment, config.device)
    torn = measurer.file.report_torn()
    if torn and progress:
        print(torn, file=sys.stderr)
    part = parse_shard(config.shard)
    measurer.run(sources, part=part, progress=progress)
    measurer.file.reload()
    found = [measurer.known(source) for source in sources]
    missing = sum(one is None for one in found)
    if missing:
        return {"output": str(output), "layout": layout, "clips": len(sources), "unmeasured": missing}
    measured = [one for one in found if one is not None]
    pairs = candidate_pairs(sources, measured, config)
    likeness = PairLikeness(output, sources, measured, config.duplicates.shift)
    missing = likeness.run(pairs, part=part, progress=progress)
    if missing:
        return {"output": str(output), "layout": layout, "clips": len(sources), "uncompared": missing}
    decisions = decide(sources, measured, config, likeness, alignment, pairs=pairs)
    return _write(output, layout, config, sources, measured, decisions)


def _alignment(config: ClipsConfig) -> TextAlignment:
    if config.alignment.model == "image_text" and "alignment" in config.filters:
        from .image_text import ImageTextAlignment

        assert config.alignment.path is not None
        return ImageTextAlignment(config.alignment.path, device=config.device)
    return PredictedAlignment()


def _write(
    output: Path,
    layout: str,
    config: ClipsConfig,
    sources: Sequence[ClipSource],
    measured: Sequence[Measured],
    decisions: Sequence[Decision],
) -> dict[str, Any]:
    records = []
    for source, one, made in zip(sources, measured, decisions, strict=True):
        detail = made.detail
        if made.original >= 0:
            detail = f"repeats {measured[made.original].id}"
        elif made.reason == "misaligned":
            detail = f"alignment {made.scores['alignment']:.3f}: {source.caption[:80]}"
        records.append(
            ClipRecord(
                id=one.id or hashlib.sha256(str(source.span).encode()).hexdigest()[:32],
                path=relative(source.span.path, output),
                start=source.span.start,
                frames=one.frames,
                fps=one.fps,
                height=one.height,
                width=one.width,
                caption=source.caption,
                task=source.task,
                scores={name: round(value, 6) for name, value in made.scores.items()},
                kept=not made.reason,
                reason=made.reason,
                detail=detail,
            )
        )
    write_records(output / NAME, records)
    spans = [source.span for source in sources]
    originals = [made.original for made in decisions]
    drawn = config.sheet and write_sheet(output / "dropped.png", records, spans, originals)
    manifest = ClipManifest(output)
    report = build_report(records, [s.where for s in sources], layout, _settings(config), manifest.fingerprint())
    write_report(output, report, sheet=drawn)
    kept = ("clips", "kept", "dropped", "seconds_kept", "layout", "fingerprint")
    unreadable = [record.path for record in records if record.reason == "unreadable"]
    return {"output": str(output), **{name: report[name] for name in kept}, "unreadable": unreadable}


def _settings(config: ClipsConfig) -> dict[str, Any]:
    """What decided: thresholds in force, without where anything lies or runs."""
    told = dataclasses.asdict(config)
    for name in ("columns", "videos", "captions", "shard", "device", "sheet"):
        del told[name]
    del told["alignment"]["path"]
    told["alignment"]["least"] = least_alignment(config)
    return told


def run(output: str, root: str, config: ClipsConfig, *, as_json: bool) -> int:
    """The command after its settings were read. ``IncompleteCoverageError`` when videos could not be read."""
    summary = prepare_clips(output, root, config, progress=True)
    if as_json:
        print(json.dumps(summary, indent=2))
    elif "unmeasured" in summary:
        print(f"{output}: {summary['unmeasured']} of {summary['clips']} clips are measured by other shards, or not yet")
    elif "uncompared" in summary:
        again = "run each shard once more, or all of it without shard="
        print(f"{output}: all is measured, and {summary['uncompared']} pairs of clips are not compared yet: {again}")
    else:
        print(f"{output}: {summary['kept']} of {summary['clips']} clips kept, from a {summary['layout']}")
        for reason, count in summary["dropped"].items():
            print(f"  {reason:<12}{count:>6}")
        print(f"  see {Path(output) / 'report.md'}")
    bad = summary.get("unreadable", [])
    if bad:
        names = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
        raise IncompleteCoverageError(
            f"{len(bad)} videos cannot be read: {names}; {Path(output) / 'report.md'} names all"
        )
    return 0
