"""Recorded actions replayed through ``step``: does the demonstration succeed again? And how long resets and episodes take.

    python benchmarks/env_replay.py [--tasks all] [--episodes 20] [--workers 2] [--json docs/results/env_replay.json]

The expert records its drive targets without pictures; a reset to the same seed executes them with the interpolated control of
the recorded time base. Expert failures and seeds whose scene does not come to rest are listed and not replayed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

import physisforcing.envs.robotwin  # noqa: F401  (registers the tasks)
from physisforcing.core.stats import wilson
from physisforcing.envs.robotwin.tasks import PACK_TASKS
from physisforcing.envs.seeds import Job, Outcome, SeedPlan, run_seeds
from physisforcing.planner.measurements import machine_provenance, measurement, write_measurements


def replay(env: Any, seed: int, targets: list[np.ndarray]) -> bool:
    """Whether the recorded targets succeed from a reset with the same seed."""
    env.reset(seed=seed)
    return any(env.step(target_A)[2] for target_A in targets[1:])


class Replayer:
    """Plays the expert in one scene a job and repeats its recorded targets (``envs.seeds.Handler``)."""

    def __init__(self) -> None:
        self._env: Any = None
        self._task = ""

    def handle(self, job: Job) -> Outcome:
        if self._task != job.task:
            self.close()
            self._env = gymnasium.make(f"RoboTwin/{job.task}-v0", cameras=(), disable_env_checker=True).unwrapped
            self._task = job.task
        env, targets, begun = self._env, [], time.perf_counter()
        env.reset(seed=job.seed)
        ready = time.perf_counter()
        succeeded = env.play_expert(lambda _: targets.append(env.observe()["state"]))
        details = {"reset_s": ready - begun, "play_s": time.perf_counter() - ready, "failure": env.expert_failure}
        details["replayed"] = replay(env, job.seed, targets) if succeeded else None
        return Outcome(task=job.task, seed=job.seed, kind="recorded", details=details)

    def close(self) -> None:
        env, self._env, self._task = self._env, None, ""
        if env is not None:
            env.close()


def run_tasks(tasks: list[str], episodes: int, first_seed: int, workers: int) -> dict[str, dict[str, Any]]:
    """Counts and times of each task."""
    found: dict[str, dict[str, Any]] = {
        task: {"seeds": [], "unstable": [], "crashed": [], "failed": {}, "resets": [], "plays": [], "replayed": {}}
        for task in tasks
    }

    def on_outcome(outcome: Outcome) -> None:
        one, seed, details = found[outcome.task], outcome.seed, outcome.details
        if outcome.kind == "crashed":
            print(f"{outcome.task} seed {seed} crashed: {outcome.message}", flush=True)
            one["crashed"].append(seed)
            return
        if outcome.kind != "recorded":
            one["unstable"].append(seed)
            return
        one["seeds"] = sorted([*one["seeds"], seed])
        one["resets"].append(details["reset_s"])
        if details["replayed"] is None:
            one["failed"][seed] = details["failure"]
        else:
            one["plays"].append(details["play_s"])  # a failed expert may have stopped early
            one["replayed"][seed] = details["replayed"]

    run_seeds(SeedPlan(tasks, episodes, first_seed, {}), Replayer, workers=workers, on_outcome=on_outcome)
    return found


def report(task: str, found: dict[str, Any]) -> None:
    tried, good = len(found["seeds"]), len(found["replayed"])
    seconds = [statistics.median(found[name] or [float("nan")]) for name in ("resets", "plays")]
    print(
        f"{task:20} expert {good}/{tried}  replay {sum(found['replayed'].values())}/{good}  "
        f"reset {seconds[0]:.2f} s  play {seconds[1]:.2f} s  unstable {found['unstable']}  crashed {found['crashed']}  "
        f"failed {found['failed']}  "
        f"not repeated {missed(found)}",
        flush=True,
    )


def missed(found: dict[str, Any]) -> list[int]:
    """Seeds in which the expert succeeds and its replay does not."""
    return sorted(seed for seed, succeeded in found["replayed"].items() if not succeeded)


def lines(task: str, found: dict[str, Any], shared: dict[str, Any], *, timed: bool) -> list[dict[str, Any]]:
    good, replayed = len(found["replayed"]), sum(found["replayed"].values())
    if not good:
        print(f"{task}: the expert succeeded in no scene; there is nothing to replay", flush=True)
        return []
    low, high = wilson(replayed, good)
    against = {"seeds_not_repeated": missed(found)} if missed(found) else {}
    rows = [
        measurement(
            f"env/replay/{task}/success",
            replayed / good,
            unit="rate",
            low=low,
            high=high,
            n=good,
            seeds=sorted(found["replayed"]),
            against=against,
            **shared,
        )
    ]
    if not timed:
        return rows
    for name in ("resets", "plays"):
        value, claim = statistics.median(found[name]), f"env/replay/{task}/{name.removesuffix('s')}_seconds"
        rows.append(measurement(claim, value, unit="s", n=len(found[name]), seeds=found["seeds"], **shared))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["all"])
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: this one, and only then seconds are kept")
    parser.add_argument("--json", type=Path, help="write measurements here")
    options = parser.parse_args()
    tasks = list(PACK_TASKS) if options.tasks == ["all"] else options.tasks
    command = (
        f"python benchmarks/env_replay.py --tasks {' '.join(options.tasks)} --episodes {options.episodes} "
        f"--seed {options.seed} --workers {options.workers}"
    )
    shared = {"command": command, "provenance": machine_provenance()}
    rows: list[dict[str, Any]] = []
    for task, found in run_tasks(tasks, options.episodes, options.seed, options.workers).items():
        report(task, found)
        rows += lines(task, found, shared, timed=not options.workers)
    if options.json:
        write_measurements(options.json, rows)


if __name__ == "__main__":
    main()
