"""Write the tables of results into the README and into this folder's pages: ``python docs/results/result_tables.py``.

A page has its table between two marks; which measurements of this folder's JSON files go there is said by ``PAGES``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from physisforcing.planner.summary import mean_of_proportions

FOLDER = Path(__file__).resolve().parent
README = FOLDER.parents[1] / "README.md"
#: Page -> beginnings of the claims whose success rates it shows.
PAGES = {
    README: ("planner/",),
    FOLDER / "robotwin.md": ("expert/", "env/replay/"),
    FOLDER.parent / "perfect_model.md": ("env/perfect/",),
    FOLDER.parent / "worldarena.md": ("planner/worldarena",),
}
#: Columns of the nano policies' table, by the cells of their claims. A cell of several names is the first that was measured.
CELLS = {
    "joint, seed 0": ("joint_0", "eight_joint_0"), "joint, seed 1": ("joint_1",), "joint, seed 2": ("joint_2",),
    "actions, seed 0": ("actions_0", "eight_actions_0"), "actions, seed 1": ("actions_1",), "actions, seed 2": ("actions_2",),
    "planner": ("planner",), "no-op": ("noop",), "random": ("random",), "retrieval": ("retrieval",), "expert": ("expert",),
}  # fmt: skip
#: Columns of the table of latency, by the arms of their claims, and its rows, by the stages.
ARMS = {
    "kernel by kernel": "eager", "graphs": "graph", "graphs, compiled": "compile", "fused": "fused",
    "fused, autoencoder in bfloat16": "fused_half",
}  # fmt: skip
STAGES = {
    "canvas of three pictures": "canvas", "encode (autoencoder, float32)": "encode", "prefill (first frame and text)": "prefill",
    "ten action steps": "steps", "all, by the wall clock": "total",
}  # fmt: skip
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


def nano() -> str:
    """Successes of the nano policies, of the planner and of baselines, task by task, with Wilson's intervals."""
    found = {line["claim"]: line for line in json.loads((FOLDER / "policy_success.json").read_text(encoding="utf-8"))}

    def line(cells: tuple[str, ...], task: str) -> dict[str, Any] | None:
        return next((found[name] for cell in cells if (name := f"policy/{cell}/{task}/success") in found), None)

    def shown(one: dict[str, Any] | None) -> str:
        return "" if one is None else f"{100 * one['value']:.3g} ({100 * one['low']:.0f} to {100 * one['high']:.0f})"

    tasks = list(
        dict.fromkeys(claim.split("/")[2] for claim in found if claim.endswith("/success") and "/mean/" not in claim)
    )
    text = f"| task | {' | '.join(CELLS)} |\n|{'---|' * (1 + len(CELLS))}\n"
    for task in tasks:
        text += f"| `{task}` | {' | '.join(shown(line(cells, task)) for cells in CELLS.values())} |\n"

    def mean(some: list[str], columns: list[tuple[str, ...]]) -> str:
        """Over tasks of one weight each, a task's columns joined, with its interval; empty where a task is in none."""
        lines = [[one for cells in columns if (one := line(cells, task)) is not None] for task in some]
        if not all(lines):
            return ""
        counts = [(sum(round(x["value"] * x["n"]) for x in task), sum(x["n"] for x in task)) for task in lines]
        value, low, high = (100 * share for share in mean_of_proportions(counts))
        return f"{value:.1f} ({low:.1f} to {high:.1f})"

    planned = [task for task in tasks if line(CELLS["planner"], task)]
    for title, some in ((f"mean of {len(tasks)}", tasks), (f"mean of the planner's {len(planned)}", planned)):
        text += f"| **{title}** | {' | '.join(mean(some, [cells]) for cells in CELLS.values())} |\n"
    recipes = {
        recipe: [cells for name, cells in CELLS.items() if name.startswith(recipe)] for recipe in ("joint", "actions")
    }
    joined = ", ".join(f"`{recipe}` {mean(tasks, columns)} %" for recipe, columns in recipes.items())
    return f"{text}\nMeans of {len(tasks)} tasks over all training seeds that each has: {joined}.\n"


def latency() -> str:
    """Medians of the stages of a plan at full size, and 95th percentiles of single plans."""
    found = {line["claim"]: line for line in json.loads((FOLDER / "policy.json").read_text(encoding="utf-8"))}
    head = "policy/latency/h200/full"

    def row_of(name: str, cells: list[str]) -> str:
        return f"| {name} | {' | '.join(cells)} |\n"

    text = f"| ms: median (95th percentile) | {' | '.join(ARMS)} |\n|{'---|' * (1 + len(ARMS))}\n"
    for name, stage in STAGES.items():
        lines = [found[f"{head}/{arm}/{stage}_ms"] for arm in ARMS.values()]
        text += row_of(name, [f"{line['value']:.3g} ({line['against']['p95']:.3g})" for line in lines])
    cold = [found[f"{head}/{arm}/cold_ms"]["value"] for arm in ARMS.values()]
    text += row_of("the first plan of an arm, s", [f"{value / 1e3:.1f}" for value in cold])
    apart = [found[f"{head}/{arm}/largest_difference"]["value"] for arm in ARMS.values()]
    text += row_of("largest difference from kernel by kernel, z", ["", *(f"{value:.2g}" for value in apart[1:])])
    return text + row_of("memory, GiB", [f"{found[f'{head}/{arm}/memory_gib']['value']:.1f}" for arm in ARMS.values()])


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
    for name, made in OWN[page].items() if page in OWN else [("results", lambda: table(page))]:
        begin, end = BEGIN.replace("results", name), END.replace("results", name)
        before, found, rest = text.partition(begin)
        assert found and end in rest, f"{page.name} has a place for the table"
        text = before + begin + made() + end + rest.partition(end)[2]
    return text


#: Pages with tables of their own kinds, by the names of their marks.
OWN = {FOLDER / "policy.md": {"nano": nano, "latency": latency}}


def main() -> None:
    for page in (*PAGES, *OWN):
        page.write_text(filled(page), encoding="utf-8")


if __name__ == "__main__":
    main()
