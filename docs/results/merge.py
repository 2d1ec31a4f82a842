"""Gather the measurements of runs into one file of this folder: ``python docs/results/merge.py planner runs/bell runs/oracle``.

Each run folder holds the ``measurements.json`` that ``physis eval plan`` wrote. Folders named in a command are written as
``runs/<name>``, so that no path of one machine is kept. Then run ``result_tables.py``. A folder that ends in ``_again`` is a repetition of
the folder without that ending: its episodes are compared one by one, and the number of equal ones is the measurement.

Of a comparison's hundreds of scores those are kept that ``physis compare`` tests, with their floors; its ``measurements.json`` has them all.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
#: A machine's own path in a command (absolute, from home, or above the repository; ``http://...`` is none), whatever stands round it.
PLACE = re.compile(
    r"(?<![\w.:/~-])(?:~|\.\.|/)[^\s,:{}\[\]'\"=]*|(?<=[:=])(?<!http:)(?<!https:)(?:~|\.\.|/)[^\s,:{}\[\]'\"=]*"
)


def placeless(command: str) -> str:
    """The command with ``runs/NAME`` for every path of one machine; of RUN/export and RUN/model both parts are kept."""

    def short(found: re.Match[str]) -> str:
        parts = [part for part in found[0].split("/") if part not in ("", "~", "..", ".")]
        kept = parts[-2:] if parts[-1:] in (["export"], ["model"]) else parts[-1:]
        return "/".join(["runs", *(part for part in kept if part != "runs")])

    return PLACE.sub(short, command)


def kept(claim: str) -> bool:
    """False for the scores of a comparison (``compare/<protocol>/<model>/<task>/<score>``) that are not tested."""
    from physisforcing.planner.comparison import TESTED_SCORES

    family, *_, task, last = claim.split("/")
    if family != "compare" or claim.count("/") != 4 or task == "imagined_success":
        return True
    return last.removesuffix("_floor").removesuffix("_difference") in ("success", *TESTED_SCORES)


def measured(run: str) -> list[dict]:
    lines = json.loads((Path(run) / "measurements.json").read_text(encoding="utf-8"))
    return [line for line in lines if kept(line["claim"])]


def repetition(run: str) -> list[dict]:
    """One line: how many episodes of ``run`` have the outcome and the number of steps of the first time."""

    def episodes(folder: str) -> dict[tuple, tuple]:
        rows = map(json.loads, (Path(folder) / "results.jsonl").read_text(encoding="utf-8").splitlines())
        return {(row["policy"], row["episode"]): (row["status"], row["steps"]) for row in rows}

    first, again = episodes(run.removesuffix("_again")), episodes(run)
    line = next(line for line in measured(run) if "/model/" in line["claim"])
    line["claim"] = line["claim"].replace("/model/", "/model_again/").replace("/success", "/equal_episodes")
    equal = sum(first[key] == outcome for key, outcome in again.items())
    return [line | {"value": equal, "unit": "episodes", "low": None, "high": None, "n": len(again), "against": None}]


def main(topic: str, runs: list[str]) -> None:
    lines = []
    for run in runs:
        lines += repetition(run) if run.endswith("_again") else measured(run)
    for line in lines:
        line["command"] = placeless(line["command"])
    lines.sort(key=lambda line: line["claim"])
    claims = [line["claim"] for line in lines]
    twice = {claim for claim in claims if claims.count(claim) > 1}
    if twice:
        sys.exit(f"claims measured in more than one run: {sorted(twice)[:3]}; name each run once")
    (FOLDER / f"{topic}.json").write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    print(f"{len(lines)} measurements in docs/results/{topic}.json")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
