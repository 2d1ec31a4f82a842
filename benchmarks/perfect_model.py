"""The perfect model under replanning: ``python benchmarks/perfect_model.py [--tasks ...] [--episodes 5] [--error DEG] [--json FILE]``.

In frozen test scenes (each solved by the expert once, when it was frozen) the expert's future is imagined from the state as it is, and
its own drive targets are executed until the next plan: the ceiling for every world model and decoder under this planner. ``--error``
adds smooth errors to the targets, as a decoder makes them: normal with this standard deviation in degrees, correlated over about five
control steps, on grippers the same number in percent of their opening. ``--time``: milliseconds of a rollout and of its parts instead,
by the clock; say so if the machine does other work.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.pictures import shrink_area
from physisforcing.core.stats import wilson
from physisforcing.core.types import Observation, RolloutRequest
from physisforcing.envs.manifest import load_manifest
from physisforcing.envs.perfect_planner import PerfectPlanner
from physisforcing.envs.rollout import run_episode
from physisforcing.envs.simulator_world_model import SimulatorConfig, SimulatorWorldModel
from physisforcing.planner.measurements import machine_provenance, measurement, write_measurements

TASKS = ("adjust_bottle", "click_bell", "place_empty_cup", "grab_roller", "stack_blocks_two", "stack_bowls_two")
#: Control steps over which errors are correlated: standard deviation of the smoothing kernel.
SMOOTH = 2.0


class WithErrors:
    """A policy whose targets are read imperfectly; errors depend on the episode's seed alone."""

    def __init__(self, planner: PerfectPlanner, degrees: float) -> None:
        self.planner, self.degrees = planner, degrees
        self.fingerprint = f"{planner.fingerprint}-{degrees:g}deg"

    def reset(self, *, task: str, seed: int, instruction: str) -> None:
        self._generator = np.random.default_rng([seed, 17])
        self.planner.reset(task=task, seed=seed, instruction=instruction)

    def act(self, observation: Observation) -> NDArray[np.float32]:
        actions_PA = self.planner.act(observation)
        kernel = np.exp(-0.5 * (np.arange(-6, 7) / SMOOTH) ** 2)
        kernel /= np.sqrt((kernel**2).sum())
        white = self._generator.normal(size=(len(actions_PA) + len(kernel) - 1, actions_PA.shape[1]))
        smooth = np.stack([np.convolve(column, kernel, mode="valid") for column in white.T], axis=1)
        scale_A = np.full(actions_PA.shape[1], np.deg2rad(self.degrees))
        scale_A[[6, 13]] = self.degrees / 100
        return (actions_PA + scale_A * smooth).astype(np.float32)

    def telemetry(self) -> dict[str, float]:
        return self.planner.telemetry()


def run_task(task: str, episodes: int, degrees: float, execute: int) -> dict[str, Any]:
    """Successes, steps, seeds and what failed."""
    from physisforcing.envs.robotwin.env import RoboTwinEnv

    manifest = load_manifest(f"test_{task}")
    env = RoboTwinEnv(task)
    model = SimulatorWorldModel(SimulatorConfig(horizons=(2,), stride=32)).bind(env)
    planner = PerfectPlanner(model, execute_horizon=execute)
    policy = WithErrors(planner, degrees) if degrees else planner
    results = []
    try:
        for entry in manifest.entries[:episodes]:
            results.append(run_episode(env, policy, seed=entry.seed, expect=entry))
            if results[-1].status == "error":
                raise RuntimeError(results[-1].error)
    finally:
        model.close()
        env.close()
    return {
        "successes": sum(r.success for r in results),
        "steps": [r.steps for r in results],
        "seeds": [r.seed for r in results],
        "failed": Counter(_reason(r.telemetry) for r in results if not r.success),
        "assets": results[0].info["assets"],
    }


def _reason(telemetry: dict[str, float]) -> str:
    return "no motion found at the end" if telemetry["expert_failed"] else "still trying at the step limit"


def time_task(task: str, rollouts: int) -> dict[str, list[float]]:
    """Milliseconds: 32 live steps and the picture after them; going on to that moment in the twin; a text rollout, and an action rollout of
    one and of four candidates, of 17 frames."""
    from physisforcing.envs.robotwin.env import RoboTwinEnv

    env = RoboTwinEnv(task)
    text = SimulatorWorldModel().bind(env)
    acting = SimulatorWorldModel(SimulatorConfig(mode="actions"), twin=text.twin).bind(env)
    found: dict[str, list[float]] = {}
    observation = env.reset(seed=load_manifest(f"test_{task}").entries[0].seed)[0]
    try:
        for number in range(rollouts + 1):
            asked = RolloutRequest(
                context_BVTHWC=shrink_area(observation["head_rgb"], 2)[None, None, None],
                instructions=[observation["instruction"]],
                seeds_BS=np.zeros((1, 1), np.int64),
                horizon=17,
            )
            took = {"meet": _timed(lambda: text.twin.meet(env.fork()))[0]}
            took["text"], tries = _timed(lambda asked=asked: text.imagine(asked))
            actions = tries[0][0].actions_PA
            for samples in (1, 4):
                asked.seeds_BS = np.zeros((1, samples), np.int64)
                asked.actions_BSPA = np.repeat(actions[None, None], samples, axis=1)
                took[f"actions_{samples}"] = _timed(lambda asked=asked: acting.rollout(asked))[0]
            took["live"], observation = _timed(
                lambda actions=actions: [env.step(a) if k == 31 else env.step_blind(a) for k, a in enumerate(actions)][
                    -1
                ][0]
            )
            for name, value in took.items():
                found.setdefault(name, []).extend([value] if number else [])  # the first one warms up
    finally:
        text.close()
        env.close()
    return found


def _timed(call: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    value = call()
    return 1e3 * (time.perf_counter() - began), value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--episodes", type=int, default=5)
    parser.add_argument("--error", type=float, default=0.0, help="degrees")
    parser.add_argument("--execute", type=int, default=32, help="control steps of a plan that are executed")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--json", type=Path, help="merge measurements into this file")
    options = parser.parse_args()
    provenance, lines = machine_provenance(), []
    command = f"python benchmarks/perfect_model.py --episodes {options.episodes} --execute {options.execute}"
    command += f" --error {options.error:g}" if options.error else ""
    for task in options.tasks:
        if options.time:
            for name, values in time_task(task, options.episodes).items():
                median = statistics.median(values)
                print(f"{task:26} {name:10} {median:8.0f} ms (median of {len(values)})", flush=True)
                lines.append(
                    measurement(f"env/perfect/{task}/{name}_ms", median, unit="ms", low=min(values), high=max(values), n=len(values),
                                command=f"{command} --time", provenance=provenance)
                )  # fmt: skip
            continue
        result = run_task(task, options.episodes, options.error, options.execute)
        n, k = options.episodes, result["successes"]
        low, high = wilson(k, n)
        print(
            f"{task:26} {k}/{n} [{low:.2f}, {high:.2f}]  steps {result['steps']}  failed {dict(result['failed'])}",
            flush=True,
        )
        name = "env/perfect/" + (f"error_{options.error:g}deg" if options.error else "exact")
        about: dict[str, Any] = {"failures": dict(result["failed"])} if result["failed"] else {}
        about |= {"assets": result["assets"], "execute_horizon": options.execute, "error_deg": options.error}
        lines.append(
            measurement(f"{name}/{task}/success", k / n, unit="rate", low=low, high=high, n=n, seeds=result["seeds"],
                        against=about, command=command, provenance=provenance)
        )  # fmt: skip
    if options.json:
        write_measurements(options.json, lines)


if __name__ == "__main__":
    main()
