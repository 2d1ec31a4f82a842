"""Recorded actions replayed through ``step``: does the demonstration succeed again? And how long resets and episodes take.

    python benchmarks/env_replay.py [--tasks all] [--episodes 20] [--json docs/results/env_replay.json]

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
from physisforcing.core.errors import UnstableSceneError
from physisforcing.core.stats import wilson
from physisforcing.envs.robotwin.tasks import PACK_TASKS
from physisforcing.planner.measurements import machine_provenance, measurement, write_measurements


def replay(env: Any, seed: int, targets: list[np.ndarray]) -> bool:
    """Whether the recorded targets succeed from a reset with the same seed."""
    env.reset(seed=seed)
    return any(env.step(target_A)[2] for target_A in targets[1:])


def run_task(task: str, episodes: int, first_seed: int) -> dict[str, Any]:
    """Counts and times of one task."""
    env = gymnasium.make(f"RoboTwin/{task}-v0", cameras=(), disable_env_checker=True).unwrapped
    found: dict[str, Any] = {"seeds": [], "unstable": [], "failed": {}, "resets": [], "plays": [], "replayed": []}
    seed = first_seed
    while len(found["seeds"]) < episodes:
        begun = time.perf_counter()
        try:
            env.reset(seed=seed)
        except UnstableSceneError:
            found["unstable"].append(seed)
            seed += 1
            continue
        found["resets"].append(time.perf_counter() - begun)
        begun = time.perf_counter()
        succeeded = env.play_expert()
        found["plays"].append(time.perf_counter() - begun)
        found["seeds"].append(seed)
        if not succeeded:
            found["failed"][seed] = env.expert_failure
        else:
            targets: list[np.ndarray] = []
            env.reset(seed=seed)
            env.play_expert(lambda _, targets=targets: targets.append(env.observe()["state"]))
            found["replayed"].append(replay(env, seed, targets))
        seed += 1
    env.close()
    return found


def report(task: str, found: dict[str, Any]) -> None:
    tried, good = len(found["seeds"]), len(found["replayed"])
    seconds = statistics.median(found["resets"]), statistics.median(found["plays"])
    print(
        f"{task:20} expert {good}/{tried}  replay {sum(found['replayed'])}/{good}  "
        f"reset {seconds[0]:.2f} s  play {seconds[1]:.2f} s  unstable {found['unstable']}  failed {found['failed']}",
        flush=True,
    )


def lines(task: str, found: dict[str, Any], shared: dict[str, Any]) -> list[dict[str, Any]]:
    good, replayed = len(found["replayed"]), sum(found["replayed"])
    low, high = wilson(replayed, good)
    seeds = [seed for seed in found["seeds"] if seed not in found["failed"]]
    rows = [
        measurement(
            f"env/replay/{task}/success",
            replayed / good,
            unit="rate",
            low=low,
            high=high,
            n=good,
            seeds=seeds,
            **shared,
        )
    ]
    for name in ("resets", "plays"):
        value, claim = statistics.median(found[name]), f"env/replay/{task}/{name.removesuffix('s')}_seconds"
        rows.append(measurement(claim, value, unit="s", n=len(found[name]), seeds=found["seeds"], **shared))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["all"])
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--json", type=Path, help="write measurements here")
    options = parser.parse_args()
    tasks = list(PACK_TASKS) if options.tasks == ["all"] else options.tasks
    command = f"python benchmarks/env_replay.py --tasks {' '.join(options.tasks)} --episodes {options.episodes}"
    shared = {"command": command, "provenance": machine_provenance()}
    rows: list[dict[str, Any]] = []
    for task in tasks:
        found = run_task(task, options.episodes, options.seed)
        report(task, found)
        rows += lines(task, found, shared)
    if options.json:
        write_measurements(options.json, rows)


if __name__ == "__main__":
    main()
