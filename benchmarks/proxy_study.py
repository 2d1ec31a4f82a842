"""Does the self-made asset pack rank policies as RoboTwin's own assets do? And do the two control modes agree?

    ROBOTWIN_ASSETS=FOLDER python benchmarks/proxy_study.py --out runs/proxy [--episodes 20] [--workers 2] [--json docs/results/proxy.json]

Eleven policies of graded quality act in the same frozen seeds of tasks whose official pieces are there: the expert's recorded targets, with
growing noise, with late grippers, cut short, and uniform random targets and no motion. Three arms: pack, official assets, and the
pack under RoboTwin's own ``topp`` control. Printed: success of each policy, Kendall's tau-b between the arms over (task, policy)
cells and the offset of mean success, with bootstrap intervals over seeds. The same ``--out`` continues an interrupted study.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.results import ResultKey, ResultsFile, config_hash
from physisforcing.core.stats import wilson
from physisforcing.envs.manifest import load_manifest
from physisforcing.envs.robotwin.embodiment import resolve_assets
from physisforcing.envs.robotwin.runtime import load_runtime
from physisforcing.envs.seeds import FixedJobs, Job, Outcome, run_seeds
from physisforcing.planner.measurements import machine_provenance, measurement, write_measurements

TASKS = ("click_bell", "press_stapler", "stack_blocks_two", "handover_block")
#: Arm of the study -> (assets, control).
ARMS = {"pack": ("pack", "interpolated"), "official": ("official", "interpolated"), "topp": ("pack", "topp")}
GRIPPERS = (6, 13)
JOINTS = tuple(i for i in range(14) if i not in GRIPPERS)
#: Control steps that a policy may hold its last target after its recording ends.
HOLD = 10


@dataclass(slots=True, kw_only=True, frozen=True)
class Grade:
    """One policy: the expert's targets with noise (radians, a new draw every 4 steps), late grippers (steps), a kept share."""

    noise: float = 0.0
    late: int = 0
    kept: float = 1.0
    kind: str = "expert"


GRADES = {
    "expert": Grade(),
    "noise_0.02": Grade(noise=0.02),
    "noise_0.05": Grade(noise=0.05),
    "noise_0.10": Grade(noise=0.10),
    "noise_0.20": Grade(noise=0.20),
    "late_4": Grade(late=4),
    "late_12": Grade(late=12),
    "kept_0.85": Grade(kept=0.85),
    "kept_0.60": Grade(kept=0.60),
    "random": Grade(kind="random"),
    "noop": Grade(kind="noop"),
}


