"""Write the tables of results into the README and into this folder's pages: ``python docs/results/result_tables.py``.

A page has its table between two marks; which measurements of this folder's JSON files go there is said by ``PAGES``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
README = FOLDER.parents[1] / "README.md"
#: Page -> beginnings of the claims whose success rates it shows.
PAGES = {
    README: ("planner/",),
    FOLDER / "robotwin.md": ("expert/", "env/replay/"),
    FOLDER.parent / "perfect_model.md": ("env/perfect/",),
    FOLDER.parent / "worldarena.md": ("planner/worldarena",),
}
#: What has a page of its own and is left out of the README.
APART = ("planner/worldarena", "planner/pareto")
BEGIN, END = "<!-- results:begin -->\n", "<!-- results:end -->"
NOTHING = "No measurement has been recorded yet.\n"
HEAD = "| claim | success | 95 % interval | episodes | p against no-op, random |\n|---|---|---|---|---|\n"
NOTE = (
    "\n`planner/<control>/model` is the shipped world model with the shipped decoder; `noop`, `random`, `retrieval` (the nearest "
    "training\ndemonstration replayed) and `retrieval_video` (its video decoded) are baselines; `planner/oracle` decodes real videos "
    "of held-out\ndemonstrations. Intervals: Wilson. p: two-sided Fisher exact test. Success of the scripted expert on every task, and "
    "what else\nwas measured of the simulator: [docs/results/robotwin.md](docs/results/robotwin.md). Commands, seeds, hardware and "
    "versions of every\nline, and all other measurements: [docs/results](docs/results).\n"
)


def success_lines(beginnings: tuple[str, ...]) -> list[dict[str, Any]]:
    """The measurements of success whose claim has one of the beginnings, sorted by claim."""
    lines: list[dict[str, Any]] = []
    for path in sorted(FOLDER.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        lines += found if isinstance(found, list) else []
    chosen = (line for line in lines if line["claim"].endswith("success") and line["claim"].startswith(beginnings))
    return sorted(chosen, key=lambda line: line["claim"])


def row(line: dict[str, Any]) -> str:
    """One measurement as a row of the README's table."""
    against = line["against"] if isinstance(line["against"], dict) else {}
    tests = [f"{against[name]:.2g}" for name in ("noop_p", "random_p") if against.get(name) is not None]
    return f"| `{line['claim']}` | {rate(line)} | {', '.join(tests)} |"


def rate(line: dict[str, Any]) -> str:
    interval = "" if line["low"] is None else f"{100 * line['low']:.0f} to {100 * line['high']:.0f} %"
    return f"{100 * line['value']:.3g} % | {interval} | {line['n']}"


def why(line: dict[str, Any]) -> str:
    """What the failed episodes of an expert failed of; of a replay, the seeds that it did not repeat."""
    against = line["against"] if isinstance(line["against"], dict) else {}
    if missed := against.get("seeds_not_repeated"):
        return f"seeds {', '.join(map(str, missed))}"
    failures = against.get("failures", {})
    return ", ".join(f"{name}: {count}" for name, count in sorted(failures.items(), key=lambda item: -item[1]))


def table(page: Path) -> str:
    lines = success_lines(PAGES[page])
    if page == README:
        lines = [line for line in lines if not line["claim"].startswith(APART)]
    if not lines:
        return NOTHING
    if page == README:
        return HEAD + "".join(row(line) + "\n" for line in lines) + NOTE
    head = "| claim | success | 95 % interval | episodes | failures |\n|---|---|---|---|---|\n"
    return head + "".join(f"| `{line['claim']}` | {rate(line)} | {why(line)} |\n" for line in lines)


def filled(page: Path) -> str:
    """The page's text with its table as the measurements say."""
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    assert pattern.search(text), f"{page.name} has a place for the table"
    return pattern.sub(lambda _: BEGIN + table(page) + END, text)


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page), encoding="utf-8")


if __name__ == "__main__":
    main()
