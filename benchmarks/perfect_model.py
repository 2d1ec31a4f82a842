"""The perfect model under replanning: ``python benchmarks/perfect_model.py [--tasks ...] [--episodes 5] [--error DEG] [--json FILE]``.

In frozen test scenes (each solved by the expert once, when it was frozen) the expert's future is imagined from the state as it is, and
its own drive targets are executed until the next plan: the ceiling for every world model and decoder under this planner. ``--error``
adds smooth errors to the targets, as a decoder makes them: normal with this standard deviation in degrees, correlated over about five
control steps, on grippers the same number in percent of their opening. ``--decoder FOLDER`` (or ``shipped``): the targets are read out of
the pictures of that future instead; ``decoded_deg`` and ``decoded_gripper`` are the RMSE over all plans' executed rows against the
expert's own targets, of all episodes and of those that succeeded and failed. The same command continues where it was stopped, also on
another machine. ``--time``: milliseconds of a rollout and of its parts instead, by the clock; say so if the machine does other work.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.paths import weights_root
from physisforcing.core.pictures import shrink_area
from physisforcing.core.results import ResultKey, config_hash
from physisforcing.core.stats import wilson
from physisforcing.core.types import ActionChunk, DecoderNeeds, Rollout, RolloutRequest
from physisforcing.envs.manifest import load_manifest
from physisforcing.envs.perfect_planner import PerfectPlanner, SmoothErrors
from physisforcing.envs.rollout import run_episode
from physisforcing.envs.seeds import Job, Outcome
from physisforcing.envs.simulator_world_model import VERSION, SimulatorConfig, SimulatorWorldModel
from physisforcing.episode_jobs import run_jobs
from physisforcing.planner.action_planner import ActionPlanner, ActionPlannerConfig
from physisforcing.planner.decoder_files import load_decoder
from physisforcing.planner.measurements import machine_provenance, measurement, placeless, write_measurements

GRIPPERS = [6, 13]
TASKS = ("adjust_bottle", "click_bell", "place_empty_cup", "grab_roller", "stack_blocks_two", "stack_bowls_two")


class ReadOut:
    """A decoder that is held against the expert: keeps how far its rows are from the targets that made the pictures."""

    def __init__(self, inner: Any, model: SimulatorWorldModel, execute: int) -> None:
        self.inner, self.execute = inner, execute
        self.needs: DecoderNeeds = inner.needs
        self.fingerprint: str = inner.fingerprint
        self.errors: list[NDArray[np.float64]] = []
        self._truth: list[NDArray[np.float32]] = []
        imagine = model.imagine

        def kept(request: RolloutRequest, **options: Any) -> Any:
            found = imagine(request, **options)
            self._truth = [row[0].actions_PA for row in found]
            return found

        model.imagine = kept  # type: ignore[method-assign]

    def decode(
        self, rollout: Rollout, state_BA: NDArray[np.float32], instructions: Sequence[str]
    ) -> list[list[ActionChunk]]:
        chunks = self.inner.decode(rollout, state_BA, instructions)
        for row, truth_PA in zip(chunks, self._truth, strict=True):
            rows = min(self.execute, len(truth_PA))
            self.errors.append(np.asarray(row[0].actions_PA[:rows] - truth_PA[:rows], np.float64))
        return chunks


@dataclass(slots=True, kw_only=True, frozen=True)
class Settings:
    """``decoder``: folder; empty for the expert's own targets."""

    error: float
    execute: int
    decoder: str
    device: str


