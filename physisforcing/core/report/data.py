"""What a report says, as typed values that go to JSON and come back unchanged."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError

#: Version of the JSON twin; a reader refuses what it does not know.
SCHEMA = 1


@dataclass(slots=True, kw_only=True)
class Figure:
    """A picture (``.png``) or silent video (``.mp4``) on disk; ``path`` is relative to the run folder.

    ``panels``: headings over the columns of a picture that shows several things side by side, left to right.
    ``description``: what a reader who cannot see it is told.
    """

    path: str
    title: str
    caption: str
    description: str
    panels: list[str] = field(default_factory=list)


def films_heading(figures: Sequence[Figure]) -> str:
    """Above the films of a closed loop: those of a policy show what happened alone."""
    return "Imagined and executed" if any(len(one.panels) > 1 for one in figures) else "Executed"


@dataclass(slots=True, kw_only=True)
class Curve:
    """One value over training steps; ``unit`` is printed at the axis."""

    name: str
    steps: list[int]
    values: list[float]
    unit: str = ""
    meaning: str = ""

    def __post_init__(self) -> None:
        self.values = [float(value) for value in self.values]  # "nan" and "inf" are strings in JSON


@dataclass(slots=True, kw_only=True)
class LossChange:
    """A loss term on the same held-out windows, noise and timesteps before and after training; lower is better."""

    term: str
    meaning: str
    before: float
    after: float

    def __post_init__(self) -> None:
        self.before, self.after = float(self.before), float(self.after)  # "nan" is a string in JSON

    @property
    def lower(self) -> bool:
        return math.isfinite(self.after) and self.after < self.before


@dataclass(slots=True, kw_only=True)
class SuccessRow:
    """Closed-loop episodes of one policy on one task. ``errors`` counts crashed episodes, in no denominator."""

    task: str
    policy: str
    successes: int
    episodes: int
    errors: int = 0
    baseline: bool = False
    note: str = ""


@dataclass(slots=True, kw_only=True)
class Panel:
    """A video (``.mp4``) in a ``Player``, ``path`` relative to the run folder; ``label`` stands above it."""

    path: str
    label: str
    description: str


@dataclass(slots=True, kw_only=True)
class Player:
    """Videos that start together and play on one clock. ``outcome``: a status of ``core.results`` or nothing; ``frame_seconds``: what
    one press of an arrow key moves the time by."""

    title: str
    caption: str
    panels: list[Panel]
    outcome: str = ""
    frame_seconds: float = 0.12


@dataclass(slots=True, kw_only=True)
class Table:
    """Cells that are text already. ``numeric``: columns that are set flush right. ``text``: what the table shows and how it was made.
    ``folded``: the page shows its title alone until a reader opens it."""

    title: str
    text: str
    head: list[str]
    rows: list[list[str]]
    numeric: list[int] = field(default_factory=list)
    folded: bool = False


@dataclass(slots=True, kw_only=True)
class Stage:
    """A part of the run and the seconds it took; ``reused``: its files were there from a run with equal inputs."""

    name: str
    what: str
    seconds: float
    reused: bool = False


@dataclass(slots=True, kw_only=True)
class ReportData:
    """Everything in a report. Sections whose list is empty are left out and named at the end of the page.

    ``imagined``: figures of imagined beside executed video. ``physics``: tracks and mask drawn on a demonstration.
    ``held_out``: how the held-out loss was measured, in a sentence. ``provenance``: group -> name -> value.
    ``limits``: sentences on what the figures do not show. What a comparison adds: ``players``, ``failures`` (a gallery of them), each
    with a ``note`` on what was left out; ``tables``, ``verdicts`` (sentences on the controls), ``skipped`` (what could not run and what
    it needs), ``crashed`` (episodes that count nowhere, with what went wrong) and ``published`` (numbers of others, kept apart from what
    was measured here).
    """

    title: str
    summary: str
    created: str
    imagined: list[Figure] = field(default_factory=list)
    physics: list[Figure] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    losses: list[LossChange] = field(default_factory=list)
    held_out: str = ""
    success: list[SuccessRow] = field(default_factory=list)
    closed_loop: str = ""
    stages: list[Stage] = field(default_factory=list)
    provenance: dict[str, dict[str, str]] = field(default_factory=dict)
    limits: list[str] = field(default_factory=list)
    players: list[Player] = field(default_factory=list)
    players_note: str = ""
    failures: list[Player] = field(default_factory=list)
    failures_note: str = ""
    tables: list[Table] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    crashed: list[str] = field(default_factory=list)
    published: list[Table] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values; success rows carry their Wilson interval so that readers of the file need no statistics."""
        plain = dataclasses.asdict(self)
        for row, source in zip(plain["success"], self.success, strict=True):
            row["interval"] = interval(source)
        return {"schema": SCHEMA, **plain}


def _player(*, panels: list[dict[str, str]], **fields: Any) -> Player:
    return Player(panels=[Panel(**panel) for panel in panels], **fields)


def interval(row: SuccessRow) -> list[float] | None:
    """95 % Wilson interval [low, high] of the success rate, or None without episodes."""
    from ..stats import wilson

    if row.episodes == 0:
        return None
    low, high = wilson(row.successes, row.episodes)[:2]
    return [float(low), float(high)]


def load_report(path: str | Path) -> ReportData:
    """Read ``report.json``. ``UserError`` names a missing or damaged file and a field that is unknown or missing."""
    path = Path(path)
    fix = "run the command that wrote this run folder again"
    if not path.is_file():
        raise UserError(str(path), got="no such file", wanted="a report.json", fix=fix)
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(plain, dict) or plain.pop("schema", None) != SCHEMA:
            raise UserError(str(path), got="another schema", wanted=f"schema {SCHEMA}", fix=fix)
        for row in plain.get("success", []):
            row.pop("interval", None)
        parts: dict[str, Callable[..., Any]] = {
            "imagined": Figure,
            "physics": Figure,
            "curves": Curve,
            "losses": LossChange,
            "success": SuccessRow,
            "stages": Stage,
            "players": _player,
            "failures": _player,
            "tables": Table,
            "published": Table,
        }
        for name, kind in parts.items():
            plain[name] = [kind(**item) for item in plain.get(name, [])]
        return ReportData(**plain)
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise UserError(str(path), got=str(error), wanted="a report.json", fix=fix) from error
