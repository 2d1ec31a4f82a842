"""The simulator's side of ``physis eval evaluator``: success of the same policies, and the simulator in the place of the world model."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from physisforcing.core.errors import UserError
from physisforcing.core.pictures import shrink_area
from physisforcing.core.results import ResultKey, ResultsFile, config_hash
from physisforcing.core.types import DT, Rollout, RolloutRequest, ViewLayout, WorldModelSpec

from .evaluator_episodes import Setting

#: Control steps between two pictures of the simulator in the place of a world model.
STRIDE = 2


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
        if self._env is None or self._task != task:
            self.close()
            self._env, self._task = _make(task, self.setting.config.control), task
        return self._env

    def close(self) -> None:
        env, self._env = self._env, None
        if env is not None:
            env.close()


class LiveSimulator:
    """RoboTwin as the world model of this loop (``core.protocols.WorldModel``, driven by actions).

    Its pictures are what really happens, so what remains between verdicts and truth is the judge's error, and the shorter video. It holds
    one episode at a time and goes on from where the last rollout ended: requests come in the order of their ``ids``. ``scenes``: scene hash
    of each (task, seed). ``cost["success"]``: whether the task's check has succeeded; ``cost["success_s"]``: where it has, by how many
    seconds into this rollout at the latest.
    """

    def __init__(self, scenes: Mapping[tuple[str, int], str], control: str) -> None:
        self._scenes, self._control, self._task = scenes, control, ""
        self._env: Any = None
        self._next: tuple[str, int, int] | None = None
        self.spec = _spec(control)

    def rollout(self, request: RolloutRequest) -> Rollout:
        assert request.ids is not None and request.actions_BSPA is not None and len(request.ids) == 1
        began, (task, seed, number) = time.perf_counter(), request.ids[0]
        if number == 0:
            self._reset(task, seed)
        assert number == 0 or self._next == (task, seed, number), (
            "one episode after the other, one rollout after the other"
        )
        frames, won = [request.context_BVTHWC[0, 0, 0]], None
        for step, target_A in enumerate(request.actions_BSPA[0, 0], start=1):
            seen = step % STRIDE == 0
            raw, *_, info = (self._env.step if seen else self._env.step_blind)(target_A)
            won = step * DT if won is None and info["is_success"] else won
            if seen:
                frames.append(shrink_area(raw["head_rgb"][None], 2)[0])
        self._next = (task, seed, number + 1)
        return Rollout(
            times_T=np.arange(len(frames), dtype=np.float64) * self.spec.frame_dt,
            frames_BSVTHWC=np.stack(frames)[None, None, None],
            cost={"seconds": time.perf_counter() - began, "success": float(won is not None)}
            | ({} if won is None else {"success_s": won}),
        )

    def _reset(self, task: str, seed: int) -> None:
        if self._env is None or self._task != task:
            self.close()
            self._env, self._task = _make(task, self._control).unwrapped, task
        _, info = self._env.reset(seed=seed)
        recorded = self._scenes.get((task, seed))
        if recorded and info["scene_hash"] != recorded:
            got, fix = f"scene hash {info['scene_hash']}", "use the assets and runtime that demos was recorded with"
            raise UserError("demos", got=got, wanted=f"{recorded}, as recorded in {task}/{seed}", fix=fix)

    def close(self) -> None:
        env, self._env = self._env, None
        if env is not None:
            env.close()


def _make(task: str, control: str) -> Any:
    import gymnasium

    import physisforcing.envs.robotwin  # noqa: F401  (registers the tasks)

    return gymnasium.make(f"RoboTwin/{task}-v0", control=control, disable_env_checker=True)


def _spec(control: str) -> WorldModelSpec:
    """What the simulator offers, with the robot, the assets and the runtime of this machine."""
    from physisforcing.core.vulkan import ensure_vulkan_env
    from physisforcing.envs.robotwin.embodiment import load_embodiment, resolve_assets

    from .plan_scenes import scene_source

    ensure_vulkan_env()
    return WorldModelSpec(
        name="simulator",
        views=ViewLayout(),
        context_frames=1,
        horizons=(17,),
        frame_dt=STRIDE * DT,
        conditions=frozenset({"actions"}),
        returns=frozenset({"frames"}),
        action_spec=load_embodiment(resolve_assets(None), None).action_spec,
        fingerprint=f"{scene_source()}-{control}",
    )
