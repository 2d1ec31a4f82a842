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
    ReportData,
    Stage,
    SuccessRow,
    load_report,
)
from .runs import from_run
from .write import MAX_BYTES, write_report

__all__ = [
    "MAX_BYTES",
    "Curve",
    "Figure",
    "LossChange",
    "ReportData",
    "Stage",
    "SuccessRow",
    "from_run",
    "load_report",
    "main",
    "write_report",
]
