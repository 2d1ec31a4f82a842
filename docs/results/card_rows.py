"""Gather what benchmarks measured on cards: ``python docs/results/card_rows.py training|policy FILE.json ... [--without CLAIM]``.

Lines go into the topic's JSON file as they were measured; the card stands in their claims, since the same rows were measured on several.
Lines of the same claim replace older ones. The topic's page has them as a table, without the kinds of kernels. Without files, what is there is written anew.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from physisforcing.planner.measurements import placeless

FOLDER = Path(__file__).resolve().parent
#: Topic (the beginning of its claims) -> its lines, and the page that has their table.
TOPICS = {"training": ("large_training.json", "training.md"), "policy": ("policy.json", "policy.md")}
#: What a line says where there was no history.
UNKNOWN = "not a git checkout"
BEGIN, END = "<!-- rows:begin -->\n", "<!-- rows:end -->"
HEAD = "| claim | value | n | of the peak | memory, GiB | beside it |\n|---|---|---|---|---|---|\n"
#: Fields of ``against`` that the table shows.
SHOWN = (
    "plain_ms",
    "plain_compiled_ms",
    "lora_plain_ms",
    "relative_difference",
    "scaling_efficiency",
    "before",
    "after",
    "steps",
    "eager_ms",
    "ratio",
)


def gathered(known: list[dict[str, Any]], lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All lines, sorted by claim; new ones replace those of the same claim."""
    found = {line["claim"]: line for line in known}
    for line in map(named, lines):
        found[line["claim"]] = line
    return [found[claim] for claim in sorted(found)]


def compared(lines: list[dict[str, Any]], beside: str) -> list[dict[str, Any]]:
    """Lines with their ratio to that of ``beside``."""
    usual = next(line for line in lines if line["claim"] == beside)
    of = named(usual)["claim"]
    ratios = [{"ratio": round(line["value"] / usual["value"], 4), "ratio_to": of} for line in lines]
    return [
        line if line is usual else line | {"against": line["against"] | more}
        for line, more in zip(lines, ratios, strict=True)
    ]


def named(line: dict[str, Any]) -> dict[str, Any]:
    """A line with the card in its claim."""
    card = next((name for name in ("H100", "H200", "A100") if name in line["hardware"]), "cpu").lower()
    claim = line["claim"]
    if f"/{card}/" in claim:
        return line
    topic, head, rest = claim.split("/", 2)
    return line | {"claim": f"{topic}/{head}/{card}/{rest}", "command": placeless(line["command"])}


def table(lines: list[dict[str, Any]]) -> str:
    """Of all but the kinds of kernels, which are many."""
    return HEAD + "".join(row(line) for line in lines if "/kernels/" not in line["claim"])


def row(line: dict[str, Any]) -> str:
    against = line["against"]
    memory = next((against[name] for name in ("peak_memory_gb", "memory_gib") if against.get(name)), "")
    peak = f"{against['mfu_pct']:.1f} %" if against.get("mfu_pct") else ""
    shown = ", ".join(f"{name} {against[name]:g}" for name in SHOWN if isinstance(against.get(name), int | float))
    if against.get("difference_from"):
        shown += f" from {against['difference_from']}"
    if against.get("fits_gb"):
        shown = f"fits {', '.join(map(str, against['fits_gb']))} GB"
    value = "failed" if line["value"] is None else f"{line['value']:.4g} {line['unit']}"
    return f"| `{line['claim'].partition('/')[2]}` | {value} | {line['n']} | {peak} | {memory} | {shown} |\n"


def page(text: str, lines: list[dict[str, Any]]) -> str:
    """The page with its table."""
    return re.sub(f"{BEGIN}.*?{END}", lambda _: BEGIN + table(lines) + END, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topic", choices=TOPICS)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--without", action="append", default=[], help="claims that are left out")
    parser.add_argument(
        "--beside", help="the claim in the files that all others in them are compared with: their ratio to it"
    )
    parser.add_argument(
        "--rename",
        action="append",
        default=[],
        metavar="CLAIM=CLAIM",
        help="where an earlier run has a row of that name",
    )
    parser.add_argument(
        "--commit", help="of the tree that was measured, for lines of a machine that had it without its history"
    )
    options = parser.parse_args()
    data, page_of = (FOLDER / name for name in TOPICS[options.topic])
    known = json.loads(data.read_text(encoding="utf-8")) if data.is_file() else []
    new = [line for path in options.files for line in json.loads(path.read_text(encoding="utf-8"))]
    names = dict(pair.split("=") for pair in options.rename)
    new = [line | {"claim": names.get(line["claim"], line["claim"])} for line in new]
    new = [line | {"commit": options.commit} if line["commit"] == UNKNOWN and options.commit else line for line in new]
    if options.beside:
        new = compared(new, options.beside)
    lines = gathered(known, [line for line in new if line["claim"] not in options.without])
    data.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    page_of.write_text(page(page_of.read_text(encoding="utf-8"), lines), encoding="utf-8")


if __name__ == "__main__":
    main()