def graded_targets(
    grade: Grade, expert_TA: NDArray[np.float32], low_A: NDArray, high_A: NDArray, seed: int
) -> NDArray[np.float32]:
    """Targets [T,A] of a policy, from the expert's in the same scene. The noise depends on the seed and the grade alone."""
    rng = np.random.default_rng([seed, sorted(GRADES).index(next(n for n, g in GRADES.items() if g == grade))])
    count = len(expert_TA)
    if grade.kind == "noop":
        return np.repeat(expert_TA[:1], count, axis=0)
    if grade.kind == "random":
        draws = rng.uniform(low_A, high_A, (count // 16 + 1, expert_TA.shape[1])).astype(np.float32)
        return np.repeat(draws, 16, axis=0)[:count]
    targets = expert_TA.copy()
    if grade.late:
        rows = np.maximum(np.arange(count) - grade.late, 0)
        targets[:, GRIPPERS] = expert_TA[rows][:, GRIPPERS]
    if grade.noise:
        draws = rng.normal(0.0, grade.noise, (count // 4 + 1, len(JOINTS)))
        targets[:, JOINTS] += np.repeat(draws, 4, axis=0)[:count].astype(np.float32)
    return np.clip(targets[: max(1, round(grade.kept * count))], low_A, high_A)


class Player:
    """Plays every grade in one scene of one arm; ``task`` of a job is ``arm/task``."""

    def __init__(self, official: str) -> None:
        self._official, self._env, self._name = official, None, ""

    def handle(self, job: Job) -> Outcome:
        env = self._environment(job.task)
        env.reset(seed=job.seed, options={"observe": False})
        expert: list[NDArray[np.float32]] = []
        # A failed expert is a policy too: what it did until then is what is graded.
        env.play_expert(lambda _: expert.append(env.observe(pictures=False)["state"]))
        succeeded = {name: self._play(env, grade, np.stack(expert), job.seed) for name, grade in GRADES.items()}
        return Outcome(task=job.task, seed=job.seed, kind="recorded", details=succeeded)

    def _environment(self, name: str) -> Any:
        if self._name != name:
            self.close()
            import gymnasium

            import physisforcing.envs.robotwin  # noqa: F401  (registers the tasks)

            arm, task = name.split("/")
            assets, control = ARMS[arm]
            options = {"assets": self._official} if assets == "official" else {}
            made = gymnasium.make(
                f"RoboTwin/{task}-v0", cameras=(), control=control, disable_env_checker=True, **options
            )
            self._env, self._name = made.unwrapped, name
        return self._env

    @staticmethod
    def _play(env: Any, grade: Grade, expert_TA: NDArray[np.float32], seed: int) -> bool:
        env.reset(seed=seed, options={"observe": False})
        low_A, high_A = env.action_space.low, env.action_space.high
        # An expert that finds no first motion has one frame: its policy holds still.
        after_TA = expert_TA[1:] if len(expert_TA) > 1 else expert_TA
        targets = graded_targets(grade, after_TA, low_A, high_A, seed)
        for target_A in [*targets, *[targets[-1]] * HOLD]:
            *_, success, truncated, _ = env.step_blind(target_A)
            if success or truncated:
                return bool(success)
        return False

    def close(self) -> None:
        env, self._env, self._name = self._env, None, ""
        if env is not None:
            env.close()


def run(options: argparse.Namespace, official: str) -> dict[str, dict[int, dict[str, bool]]]:
    """``arm/task`` -> seed -> policy -> success. Seeds whose scene does not come to rest in an arm, or that end in an error there
    (a time limit, a crash), are left out there; how many is printed at the end."""
    results = ResultsFile(Path(options.out) / "results.jsonl")
    manifests = {task: load_manifest(f"{options.manifest}_{task}") for task in options.tasks}
    played = {"grades": {name: str(grade) for name, grade in GRADES.items()}, "hold": HOLD}
    config = config_hash(played | {"official": resolve_assets(official).label, "runtime": load_runtime().label})

    def key(job: Job) -> ResultKey:
        manifest = manifests[job.task.partition("/")[2]]
        return ResultKey(manifest=manifest.key, episode=f"{job.task}/{job.seed}", fingerprint="grades", config=config)

    def on_outcome(outcome: Outcome) -> None:
        status = "success" if outcome.kind == "recorded" else "error"
        job = Job(task=outcome.task, seed=outcome.seed)
        results.append(key(job), status, played=outcome.details, message=outcome.message)
        print(
            f"{outcome.task} {outcome.seed}: {outcome.kind} {sum(outcome.details.values())}/{len(GRADES)}", flush=True
        )

    # topp takes longest, so it goes first: at the end no process waits long for another
    jobs = [
        Job(task=f"{arm}/{task}", seed=entry.seed)
        for arm in sorted(options.arms, key=lambda arm: ARMS[arm][1] != "topp")
        for task in options.tasks
        for entry in manifests[task].entries[: options.episodes]
    ]
    todo = [job for job in jobs if not results.done(key(job), retry_errors=True)]
    limit = {"time_limit_s": options.time_limit}
    run_seeds(FixedJobs(todo), partial(Player, official), workers=options.workers, on_outcome=on_outcome, **limit)
    table: dict[str, dict[int, dict[str, bool]]] = {job.task: {} for job in jobs}
    for job in jobs:
        row = results.get(key(job))
        if row is not None and row["status"] == "success":
            table[job.task][job.seed] = row["played"]
    for name, found in table.items():
        asked = [job.seed for job in jobs if job.task == name]
        if left_out := sorted(set(asked) - found.keys()):
            print(f"{name}: {len(found)} of {len(asked)} scenes; without {left_out}", flush=True)
    return table


def cells(table: dict, arm: str, tasks: list[str], seeds: dict[str, NDArray[np.int64]]) -> NDArray[np.float64]:
    """Success rate of each (task, policy) over the given seeds (repeats count)."""
    return np.array(
        [np.mean([table[f"{arm}/{task}"][int(s)][name] for s in seeds[task]]) for task in tasks for name in GRADES]
    )


def compare(table: dict, one: str, two: str, tasks: list[str], draws: int = 1000) -> dict[str, Any]:
    """Kendall's tau-b over cells and the offset (two minus one) of mean success, on seeds that both arms have."""
    from scipy.stats import kendalltau

    shared = {t: np.array(sorted(table[f"{one}/{t}"].keys() & table[f"{two}/{t}"].keys())) for t in tasks}
    rng = np.random.default_rng(0)

    def values(seeds: dict[str, NDArray[np.int64]]) -> tuple[float, float]:
        a, b = cells(table, one, tasks, seeds), cells(table, two, tasks, seeds)
        return float(kendalltau(a, b).statistic), float((b - a).mean())

    sampled = np.array([values({t: rng.choice(s, len(s)) for t, s in shared.items()}) for _ in range(draws)])
    low, high = np.nanpercentile(sampled, [2.5, 97.5], axis=0)
    tau, offset = values(shared)
    seeds = sorted({int(s) for part in shared.values() for s in part})
    return {
        "tau": (tau, low[0], high[0]),
        "offset": (offset, low[1], high[1]),
        "n": sum(map(len, shared.values())),
        "seeds": seeds,
    }


def report(table: dict, tasks: list[str], command: str) -> list[dict[str, Any]]:
    """Print the tables; returns the measurements."""
    shared: dict[str, Any] = {"command": command, "provenance": machine_provenance()}
    lines = []
    for name, episodes in table.items():
        print(f"\n{name} (n={len(episodes)})")
        for policy in GRADES:
            wins, count = sum(row[policy] for row in episodes.values()), len(episodes)
            low, high = wilson(wins, count)
            print(f"  {policy:12} {wins}/{count}")
            claim = f"proxy/{name}/{policy}/success_share"
            if count:
                lines.append(
                    measurement(
                        claim, wins / count, unit="share", low=low, high=high, n=count, seeds=list(episodes), **shared
                    )
                )
    for one, two in (("pack", "official"), ("pack", "topp")):
        usable = [t for t in tasks if table.get(f"{one}/{t}", {}).keys() & table.get(f"{two}/{t}", {}).keys()]
        if not usable:
            print(f"{two} against {one} skipped: needs both arms")
            continue
        found = compare(table, one, two, usable)
        for what in ("tau", "offset"):
            value, low, high = found[what]
            print(f"{what} {two} against {one}: {value:.2f} ({low:.2f} to {high:.2f}), {found['n']} scenes")
            more = {"low": float(low), "high": float(high), "n": found["n"], "seeds": found["seeds"]}
            lines.append(measurement(f"proxy/{two}_against_{one}/{what}", value, unit="1", **more, **shared))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--manifest", default="validation", help="set of frozen scenes; the same seeds in every arm")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--time-limit", type=float, default=0.0, help="seconds after which no scene is begun (0: none)")
    parser.add_argument("--json")
    options = parser.parse_args()
    official = os.environ.pop("ROBOTWIN_ASSETS", "")
    if not official:
        sys.exit("set ROBOTWIN_ASSETS to a folder in RoboTwin's layout with the aloha-agilex embodiment")
    lines = report(run(options, official), options.tasks, " ".join(["python benchmarks/proxy_study.py", *sys.argv[1:]]))
    if options.json:
        write_measurements(options.json, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
