"""The simulator's side of ``physis eval evaluator``: success of the same policies, run here or read from results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from physisforcing.core.errors import UserError
from physisforcing.core.results import ResultKey, ResultsFile, config_hash

from .evaluator_episodes import Setting


def real_results(setting: Setting, *, progress: bool) -> dict[str, tuple[int, int]]:
    """Policy -> (successes, episodes) in the simulator, from where ``real`` says."""
    config = setting.config
    if not config.real:
        return {}
    if config.real == "simulate":
        return _simulated(setting, progress=progress)
    path = Path(config.real)
    if path.suffix == ".json" and path.is_file():
        return _table(path)
    results = path / "results.jsonl" if path.is_dir() else path
    if not results.is_file():
        wanted = "simulate, a folder of physis eval plan, or a .json file"
        raise UserError("real", got=config.real, wanted=wanted, fix="correct the path, or leave real out")
    # Only scenes that were imagined: success in other scenes is another number.
    rows = [r for r in ResultsFile(results).rows if (r.get("task"), r.get("seed")) in setting.starts]
    found = {}
    for name in config.policies:
        mine = [row for row in rows if row.get("policy") == name and row["status"] != "error"]
        if mine:
            found[name] = (sum(row["status"] == "success" for row in mine), len(mine))
    if not found:
        got = f"no episode of {', '.join(config.policies)} in the scenes of demos"
        raise UserError("real", got=got, wanted="results of the same policies and seeds", fix="real=simulate")
    return found


def _table(path: Path) -> dict[str, tuple[int, int]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = {str(name): (int(counts[0]), int(counts[1])) for name, counts in content.items()}
        if any(not 0 <= successes <= n for successes, n in found.values()):
            raise ValueError("more successes than episodes")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        wanted = '{"policy": [successes, episodes]}'
        raise UserError("real", got=f"{path}: {error}", wanted=wanted, fix="correct the file") from error
    return found


def _simulated(setting: Setting, *, progress: bool) -> dict[str, tuple[int, int]]:
    from .episode_jobs import run_jobs

    config = setting.config

    def key(job: Any) -> ResultKey:
        task, name = job.task.split("/")
        fingerprint = setting.policy(name, task, job.seed).fingerprint
        hashed = config_hash({"control": config.control, "policy": name})
        return ResultKey(
            manifest=setting.manifest, episode=f"{task}/{job.seed}", fingerprint=fingerprint, config=hashed
        )

    jobs = sorted(setting.jobs(), key=lambda job: job.task.split("/")[0])  # one environment after the other
    make = lambda: _SimulatedEpisodes(setting)  # noqa: E731  (this process only)
    retry = config.retry_errors
    rows = run_jobs(jobs, key, setting.output / "simulator", make, retry_errors=retry, progress=progress)
    found = {}
    for name in config.policies:
        mine = [row for row in rows if row["policy"] == name and row["status"] != "error"]
        found[name] = (sum(row["status"] == "success" for row in mine), len(mine))
    return found


class _SimulatedEpisodes:
    """The same policies in the same scenes (``envs.seeds.Handler``)."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self._task = setting, ""
        self._env: Any = None

    def handle(self, job: Any) -> Any:
        from physisforcing.envs.rollout import run_episode
        from physisforcing.envs.seeds import Outcome

        task, name = job.task.split("/")
        env = self._environment(task)
        result = run_episode(env, self.setting.policy(name, task, job.seed), seed=job.seed)
        row = result.row() | {"status": result.status}
        recorded = self.setting.starts[task, job.seed].scene_hash
        if recorded and result.scene_hash and result.scene_hash != recorded:
            error = f"scene hash {result.scene_hash}, recorded {recorded}"
            row |= {"status": "error", "error": error}
        return Outcome(task=job.task, seed=job.seed, kind="recorded", details=row)

    def _environment(self, task: str) -> Any:
        import gymnasium

        import physisforcing.envs.robotwin  # noqa: F401  (registers the tasks)

        if self._env is None or self._task != task:
            self.close()
            control = self.setting.config.control
            self._env = gymnasium.make(f"RoboTwin/{task}-v0", control=control, disable_env_checker=True)
            self._task = task
        return self._env

    def close(self) -> None:
        env, self._env = self._env, None
        if env is not None:
            env.close()
