"""Episodes of ``physis eval evaluator``: which there are, imagined, and judged."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError
from physisforcing.core.results import ResultKey, config_hash

from .eval_evaluator import FIRST_SEED, EvaluatorConfig

#: Control steps that a joint error of ``recorded+NOISE`` lasts.
NOISE_STEPS = 4
GRIPPERS = (6, 13)


class Setting:
    """What all episodes share: demonstrations, world model, judge, policies. ``starts``: (task, seed) -> episode of the dataset."""

    def __init__(self, config: EvaluatorConfig) -> None:
        import torch

        from physisforcing.core.lerobot import LeRobotDataset
        from physisforcing.planner.policy_evaluator import PolicyInModel

        from .world_models import load_any

        torch.set_num_threads(config.threads)
        self.config, self.output = config, Path(config.output)
        self.dataset = LeRobotDataset(config.demos)
        self.starts = self._starts()
        self.judge = make_judge(config)
        model: Any
        if config.world_model == "simulator":
            from .evaluator_simulator import LiveSimulator

            model = LiveSimulator({key: info.scene_hash for key, info in self.starts.items()}, config.control)
        else:
            steps = config.denoising_steps or None
            model = load_any(config.world_model, config.device, codec=config.codec or None, steps=steps)
        self.inside, self.spec = PolicyInModel(model, config.rollout), model.spec
        self.judge_name = "none" if self.judge is None else self.judge.fingerprint
        self._policies: dict[str, Any] = {}
        self.manifest = f"demonstrations-{self.dataset.fingerprint()[:12]}"

    def _starts(self) -> dict[tuple[str, int], Any]:
        config = self.config
        found: dict[tuple[str, int], Any] = {}
        known = list(dict.fromkeys(episode.task_name for episode in self.dataset.episodes))
        for task in config.tasks or known:
            mine = [e for e in self.dataset.episodes if e.task_name == task and e.success is not False]
            if trained := [e.seed for e in mine if e.seed < FIRST_SEED]:
                fix = "physis data collect start_seed=100000"
                raise UserError("demos", got=f"seed {trained[0]}", wanted="scenes nobody trained on", fix=fix)
            if len(mine) < config.episodes:
                got, wanted = f"{len(mine)} of {task}", f"{config.episodes} successful demonstrations"
                raise UserError("demos", got=got, wanted=wanted, fix=f"episodes={len(mine)}, or collect more")
            found |= {(task, e.seed): e for e in sorted(mine, key=lambda e: e.seed)[: config.episodes]}
        return found

    def jobs(self) -> list[Any]:
        from physisforcing.envs.seeds import Job

        return [Job(task=f"{t}/{p}", seed=s) for p in self.config.policies for t, s in self.starts]

    def policy(self, name: str, task: str, seed: int) -> Any:
        """The policy called ``name`` for one scene."""
        from physisforcing.envs import baselines

        if name.startswith("recorded"):
            from physisforcing.planner.video_decoding import OpenLoopPolicy

            columns = self.dataset.columns(self.starts[task, seed].index)
            noise = float(name.partition("+")[2] or 0)
            return OpenLoopPolicy(name, noisy_targets(np.asarray(columns["action"], np.float32)[:-1], noise, seed))
        if name not in self._policies:
            if name == "noop":
                made: Any = baselines.NoOp()
            elif name == "random":
                made = baselines.Random(_action_spec(self.spec))
            elif name == "retrieval":
                from .plan_scenes import training_demonstrations

                made = baselines.Retrieval(training_demonstrations(self.config.train_demos))
            else:
                from physisforcing.envs.collector import load_policy

                made = load_policy(name)
            self._policies[name] = made
        return self._policies[name]

    def strip_path(self, job: Any) -> Path:
        """Where the pictures of an episode are; another model, policy or setting has another file."""
        task, name = job.task.split("/")
        parts = {"model": self.spec.fingerprint, "policy": self.policy(name, task, job.seed).fingerprint}
        parts |= {"rollout": dataclasses.asdict(self.config.rollout), "frames": self.config.judge.frames}
        digest = config_hash(parts | {"demos": self.manifest})[:8]
        safe = name.replace(":", "-")
        return self.output / "frames" / f"{task}_{job.seed}_{safe}_{digest}.png"

    def key(self, job: Any) -> ResultKey:
        task, name = job.task.split("/")
        parts = {"rollout": dataclasses.asdict(self.config.rollout), "frames": self.config.judge.frames}
        return ResultKey(
            manifest=self.manifest,
            episode=f"{task}/{job.seed}",
            fingerprint=f"{self.policy(name, task, job.seed).fingerprint} in {self.spec.fingerprint}",
            config=config_hash(parts | {"judge": self.judge_name, "policy": name}),
        )


def noisy_targets(targets_PA: NDArray[np.float32], noise: float, seed: int) -> NDArray[np.float32]:
    """Targets with joint errors (normal, ``noise`` radians, a new draw every 4 steps; grippers untouched) that depend on the seed alone."""
    if not noise:
        return targets_PA
    rng = np.random.default_rng([seed, round(1e6 * noise)])
    draws = np.repeat(
        rng.normal(0.0, noise, (len(targets_PA) // NOISE_STEPS + 1, targets_PA.shape[1])), NOISE_STEPS, axis=0
    )
    draws[:, GRIPPERS] = 0
    return (targets_PA + draws[: len(targets_PA)]).astype(np.float32)


def make_judge(config: EvaluatorConfig) -> Any:
    """The judge of the settings, with its verdicts kept in the output; None for ``none``."""
    from physisforcing.planner.judge_openai import OpenAIJudge, ReplayJudge
    from physisforcing.planner.judges import CachedJudge, ScriptedJudge, truth_rule

    settings, output = config.judge, Path(config.output)
    log = Path(settings.log) if settings.log else output / "judge_log.jsonl"
    if settings.kind == "none":
        return None
    if settings.kind == "replay":
        return ReplayJudge(settings, log)
    if settings.kind == "openai":
        return CachedJudge(OpenAIJudge(settings, log), output / "verdicts.jsonl")
    if settings.rule == "truth":
        return ScriptedJudge(truth_rule(), "truth")
    import importlib

    module, colon, name = settings.rule.partition(":")
    try:
        if not colon:
            raise AttributeError("no colon")
        rule = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        wanted = f"module:function ({error})"
        raise UserError("judge.rule", got=settings.rule, wanted=wanted, fix="put its folder on PYTHONPATH") from error
    return ScriptedJudge(rule, settings.rule)


# ------------------------------------------------------------------------------------------------------- in the world model


def judged_rows(setting: Setting, *, progress: bool) -> list[dict[str, Any]]:
    """Imagine and judge what is not done yet; the lines of all episodes (none with ``judge.kind=none``)."""
    from tqdm import tqdm

    from .episode_jobs import run_jobs

    if setting.judge is None:
        for job in tqdm(setting.jobs(), desc="episodes", unit="ep", disable=not progress, file=sys.stderr):
            imagined(setting, job)
        return []
    retry = setting.config.retry_errors
    make = lambda: _JudgedEpisodes(setting)  # noqa: E731  (this process only)
    return run_jobs(setting.jobs(), setting.key, setting.output, make, workers=0, retry_errors=retry, progress=progress)


def close_model(setting: Setting) -> None:
    """Give back what the model holds: a simulator, before another one is made."""
    close = getattr(setting.inside.world_model, "close", None)
    if close is not None:
        close()


class _JudgedEpisodes:
    """One episode a job (``envs.seeds.Handler``)."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def handle(self, job: Any) -> Any:
        from physisforcing.envs.seeds import Outcome
        from physisforcing.planner.judges import JudgeRequest

        setting = self.setting
        reference, rollout, about = imagined(setting, job)
        task, _ = job.task.split("/")
        request = JudgeRequest(
            id=f"{job.task}/{job.seed}",
            instruction=setting.starts[task, job.seed].instruction,
            rollout_THWC=rollout,
            reference_THWC=reference,
            truth=about.get("truth", {}),
        )
        verdict = setting.judge.judge(request)
        details = {"status": verdict.status, "reason": verdict.reason, "judge": verdict.judge, "source": verdict.source}
        details |= {"verdict": verdict.key, "frames": str(setting.strip_path(job).relative_to(setting.output)), **about}
        return Outcome(task=job.task, seed=job.seed, kind="recorded", details=details)

    def close(self) -> None:
        pass


