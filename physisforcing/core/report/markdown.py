"""The Markdown twin: tables to paste into an issue or a paper draft; figures are linked, not embedded."""

from __future__ import annotations

import re

from .data import Player, ReportData, films_heading
from .html import duration, range_text
from .players import OUTCOMES


def render_markdown(data: ReportData) -> str:
    parts = [f"# {_text(data.title)}", "", _text(data.summary), "", f"Written {_text(data.created)}.", ""]
    for heading, figures in (
        (films_heading(data.imagined), data.imagined),
        ("What the physics losses look at", data.physics),
    ):
        if figures:
            parts += [f"## {heading}", ""]
            parts += [f"- [{_text(f.title)}]({f.path.replace(' ', '%20')}): {_text(f.caption)}" for f in figures] + [""]
    for heading, players, note in (
        ("Real and imagined on one clock", data.players, data.players_note),
        ("Failures", data.failures, data.failures_note),
    ):
        if players or note:
            parts += [f"## {heading}", "", *([_text(note), ""] if note else [])]
            parts += [line for player in players for line in _player(player)] + [""]
    if data.losses:
        parts += ["## Held-out loss before and after training", "", _text(data.held_out), ""]
        rows = [
            [c.term, f"{c.before:.5g}", f"{c.after:.5g}", "lower" if c.lower else "not lower", c.meaning]
            for c in data.losses
        ]
        parts += _table(["loss term", "before", "after", "", "what it measures"], rows)
    if data.success:
        parts += ["## Closed loop", "", _text(data.closed_loop), ""]
        rows = [
            [r.task, r.policy, f"{r.successes} / {r.episodes}", range_text(r), str(r.errors), r.note]
            for r in data.success
        ]
        parts += _table(["task", "policy", "successes", "95 % interval", "crashed", "note"], rows)
    for heading, sentences in (
        ("What the controls say", data.verdicts),
        ("Skipped", data.skipped),
        ("Crashed episodes, in no denominator", data.crashed),
    ):
        if sentences:
            parts += [f"## {heading}", ""] + [f"- {_text(text)}" for text in sentences] + [""]
    for heading, tables in (
        ("Comparison", data.tables),
        ("Published numbers of others, not measured here", data.published),
    ):
        if tables:
            parts += [f"## {heading}", ""]
            for table in tables:
                parts += [f"### {_text(table.title)}", "", _text(table.text), "", *_table(table.head, table.rows)]
    if data.stages:
        parts += ["## Where the time went", ""]
        parts += _table(
            ["stage", "time", "", "what it did"],
            [[s.name, duration(s.seconds), "reused" if s.reused else "", s.what] for s in data.stages],
        )
    if data.provenance:
        parts += ["## Provenance", ""]
        rows = [[group, key, value] for group, values in data.provenance.items() for key, value in values.items()]
        parts += _table(["", "", ""], rows)
    if data.limits:
        parts += ["## What this does not show", ""] + [f"- {_text(text)}" for text in data.limits] + [""]
    return "\n".join(parts)


def _player(player: Player) -> list[str]:
    links = ", ".join(f"[{_text(panel.label)}]({panel.path.replace(' ', '%20')})" for panel in player.panels)
    outcome = f" ({OUTCOMES[player.outcome]})" if player.outcome else ""
    return [f"- {_text(player.title)}{outcome}: {links}. {_text(player.caption)}"]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *[[_text(cell) for cell in row] for row in rows]]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def _text(value: str) -> str:
    """Escape what Markdown or a viewer that passes HTML through would act on, and keep table cells on one line."""
    flat = re.sub(r"\s+", " ", str(value))
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", flat)
