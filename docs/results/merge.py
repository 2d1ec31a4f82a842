"""Gather the measurements of runs into one file of this folder: ``python docs/results/merge.py planner runs/bell runs/oracle``.

Each run folder holds the ``measurements.json`` that ``physis eval plan`` wrote. Folders named in a command are written as
``runs/<name>``, so that no path of one machine is kept. Then run ``result_tables.py``. A folder that ends in ``_again`` is a repetition of
the folder without that ending: its episodes are compared one by one, and the number of equal ones is the measurement (of a comparison,
equal in every field but clocks and films).

Of a comparison's hundreds of scores those are kept that ``physis compare`` tests, with their floors; its ``measurements.json`` has them all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def kept(claim: str) -> bool:
    """False for the scores of a comparison (``compare/<protocol>/<model>/<task>/<score>``) that are not tested."""
    from physisforcing.planner.comparison import TESTED_SCORES
    from physisforcing.planner.comparison_controls import TO_OTHER, TO_OWN

    parts = claim.split("/")
    if parts[0] != "compare" or len(parts) != 5 or parts[3] == "imagined_success":
        return True
    if parts[2] == "other" and parts[4] in (TO_OWN, TO_OTHER):
        return True
    return parts[4].removesuffix("_floor").removesuffix("_difference") in ("success", *TESTED_SCORES)


def measured(run: str) -> list[dict]:
    lines = json.loads((Path(run) / "measurements.json").read_text(encoding="utf-8"))
    return [line for line in lines if kept(line["claim"])]


def repetition(run: str) -> list[dict]:
    """One line: how many episodes of ``run`` came out as the first time."""
    first, again = episodes(run.removesuffix("_again")), episodes(run)
    found = measured(run)
    compared = [line for line in found if line["claim"].startswith("compare/")]
    line = compared[0] if compared else next(line for line in found if "/model/" in line["claim"])
    if compared:
        line["claim"] = "/".join([*line["claim"].split("/")[:2], "repeated", "equal_rows"])
        alike = [unclocked(first[key]) == unclocked(row) for key, row in again.items()]
        about: dict | None = {
            "policies": ", ".join(sorted({policy for policy, _ in again})),
            "not compared": "clocks, films",
        }
    else:
        line["claim"] = line["claim"].replace("/model/", "/model_again/").replace("/success", "/equal_episodes")
        alike = [all(first[key][name] == row[name] for name in ("status", "steps")) for key, row in again.items()]
        about = None
    unit = "rows" if compared else "episodes"
    return [line | {"value": sum(alike), "unit": unit, "low": None, "high": None, "n": len(again), "against": about}]


def episodes(folder: str) -> dict[tuple[str, str], dict]:
    rows = map(json.loads, (Path(folder) / "results.jsonl").read_text(encoding="utf-8").splitlines())
    return {(row["policy"], row["episode"]): row for row in rows}


def unclocked(row: dict) -> dict:
    """A row without what a repetition may change: clocks (``*_s``, ``seconds``) and the films that were asked for."""
    told = {key: value for key, value in row.items() if key not in ("seconds", "panels") and not key.endswith("_s")}
    told["telemetry"] = {key: value for key, value in row["telemetry"].items() if not key.endswith("_s")}
    return told


def main(topic: str, runs: list[str]) -> None:
    from physisforcing.planner.measurements import placeless

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
