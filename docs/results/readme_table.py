"""Write the results table of the README from the measurements in this folder: ``python docs/results/readme_table.py``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
README = FOLDER.parents[1] / "README.md"
BEGIN, END = "<!-- results:begin -->\n", "<!-- results:end -->"
NOTHING = "No measurement has been recorded yet.\n"
HEAD = "| claim | success | 95 % interval | episodes | p against no-op, random |\n|---|---|---|---|---|\n"
NOTE = (
    "\n`planner/<control>/model` is the shipped world model with the shipped decoder; `noop`, `random`, `retrieval` (the nearest "
    "training\ndemonstration replayed) and `retrieval_video` (its video decoded) are baselines; `planner/oracle` decodes real videos "
    "of held-out\ndemonstrations; `expert` is the scripted expert and `env/replay` its recorded\nactions replayed. Intervals: Wilson. p: two-sided Fisher exact test. Commands, seeds, "
    "hardware and versions\nof every line, and all other measurements: [docs/results](docs/results).\n"
)


def success_lines() -> list[dict[str, Any]]:
    """The measurements whose claim ends in ``/success``, sorted by claim."""
    lines: list[dict[str, Any]] = []
    for path in sorted(FOLDER.glob("*.json")):
        lines += json.loads(path.read_text(encoding="utf-8"))
    return sorted((line for line in lines if line["claim"].endswith("/success")), key=lambda line: line["claim"])


def row(line: dict[str, Any]) -> str:
    """One measurement as a row of the table."""
    against = line["against"] if isinstance(line["against"], dict) else {}
    tests = [f"{against[name]:.2g}" for name in ("noop_p", "random_p") if against.get(name) is not None]
    interval = "" if line["low"] is None else f"{100 * line['low']:.0f} to {100 * line['high']:.0f} %"
    return f"| `{line['claim']}` | {100 * line['value']:.0f} % | {interval} | {line['n']} | {', '.join(tests)} |"


def table() -> str:
    lines = success_lines()
    return HEAD + "".join(row(line) + "\n" for line in lines) + NOTE if lines else NOTHING


def main() -> None:
    text = README.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    assert pattern.search(text), "the README has a place for the table"
    README.write_text(pattern.sub(lambda _: BEGIN + table() + END, text), encoding="utf-8")


if __name__ == "__main__":
    main()
