"""One self-contained page about a run: HTML to look at, Markdown to quote, JSON to compute with.

``ReportData`` holds the facts; ``write_report`` renders them; ``load_report`` reads the JSON twin back; ``from_run``
fills one from the files of a run folder.
"""

from __future__ import annotations

from .command import main
from .data import (
    Curve,
    Figure,
    LossChange,
    Panel,
    Player,
    ReportData,
    Stage,
    SuccessRow,
    Table,
    load_report,
)
from .players import within_bytes
from .runs import from_run
from .write import MAX_BYTES, write_report

__all__ = [
    "MAX_BYTES",
    "Curve",
    "Figure",
    "LossChange",
    "Panel",
    "Player",
    "ReportData",
    "Stage",
    "SuccessRow",
    "Table",
    "from_run",
    "load_report",
    "main",
    "within_bytes",
    "write_report",
]
