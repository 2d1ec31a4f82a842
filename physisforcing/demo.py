"""``physis demo``: the whole way once. Fresh demonstrations, targets, fine-tuning with the physics losses, closed loop, report.

Each stage leaves its result and a hash of its inputs in ``<output>/stages``; a stage whose inputs are unchanged is reused.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from physisforcing.core.errors import IncompleteCoverageError, UserError
from physisforcing.core.files import replace_text

EXAMPLES = """examples:
  physis demo
  physis demo --fresh                       do every stage again
  physis demo output=runs/longer steps=120 demonstrations=12

Settings are field=value; fields and defaults: physisforcing/demo.py (DemoConfig).
Exit code 1 when a loss term did not go down on the held-out windows, 3 when an episode crashed; the report is written all the
same."""


@dataclass(slots=True, kw_only=True)
class DemoConfig:
    """``demonstrations``: perturbed expert episodes a task, of which ``heldout`` altogether are kept from training. ``steps``, ``batch``,
    ``lr``: of the fine-tuning. ``episodes``: closed-loop episodes of the shipped model for each task, in order;
    ``baselines``: policies that run on the same scenes. ``max_steps``: control steps after which an episode counts as a failure
    (the tasks' own limit is 400, the expert needs about 70 and 120). ``workers``: simulator processes.
    """

    output: str = "runs/demo"
    tasks: list[str] = field(default_factory=lambda: ["click_bell", "adjust_bottle"])
    demonstrations: int = 7
    heldout: int = 4
    heldout_windows: int = 8
    steps: int = 40
    batch: int = 4
    lr: float = 5e-5
    episodes: list[int] = field(default_factory=lambda: [5, 3])
    max_steps: int = 200
    baselines: list[str] = field(default_factory=lambda: ["noop", "random", "retrieval"])
    workers: int = 2

    def check(self) -> None:
        if len(self.episodes) != len(self.tasks):
            fix = f"episodes=[{','.join(['5'] * len(self.tasks))}]"
            raise UserError("episodes", got=self.episodes, wanted=f"{len(self.tasks)} numbers, one a task", fix=fix)
        if not 0 < self.heldout < self.demonstrations * len(self.tasks):
            raise UserError("heldout", got=self.heldout, wanted="fewer than all demonstrations", fix="heldout=4")


@dataclass(slots=True, kw_only=True)
class StageRecord:
    """What a finished stage left: the hash of its inputs, its seconds when it ran, and what it returned."""

    name: str
    key: str
    seconds: float
    result: dict[str, Any]
    reused: bool = False


class Stages:
    """Runs stages in order and reuses those whose inputs are unchanged. ``fresh`` does them all again."""

    def __init__(self, folder: Path, *, fresh: bool, say: Callable[[str], None] = print) -> None:
        self.folder, self.say = folder, say
        self.records: list[StageRecord] = []
        if fresh:
            shutil.rmtree(folder / "stages", ignore_errors=True)

    def run(
        self,
        name: str,
        what: str,
        inputs: dict[str, Any],
        work: Callable[[], dict[str, Any]],
        outputs: Sequence[Path] = (),
    ) -> dict[str, Any]:
        """The result of ``work()``, or the stored one when ``inputs`` hash to the same key and all ``outputs`` exist."""
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
        number = len(self.records) + 1
        stored = self._stored(name)
        if stored is not None and stored.key == key and all(path.exists() for path in outputs):
            stored.reused = True
            self.records.append(stored)
            self.say(f"[{number}] {name}: reused ({stored.seconds:.0f} s when it ran)")
            return stored.result
        self.say(f"[{number}] {name}: {what}")
        began = time.perf_counter()
        result = work()
        record = StageRecord(name=name, key=key, seconds=time.perf_counter() - began, result=result)
        replace_text(self._path(name), json.dumps(dataclasses.asdict(record), indent=1))
        self.records.append(record)
        self.say(f"[{number}] {name}: done in {record.seconds:.0f} s")
        return result

    def _path(self, name: str) -> Path:
        return self.folder / "stages" / f"{name.replace(' ', '_')}.json"

    def _stored(self, name: str) -> StageRecord | None:
        try:
            return StageRecord(**json.loads(self._path(name).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # absent, or of another version: the stage runs
            return None


def main(argv: list[str]) -> int:
    """Entry of ``physis demo``."""
    parser = argparse.ArgumentParser(
        prog="physis demo",
        description="Collect, fine-tune with the physics losses, plan with the shipped weights, report. CPU, under 15 minutes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="field=value")
    parser.add_argument("--fresh", action="store_true", help="do every stage again")
    arguments = parser.parse_intermixed_args(argv)
    from physisforcing.core.config import compose

    config = compose("demo", arguments.settings, DemoConfig)
    config.check()
    return run_demo(config, fresh=arguments.fresh)


def run_demo(config: DemoConfig, *, fresh: bool = False) -> int:
    """Run all stages and write the report. Returns 0 when every loss term went down on the held-out windows, else 1."""
    from physisforcing import demo_report, demo_stages

    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    stages = Stages(folder, fresh=fresh)
    began = time.perf_counter()
    now = {"time": time.time()}  # looked at every time
    findings = stages.run("doctor", "what this machine has", now, lambda: demo_stages.doctor(folder))
    demo_stages.collect(stages, config, folder)
    demo_stages.targets(stages, config, folder)
    demo_stages.train(stages, config, folder)
    demo_stages.closed_loop(stages, config, folder)
    data = demo_report.build(config, folder, findings, stages.records)
    from physisforcing.core.report import write_report

    page = write_report(data, folder)
    print("\n" + demo_report.summary_table(data))
    print(f"\ntotal: {time.perf_counter() - began:.0f} s in this call")
    print(f"report: {page}")
    failed = [change.term for change in data.losses if not change.lower]
    if failed:
        print(f"physis demo: not lower on the held-out windows after training: {', '.join(failed)}", file=sys.stderr)
    errors = sum(row.errors for row in data.success)
    if errors and not failed:
        raise IncompleteCoverageError(
            f"{errors} episodes ended in errors; see {folder / 'closed_loop'}/*/results.jsonl"
        )
    return 1 if failed else 0
