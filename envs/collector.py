"""One process of a collection: records an episode a job into the dataset that all processes write."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import math
import time
from typing import TYPE_CHECKING, Any

from physisforcing.core.errors import UserError
from physisforcing.core.lerobot import LeRobotWriter, robot_features

from .diversions import record_diverted_expert
from .recording import EpisodeRecorder, hold, record_expert, record_noisy_expert
from .seeds import Job, Outcome

if TYPE_CHECKING:
    from .collect import CollectConfig

#: Policies by name; others are ``module:factory``.
POLICIES = ("expert", "expert+noise", "expert+errors", "expert+random", "random")


def load_policy(name: str) -> Any:
    """A ``core.protocols.Policy`` from ``module:factory`` (an importable module of the user's; called without arguments)."""
    module, _, factory = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError) as error:
        fix = "put its folder on PYTHONPATH and write module:function"
        raise UserError("policy", got=name, wanted=f"an importable module:factory ({error})", fix=fix) from error
    from physisforcing.core.protocols import Policy

    if not isinstance(made, Policy):
        missing = [n for n in ("fingerprint", "reset", "act", "telemetry") if not hasattr(made, n)]
        raise UserError(
            "policy", got=f"{name} without {', '.join(missing)}", wanted="a Policy", fix="see core.protocols"
        )
    return made


class Collector:
    """Records one episode a job. Keeps one environment alive and makes a new one when the task changes."""

    def __init__(self, config: CollectConfig) -> None:
        self.config = config
        self._env: Any = None
        self._task = ""
        self._policy: Any = None
        self._model: Any = None
        self._writer: LeRobotWriter | None = None

    def _ready(self, task: str) -> Any:
        import gymnasium

        from . import robotwin  # noqa: F401  (registers the tasks)

        if self._env is None or self._task != task:
            self.close()
            self._env = gymnasium.make(
                f"RoboTwin/{task}-v0",
                cameras=tuple(self.config.cameras),
                control="interpolated",
                instruction=self.config.instruction,
                embodiment=self.config.embodiment,
                randomization=self.config.randomization,
                disable_env_checker=True,
            )
            self._task = task
        return self._env

    def _writer_for(self, env: Any, robot_type: str) -> LeRobotWriter:
        if self._writer is None:
            names, cameras = env.unwrapped.action_spec.names, self.config.cameras
            height, width = (int(side) for side in self.config.pictures.split("x"))
            features = robot_features(names, cameras=cameras, height=height, width=width)
            self._writer = LeRobotWriter(self.config.output, features, robot_type=robot_type, crf=self.config.crf)
        return self._writer

    def handle(self, job: Job) -> Outcome:
        config, began = self.config, time.process_time()
        env = self._ready(job.task)
        recorder = EpisodeRecorder(tuple(config.cameras), config.ground_truth, config.pictures)
        label = config.policy
        if config.policy == "expert":
            info = record_expert(env.unwrapped, job.seed, recorder, hold_frames=config.hold_frames)
        elif config.policy == "expert+noise":
            info = record_noisy_expert(
                env.unwrapped, job.seed, recorder, hold_frames=config.hold_frames, noise_rad=config.noise_rad
            )
        elif config.policy == "expert+random":
            info = record_diverted_expert(env.unwrapped, job.seed, recorder, hold_frames=config.hold_frames)
        else:
            info, label = self._run_policy(env, job, recorder)
        if env.unwrapped.diverged:
            message = f"a body's pose was no number any more after {len(recorder)} frames"
            return Outcome(task=job.task, seed=job.seed, kind="diverged", message=message)
        if config.keep == "success" and not recorder.success[-1]:
            message = (
                f"the policy failed: {getattr(env.unwrapped, 'expert_failure', '') or 'the check never succeeded'}"
            )
            return Outcome(task=job.task, seed=job.seed, kind="rejected", message=message)
        key = episode_key(job, config.policy)
        writer = self._writer_for(env, info["embodiment"])
        # A worker that outlived an interrupted run may have written this seed since the plan was made.
        if not writer.has(key):
            recorder.write(writer, key=key, policy=label, info=info)
        return Outcome(
            task=job.task,
            seed=job.seed,
            kind="recorded",
            details={
                "success": recorder.success[-1],
                "frames": len(recorder),
                "cpu_s": time.process_time() - began,
            },
        )

    def _run_policy(self, env: Any, job: Job, recorder: EpisodeRecorder) -> tuple[dict[str, Any], str]:
        from .rollout import run_episode

        if self._policy is None:
            self._policy = self._make_policy(env.unwrapped)
        limit = self.config.max_steps
        result = run_episode(env, self._policy, seed=job.seed, max_steps=limit, recorder=recorder)
        if result.error:
            if result.error.startswith("UnstableSceneError"):
                from physisforcing.core.errors import UnstableSceneError

                raise UnstableSceneError(result.error.partition(": ")[2])
            raise RuntimeError(f"the policy failed:\n{result.error}")
        if self.config.policy == "expert+errors":
            if not env.unwrapped.diverged:  # an episode ends where the check first holds, with the arms under way
                hold(env.unwrapped, recorder, self.config.hold_frames)
            return result.info, f"{self.config.policy} {self._policy.error_deg:.2f}deg"
        if self.config.policy in POLICIES:
            return result.info, self.config.policy
        return result.info, f"{self.config.policy} {self._policy.fingerprint}"

    def _make_policy(self, env: Any) -> Any:
        if self.config.policy == "random":
            from .baselines import Random

            return Random(env.action_spec)
        if self.config.policy == "expert+errors":
            from .perfect_planner import PerfectPlanner, SmoothErrors
            from .simulator_world_model import SimulatorConfig, SimulatorWorldModel

            # two pictures of one camera a rollout: only its targets are wanted
            few = SimulatorConfig(horizons=(2,), stride=32, views=tuple(self.config.cameras[:1]))
            self._model = SimulatorWorldModel(few).bind(env)
            return SmoothErrors(PerfectPlanner(self._model), math.degrees(self.config.noise_rad), vary=True)
        return load_policy(self.config.policy)

    def close(self) -> None:
        model, self._model = self._model, None
        if model is not None:
            model.close()
            self._policy = None  # bound to the environment that closes here
        env, self._env = self._env, None
        if env is not None:
            env.close()


class JointCollector:
    """The ``Collector`` of each of several collections in one process, one environment at a time."""

    def __init__(self, configs: dict[str, CollectConfig]) -> None:
        self._collectors = {name: Collector(config) for name, config in configs.items()}

    def handle(self, job: Job) -> Outcome:
        name, _, task = job.task.partition("/")
        for other, collector in self._collectors.items():
            if other != name:
                collector.close()
        return dataclasses.replace(self._collectors[name].handle(Job(task=task, seed=job.seed)), task=job.task)

    def close(self) -> None:
        for collector in self._collectors.values():
            collector.close()


def episode_key(job: Job, policy: str) -> str:
    """Sorts by task, then seed; different policies never collide."""
    if policy in POLICIES:
        return f"{job.task}-{job.seed:08d}-{policy.replace('+', '-')}"
    return f"{job.task}-{job.seed:08d}-{hashlib.sha256(policy.encode()).hexdigest()[:8]}"
