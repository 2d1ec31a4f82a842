"""`physis report RUN`: write the report of a run folder, from the files that the run left there."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .runs import from_run
from .write import write_report


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
