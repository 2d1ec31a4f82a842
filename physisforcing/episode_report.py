"""What ``physis eval plan`` and ``physis eval policy`` both say of episodes that were run: notes, files, the printed summary."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from physisforcing.core.errors import IncompleteCoverageError
from physisforcing.core.files import replace_text
from physisforcing.core.lerobot_format import write_json

if TYPE_CHECKING:
    from .episode_settings import EpisodeSettings
    from .plan_scenes import Scenes

#: Said where no demonstrations are given.
RETRIEVAL_SKIPPED = "retrieval skipped: needs train_demos=FOLDER (demonstrations with training seeds)"


def scene_notes(config: EpisodeSettings, scenes: Scenes, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the episodes of these result lines were run, and how they are counted."""
    scene = {name: rows[0].get(name) for name in ("assets", "embodiment", "renderer", "runtime")} if rows else {}
    return [
        f"scenes: {', '.join(f'{task} {name}' for task, name in scenes.manifests.items())}; control {config.control}; "
        + ", ".join(f"{name} {value}" for name, value in scene.items() if value),
        "interval: 95 % Wilson; p: two-sided Fisher exact test; errors stand in no denominator",
        f"{config.threads} numeric threads; another number may round differently",
    ]


def write_report(output: Path, summary: Mapping[str, Any], text: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """Summary, its text, its measurements and where they come from (the summary's ``provenance`` and ``command``), into ``output``."""
    replace_text(output / "summary.md", text)
    write_json(output / "summary.json", summary)
    write_json(output / "provenance.json", summary["provenance"] | {"command": summary["command"]})
    write_json(output / "measurements.json", lines)


def print_summary(summary: Mapping[str, Any], output: str, *, as_json: bool) -> int:
    """Print it as JSON or as the text in ``output``; returns 0. ``IncompleteCoverageError`` (exit code 3) when episodes ended in errors."""
    print(json.dumps(summary, indent=2) if as_json else (Path(output) / "summary.md").read_text())
    errors = sum(entry["errors"] for task in summary["tasks"].values() for entry in task.values())
    if errors:
        raise IncompleteCoverageError(f"{errors} episodes ended in errors; retry_errors=true runs them again")
    return 0