class Episodes:
    """Runs episodes in one process (``envs.seeds.Handler``); keeps one task's environment and model."""

    def __init__(self, settings: Settings) -> None:
        self.provenance = machine_provenance()
        self.settings, self._task, self._env, self._model, self._policy = settings, "", None, None, None
        self._readout: ReadOut | None = None

    def handle(self, job: Job) -> Outcome:
        task = job.task.split("/")[0]
        if task != self._task:
            self._open(task)
        entry = next(entry for entry in _manifest(task).entries if entry.seed == job.seed)
        result = run_episode(self._env, self._policy, seed=entry.seed, expect=entry)
        row: dict[str, Any] = {"status": result.status, "success": result.success, "steps": result.steps}
        row["provenance"] = self.provenance  # an episode may have run elsewhere, and before, the report
        row |= {"error": result.error} if result.error else {"assets": result.info["assets"]}
        row["reason"] = _reason(result.telemetry) if result.status == "failure" else ""
        if self._readout is not None and self._readout.errors:
            row |= squares(np.concatenate(self._readout.errors))
            row["plans_deg"] = [rmse(squares(errors_PA)["deg"]) for errors_PA in self._readout.errors]
            self._readout.errors.clear()
        return Outcome(task=job.task, seed=job.seed, kind="recorded", details=row)

    def _open(self, task: str) -> None:
        from physisforcing.envs.robotwin.env import RoboTwinEnv

        self.close()
        settings = self.settings
        self._env = env = RoboTwinEnv(task)
        exact = SimulatorConfig(horizons=(2,), stride=32)
        self._model = model = SimulatorWorldModel(SimulatorConfig() if settings.decoder else exact).bind(env)
        if settings.decoder:
            self._readout = ReadOut(_decoder(settings.decoder, settings.device), model, settings.execute)
            config = ActionPlannerConfig(execute_horizon=settings.execute)
            self._policy = ActionPlanner(model, self._readout, config, None, env.action_spec)
        else:
            policy = PerfectPlanner(model, execute_horizon=settings.execute)
            self._policy = SmoothErrors(policy, settings.error) if settings.error else policy
        self._task = task

    def close(self) -> None:
        for part in (self._model, self._env):
            if part is not None:
                part.close()
        self._task, self._env, self._model, self._policy, self._readout = "", None, None, None, None


@functools.cache
def _manifest(task: str) -> Any:
    return load_manifest(f"test_{task}")


@functools.cache
def _decoder(folder: str, device: str) -> Any:
    return load_decoder(weights_root() / "idm" if folder == "shipped" else folder, device)