def imagined(setting: Setting, job: Any) -> tuple[NDArray[np.uint8], NDArray[np.uint8], dict[str, Any]]:
    """The judged pictures of an episode, imagined where they are not there yet."""
    from physisforcing.planner.evaluator_frames import read_strip, write_strip

    path = setting.strip_path(job)
    if not path.is_file():
        write_strip(path, *_imagine(setting, job))
    return read_strip(path)


def _imagine(setting: Setting, job: Any) -> tuple[NDArray[np.uint8], NDArray[np.uint8], dict[str, Any]]:
    from physisforcing.core.video import write_mp4
    from physisforcing.planner.frame_store import resize_to
    from physisforcing.planner.judges import uniform_frames
    from physisforcing.planner.policy_evaluator import Start

    config, (task, name) = setting.config, job.task.split("/")
    info = setting.starts[task, job.seed]
    recorded = setting.dataset.frames(info.index)
    start = Start(
        task=task,
        seed=job.seed,
        instruction=info.instruction,
        picture_HW3=recorded[0],
        state_A=np.asarray(setting.dataset.columns(info.index)["observation.state"][0], np.float32),
        steps=info.length,
    )
    made = setting.inside.run(setting.policy(name, task, job.seed), start)
    views = setting.spec.views
    reference = resize_to(uniform_frames(recorded, config.judge.frames), views.height, views.width)
    label = f"generated by {setting.spec.name} {setting.spec.fingerprint}, driven by {name}, episode seed {job.seed}"
    about = {"label": label, "imagined_frames": len(made.frames_THWC), "telemetry": made.telemetry}
    about |= {"truth": made.truth} if made.truth else {}
    places = [seed for t, seed in setting.starts if t == task]
    if places.index(job.seed) < config.videos:
        video = setting.output / "videos" / setting.strip_path(job).with_suffix(".mp4").name
        video.parent.mkdir(parents=True, exist_ok=True)
        write_mp4(video, made.frames_THWC, 1 / setting.spec.frame_dt, {"comment": label})
        about["video"] = str(video.relative_to(setting.output))
    return reference, uniform_frames(made.frames_THWC, config.judge.frames), about


def _action_spec(spec: Any) -> Any:
    """Limits of the robot: the model's, or those of the assets."""
    if spec.action_spec is not None and np.isfinite(spec.action_spec.low).all():
        return spec.action_spec
    from physisforcing.core.vulkan import ensure_vulkan_env
    from physisforcing.envs.robotwin.embodiment import load_embodiment, resolve_assets

    ensure_vulkan_env()
    return load_embodiment(resolve_assets(None), None).action_spec
