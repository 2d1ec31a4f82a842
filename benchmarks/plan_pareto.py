"""Success against compute: denoising steps x candidates a plan, and every verifier against a single candidate.

    python benchmarks/plan_pareto.py --tiny                                    # minutes on a CPU: whether it runs, no evidence
    python benchmarks/plan_pareto.py --device cuda --workers 12 --success runs/success/model

The grid is steps {1,2,4,8,20} x candidates {1,4,16} with ``--verifier``; at ``--verifiers-at`` steps the other verifiers are run, too. All
cells plan in the same frozen scenes with the same noise seeds: candidate 0 of N=16 is the candidate of N=1. Simulators run in
``--workers`` processes, the world model in one process that merges their requests. Every cell is an ``physis eval plan`` in a folder of
``--output``: the same command again continues, ``--report`` only writes the table, the plot and the measurements from what is there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plan_pareto_report import CellResult, write_report

from physisforcing.core.results import ResultsFile
from physisforcing.eval_plan import EvalPlanConfig, PlannerSettings, _Plan, evaluate

STEPS, CANDIDATES = (1, 2, 4, 8, 20), (1, 4, 16)
TASKS = ("click_bell", "adjust_bottle", "stack_blocks_two")
OTHERS = ("random", "smoothness", "track_consistency", "combined")
DOCS = Path(__file__).resolve().parents[1] / "docs"


@dataclass(slots=True, kw_only=True, frozen=True)
class Cell:
    """One setting: ``verifier`` is empty for a single candidate."""

    steps: int
    candidates: int
    verifier: str = ""

    @property
    def name(self) -> str:
        chosen = f"-{self.verifier.replace('*', 'x').replace('+', '-')}" if self.verifier else ""
        return f"steps{self.steps}-n{self.candidates}{chosen}"


def cells(arguments: argparse.Namespace) -> Iterator[Cell]:
    """The grid, then the other verifiers; the cheapest first, so that a run that is cut off has whole columns."""
    for candidates in arguments.candidates:
        for steps in arguments.steps:
            yield Cell(steps=steps, candidates=candidates, verifier=arguments.verifier if candidates > 1 else "")
    if arguments.verifiers_at not in arguments.steps:
        return
    others = [*arguments.others, *(["success"] if arguments.success else [])]
    for verifier in others:
        for candidates in arguments.candidates:
            if candidates > 1 and verifier != arguments.verifier:
                yield Cell(steps=arguments.verifiers_at, candidates=candidates, verifier=verifier)


def cell_config(cell: Cell, arguments: argparse.Namespace) -> EvalPlanConfig:
    return EvalPlanConfig(
        tasks=list(arguments.tasks),
        episodes=arguments.episodes,
        manifest=arguments.manifest,
        baselines=[],
        max_steps=arguments.max_steps,
        planner=PlannerSettings(
            world_model=arguments.world_model,
            codec=arguments.codec,
            decoder=arguments.decoder,
            device=arguments.device,
            denoising_steps=cell.steps,
            candidates=cell.candidates,
            verifier=cell.verifier,
            success=arguments.success if "success" in cell.verifier else "",
            server="auto" if arguments.workers else "",
        ),
        output=str(Path(arguments.output) / cell.name),
        workers=arguments.workers,
        threads=arguments.threads,
        videos=0,
        retry_errors=arguments.retry_errors,
    )


def results(cell: Cell, arguments: argparse.Namespace) -> CellResult:
    """What is there of a cell, whole or in part."""
    config = cell_config(cell, arguments)
    plan = _Plan(config)
    path, about = Path(config.output) / "results.jsonl", Path(config.output) / "provenance.json"
    rows: list[dict[str, Any]] = []
    if path.is_file():
        found = ResultsFile(path)
        rows = [row for job in plan.jobs if (row := found.get(plan.key(job))) is not None]
    return CellResult(
        name=cell.name,
        steps=cell.steps,
        candidates=cell.candidates,
        verifier=cell.verifier,
        wanted=len(plan.jobs),
        rows=rows,
        manifests=plan.scenes.manifests,
        provenance=json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {},
    )


def complete(result: CellResult, *, retry_errors: bool) -> bool:
    errors = sum(row["status"] == "error" for row in result.rows)
    return len(result.rows) == result.wanted and not (retry_errors and errors)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    for cell in cells(arguments) if not arguments.report else ():
        if complete(results(cell, arguments), retry_errors=arguments.retry_errors):
            continue
        print(f"== {cell.name}", file=sys.stderr, flush=True)
        evaluate(cell_config(cell, arguments), command=f"benchmarks/plan_pareto.py, cell {cell.name}")
    found = [results(cell, arguments) for cell in cells(arguments)]
    docs = Path(arguments.output) / "docs" if arguments.tiny else Path(arguments.docs)
    command = " ".join(["python benchmarks/plan_pareto.py", *(sys.argv[1:] if argv is None else argv)])
    page = write_report(found, docs, command=command, settings=vars(arguments), rehearsal=arguments.tiny)
    print(page)
    return 0 if all(complete(result, retry_errors=True) for result in found) else 3


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tiny", action="store_true", help="a rehearsal of small numbers; its report stays in --output"
    )
    parser.add_argument("--report", action="store_true", help="run nothing, write the report of what is there")
    parser.add_argument("--output", default="runs/plan_pareto")
    parser.add_argument("--docs", default=str(DOCS))
    parser.add_argument("--name", default="", help="of the report, plan_pareto_<name>; as a rule its scenes")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--episodes", type=int, default=50, help="of each task")
    parser.add_argument("--manifest", default="auto", help="frozen scenes, as in physis eval plan")
    parser.add_argument("--max-steps", type=int, default=None)
    parser.add_argument("--steps", nargs="+", type=int, default=list(STEPS))
    parser.add_argument("--candidates", nargs="+", type=int, default=list(CANDIDATES))
    parser.add_argument("--verifier", default="spread", help="of the grid")
    parser.add_argument(
        "--others", nargs="*", default=list(OTHERS), help="verifiers that are run at --verifiers-at steps"
    )
    parser.add_argument("--verifiers-at", type=int, default=2)
    parser.add_argument("--success", default="", help="a trained success classifier: adds that verifier")
    parser.add_argument("--world-model", default="shipped")
    parser.add_argument("--codec", default="shipped")
    parser.add_argument("--decoder", default="shipped")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--retry-errors", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        small = {"tasks": ["click_bell"], "episodes": 2, "steps": [1, 2], "candidates": [1, 2], "max_steps": 64}
        small |= {"others": ["random"], "workers": 1, "threads": 1}
        for name, value in small.items():
            if getattr(arguments, name) == parser.get_default(name):
                setattr(arguments, name, value)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