def run_all(
    tasks: Sequence[str],
    episodes: int,
    settings: Settings,
    name: str,
    workers: int,
    output: Path,
    retry_errors: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """Rows by task; those that ``output`` already holds are not run again. ``workers``: processes; 0: here."""
    reads = _decoder(settings.decoder, "cpu").fingerprint if settings.decoder else name
    about = {"error": settings.error, "execute": settings.execute, "device": settings.device, "simulator": VERSION}
    hashed = config_hash(about)

    def key(job: Job) -> ResultKey:
        task = job.task.split("/")[0]
        return ResultKey(manifest=_manifest(task).key, episode=f"{task}/{job.seed}", fingerprint=reads, config=hashed)

    jobs = [Job(task=f"{task}/{name}", seed=e.seed) for task in tasks for e in _manifest(task).entries[:episodes]]
    make = functools.partial(Episodes, settings)
    rows = run_jobs(jobs, key, output, make, workers=workers, retry_errors=retry_errors)
    return {task: [row for row in rows if row["task"] == task] for task in tasks}


def squares(errors_PA: NDArray[np.float64]) -> dict[str, Any]:
    """Sums of squares and counts of decoded rows' errors: of joints in degrees, of grippers as share of their opening."""
    joints_PJ = np.rad2deg(np.delete(errors_PA, GRIPPERS, axis=1))
    grippers_PG = errors_PA[:, GRIPPERS]
    return {
        "deg": [float((joints_PJ**2).sum()), joints_PJ.size],
        "gripper": [float((grippers_PG**2).sum()), grippers_PG.size],
    }


def decoded_errors(rows: list[dict[str, Any]]) -> dict[str, float]:
    """RMSE over all executed rows: joints in degrees, grippers as share of their opening."""
    read = [row for row in rows if "deg" in row]
    sums = {name: np.sum([row[name] for row in read], axis=0) for name in ("deg", "gripper") if read}
    return {f"decoded_{name}": rmse(total) for name, total in sums.items()}


def rmse(total: Sequence[float]) -> float:
    """Of a sum of squares and a count."""
    return float(np.sqrt(total[0] / total[1]))


def typical_errors(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over episodes of the joints' RMSE in degrees: of the whole episode, and of its first plan, before any error had led the robot
    anywhere. A long failed episode weighs no more than another."""
    found = {"decoded_deg, median of episodes": [rmse(row["deg"]) for row in rows if "deg" in row]}
    found["decoded_deg, median of first plans"] = [row["plans_deg"][0] for row in rows if "plans_deg" in row]
    return {name: statistics.median(values) for name, values in found.items() if values}


def _reason(telemetry: dict[str, float]) -> str:
    return "no motion found at the end" if telemetry.get("expert_failed") else "still trying at the step limit"


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


def time_all(options: argparse.Namespace, command: str, provenance: Any) -> list[dict[str, Any]]:
    lines = []
    for task in options.tasks:
        for name, values in time_task(task, options.episodes).items():
            median = statistics.median(values)
            print(f"{task:26} {name:10} {median:8.0f} ms (median of {len(values)})", flush=True)
            lines.append(
                measurement(f"env/perfect/{task}/{name}_ms", median, unit="ms", low=min(values), high=max(values), n=len(values),
                            command=f"{command} --time", provenance=provenance)
            )  # fmt: skip
    return lines


def success_line(
    task: str, rows: list[dict[str, Any]], settings: Settings, name: str, command: str
) -> dict[str, Any] | None:
    """The measurement of a task; None where no episode was finished. Crashed episodes stand in no denominator."""
    crashed = [row["seed"] for row in rows if row["status"] == "error"]
    rows = [row for row in rows if row["status"] != "error"]
    if not rows:
        print(f"{task:26} skipped: no finished episode, {len(crashed)} crashed", flush=True)
        return None
    n, k = len(rows), sum(row["success"] for row in rows)
    low, high = wilson(k, n)
    failed = dict(Counter(row["reason"] for row in rows if not row["success"]))
    about: dict[str, Any] = {"failures": failed} if failed else {}
    about |= {"assets": rows[0]["assets"], "execute_horizon": settings.execute, "error_deg": settings.error}
    about |= {"crashed, in no denominator": crashed} if crashed else {}
    if settings.decoder:
        about |= (
            decoded_errors(rows) | typical_errors(rows) | {"decoder": _decoder(settings.decoder, "cpu").fingerprint}
        )
        for outcome in (True, False) if 0 < k < n else ():
            alike = [row for row in rows if row["success"] is outcome]
            found = decoded_errors(alike) | typical_errors(alike)
            about |= {f"{name} where it {'succeeded' if outcome else 'failed'}": value for name, value in found.items()}
    for fact in ("commit", "hardware"):
        if len(counts := Counter(row["provenance"][fact] for row in rows)) > 1:
            about[f"episodes by {fact}"] = dict(counts)
    words = " ".join(f"{key} {value:.3g}" for key, value in about.items() if key.startswith("decoded"))
    print(
        f"{task:26} {k}/{n} [{low:.2f}, {high:.2f}]  steps {[row['steps'] for row in rows]}  {words} {failed}",
        flush=True,
    )
    return measurement(
        f"env/perfect/{name}/{task}/success", k / n, unit="rate", low=low, high=high, n=n,
        seeds=[row["seed"] for row in rows], against=about, command=command, provenance=rows[-1]["provenance"],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--episodes", type=int, default=5)
    parser.add_argument("--error", type=float, default=0.0, help="degrees")
    parser.add_argument("--decoder", default="", help="folder of a decoder that reads pictures, or shipped")
    parser.add_argument("--name", default="decoder", help="of that decoder in the claims")
    parser.add_argument("--device", default="cpu", help="of the decoder")
    parser.add_argument("--workers", type=int, default=0, help="processes")
    parser.add_argument("--execute", type=int, default=32, help="control steps of a plan that are executed")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--retry-errors", action="store_true", help="run crashed episodes again")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/perfect_model"), help="finished episodes: continues there"
    )
    parser.add_argument("--json", type=Path, help="merge measurements into this file")
    options = parser.parse_args()
    command = f"python benchmarks/perfect_model.py --episodes {options.episodes} --execute {options.execute}"
    command += f" --tasks {' '.join(options.tasks)}" if options.tasks != TASKS else ""
    command += f" --error {options.error:g}" if options.error else ""
    if options.decoder:
        command += f" --decoder {placeless(options.decoder)} --name {options.name} --device {options.device}"
    if options.time:
        lines = time_all(options, command, machine_provenance())
    else:
        settings = Settings(
            error=options.error, execute=options.execute, decoder=options.decoder, device=options.device
        )
        name = f"error_{options.error:g}deg" if options.error else options.name if options.decoder else "exact"
        found = run_all(
            options.tasks, options.episodes, settings, name, options.workers, options.output, options.retry_errors
        )
        told = [success_line(task, rows, settings, name, command) for task, rows in found.items()]
        lines = [line for line in told if line is not None]
    if options.json:
        write_measurements(options.json, lines)


if __name__ == "__main__":
    main()
