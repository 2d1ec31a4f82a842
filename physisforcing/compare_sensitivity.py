"""How much the models of a comparison depend on their condition: another sentence, other actions, from one state of the simulator."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError
from physisforcing.core.executed import ExecutedChunk
from physisforcing.core.results import ResultKey, config_hash
from physisforcing.core.types import DT, DecoderNeeds, Observation, RolloutRequest, WorldModelSpec
from physisforcing.planner.imagination_scores import SCORES_VERSION
from physisforcing.planner.plannable import planning_horizon

from .compare_episodes import ComparisonRunner

if TYPE_CHECKING:
    from physisforcing.planner.comparison_controls import SensitivityPair

    from .compare import CompareConfig, ComparedModel, ComparisonPlan
    from .plan_scenes import Scenes

#: Raised when the same model and scene give other numbers.
VERSION = 1
#: The moment is this share of the expert's path: before it the arms are hardly in the picture.
START = 1 / 3
#: Another sentence: that of another compared task, or of the first of these that is not the task itself.
OTHER_TASKS = ("adjust_bottle", "click_bell")
#: Moments that are kept while the next model is asked about them.
KEPT = 4
#: Control steps between two pictures of what truly happened.
DRAWN_EVERY = 2


@dataclass(slots=True, kw_only=True)
class Moment:
    """A state in the course of the expert's path, and what follows from it: the expert's next control steps, and where it was asked for
    random ones.

    ``observation`` at its place in the episode, ``states_RA``: drive targets up to it. ``actions``, ``executed``: of the continuations.
    ``real_THWC``, ``real_times_T``: pictures of the expert's, seconds from the moment.
    """

    observation: Observation
    states_RA: NDArray[np.float32]
    actions: list[NDArray[np.float32]]
    executed: list[ExecutedChunk]
    real_THWC: NDArray[np.uint8]
    real_times_T: NDArray[np.floating[Any]]


def measure_sensitivity(config: CompareConfig, plan: ComparisonPlan, *, progress: bool) -> list[dict[str, Any]]:
    """One line a model and scene, in ``sensitivity/results.jsonl`` of the output; a killed measurement continues."""
    from physisforcing.envs.seeds import Job

    from .episode_jobs import run_jobs

    scenes, measured = plan.scenes, plan.sensitive
    jobs = [
        Job(task=f"{task}/{name}", seed=seed)
        for name in measured
        for task in config.tasks
        for seed in scenes.seeds[task][: config.sensitivity]
    ]
    settings = {"control": config.control, "threads": config.threads, "prompt": config.planner.prompt_template}
    settings |= {"version": VERSION, "scores": SCORES_VERSION, "tasks": config.tasks}

    def key(job: Any) -> ResultKey:
        task, name = job.task.split("/")
        fingerprint, episode = plan.specs[name].fingerprint, f"{task}/{job.seed}"
        hashed = config_hash(settings)
        return ResultKey(
            manifest=scenes.manifests[task], episode=episode, fingerprint=f"{name}-{fingerprint}", config=hashed
        )

    if not jobs:
        return []
    return run_jobs(
        jobs,
        key,
        Path(config.output) / "sensitivity",
        partial(SensitivityRunner, config, measured, scenes),
        workers=config.workers,
        retry_errors=config.retry_errors,
        progress=progress,
    )


def sensitivity_pairs(rows: Sequence[Mapping[str, Any]]) -> list[SensitivityPair]:
    """The pairs of all lines; a scene that crashed gives none, and is named by ``sensitivity_errors``."""
    from physisforcing.planner.comparison_controls import SensitivityPair

    return [SensitivityPair(**pair) for row in rows for pair in row.get("pairs", ())]


def sensitivity_errors(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each scene that could not be measured."""
    found = []
    for row in rows:
        if row["status"] == "error":
            lines = str(row.get("error") or "").strip().splitlines() or ["no reason given"]
            found.append(f"sensitivity of {row['policy']} on {row['task']}, scene {row['seed']}: {lines[-1]}")
    return found


class SensitivityRunner(ComparisonRunner):
    """One model and scene a job (``envs.seeds.Handler``)."""

    def __init__(self, config: CompareConfig, models: Mapping[str, ComparedModel], scenes: Scenes) -> None:
        super().__init__(config, models, scenes, set())
        self._moments: OrderedDict[tuple[Any, ...], Moment] = OrderedDict()

    def _episode(self, task: str, name: str, seed: int) -> dict[str, Any]:
        from .compare_episodes import load_compared

        if self._key != name:
            self._drop_model()
            self._model, self._key = load_compared(self.config, self.models[name].source, self.device), name
        model = self._model
        acts = "actions" in model.spec.conditions
        try:
            moment = self._moment(task, seed, _steps(model.spec), acts)
            measure = action_pairs if acts else instruction_pairs
            pairs = measure(self._ask(model, moment, seed), moment, other_sentence(task, self.config.tasks))
        except UserError as error:
            return {"status": "error", "error": str(error)}
        named = {"model": name, "task": task, "episode": str(seed)}
        return {"status": "success", "pairs": [pair | named for pair in pairs]}

    def _ask(self, model: Any, moment: Moment, seed: int) -> Any:
        """``ask(sentence, actions)`` -> (imagined pictures of the head camera [T,H,W,3], their times); the noise is always the same."""
        from physisforcing.planner.action_planner import noise_seed
        from physisforcing.planner.imagination import context_pictures, lagged
        from physisforcing.planner.worldarena import read_template

        spec, prompt = model.spec, read_template(self.config.planner.prompt_template)

        def ask(sentence: str, actions_PA: NDArray[np.float32] | None = None) -> tuple[NDArray[np.uint8], Any]:
            lags = spec.proprioception_lags
            request = RolloutRequest(
                context_BVTHWC=context_pictures(moment.observation, spec)[None],
                instructions=[prompt.replace("{instruction}", sentence)],
                seeds_BS=np.array([[noise_seed(seed, 0, 0)]], np.int64),
                horizon=_horizon(spec),
                proprioception_BKA=lagged(moment.states_RA, lags)[None] if lags else None,
                actions_BSPA=None if actions_PA is None else actions_PA[None, None],
            )
            made = model.rollout(request)
            frames = made.frames_BSVTHWC[0, 0, 0]
            return (spec.views.split(frames)["head"] if spec.views.tiles else frames), made.times_T

        return ask

    def _moment(self, task: str, seed: int, steps: int, diverted: bool) -> Moment:
        key = (task, seed, steps, diverted)
        if key not in self._moments:
            env = self._environment(task).unwrapped
            self._moments[key] = find_moment(env, seed, steps, diverted=diverted, expect=self.entries.get((task, seed)))
            while len(self._moments) > KEPT:
                self._moments.popitem(last=False)
        return self._moments[key]


def find_moment(env: Any, seed: int, steps: int, *, diverted: bool, expect: Any = None) -> Moment:
    """A third of the way along the expert's path in the scene of ``seed``, with its next ``steps`` control steps, and as many random ones
    where ``diverted``.

    ``expect``: the manifest's entry of the scene. ``UserError`` where the expert finds no way: then nothing is known to follow.
    """
    from physisforcing.envs.diversions import random_targets
    from physisforcing.envs.recording import expert_targets

    targets_TA = expert_targets(env, seed)
    if not env.success:
        got, fix = f"scene {seed}, in which the expert fails", "leave the scene out, or sensitivity=0"
        raise UserError("sensitivity", got=got, wanted="an expert that shows what follows", fix=fix)
    start = int(START * (len(targets_TA) - 1))
    rows = np.minimum(start + 1 + np.arange(steps), len(targets_TA) - 1)
    spec, actions = env.action_spec, [targets_TA[rows]]
    if diverted:
        generator = np.random.default_rng([seed, start, 0x73656E])
        actions.append(random_targets(targets_TA[start], steps, spec, generator))
    actions = [chunk.clip(spec.low, spec.high).astype(np.float32) for chunk in actions]
    made = [
        _execute(env, seed, targets_TA[1 : start + 1], chunk, expect=expect, draw=not place)
        for place, chunk in enumerate(actions)
    ]
    observation, _, real_THWC = made[0]
    return Moment(
        observation=observation,
        states_RA=targets_TA[: start + 1],
        actions=actions,
        executed=[chunk for _, chunk, _ in made],
        real_THWC=real_THWC,
        real_times_T=np.arange(len(real_THWC)) * DRAWN_EVERY * DT,
    )


def _execute(
    env: Any, seed: int, before_PA: NDArray[Any], chunk_PA: NDArray[Any], *, expect: Any, draw: bool
) -> tuple[Observation, ExecutedChunk, NDArray[np.uint8]]:
    """Play ``before_PA`` from the scene's start, then ``chunk_PA``: the observation between them, what happened, the pictures."""
    from physisforcing.envs.executed import ChunkRecorder

    seen, info = env.reset(seed=seed, options={"observe": False})
    if expect is not None:
        expect.check(info, seen["instruction"])
    for target_A in before_PA:
        env.step_blind(target_A)
    recorder, seen = ChunkRecorder(env, every=len(chunk_PA) + 1), env.observe()
    recorder.frame(env, seen)
    frames = [seen["head_rgb"]]
    for step, target_A in enumerate(chunk_PA, start=1):
        env.step_blind(target_A)
        recorder.frame(env, {})
        if draw and step % DRAWN_EVERY == 0:
            frames.append(env.observe()["head_rgb"])
    observation = Observation(
        images={name: seen[f"{name}_rgb"] for name in env.camera_names},
        state_A=seen["state"],
        measured_A=seen["state_measured"],
        instruction=seen["instruction"],
        step=len(before_PA),
    )
    return observation, recorder.finish()[0], np.stack(frames)


def action_pairs(ask: Any, moment: Moment, _: str) -> list[dict[str, Any]]:
    """Both continuations imagined: is each nearer to its own execution than to the other one?"""
    found = []
    for own, other in ((0, 1), (1, 0)):
        frames, times = ask(moment.observation.instruction, moment.actions[own])
        found += _own_and_other(frames, times, moment.executed[own], moment.executed[other])
    return found


def _own_and_other(
    frames_THWC: NDArray[np.uint8], times_T: NDArray[np.float64], own: ExecutedChunk, other: ExecutedChunk
) -> list[dict[str, Any]]:
    """Compared where the points can be followed for longest: an arm may swing out of the picture before the end."""
    from physisforcing.planner.imagination_scores import ImaginationScoring, own_and_other

    pairs: dict[str, dict[str, Any]] = {part: {"own": None, "other": None} for part in ("arm", "object")}
    times = np.asarray(times_T)
    for horizon in reversed(ImaginationScoring().horizons):
        count = int((times <= horizon + 1e-6).sum())
        if count < 2 or all(pair["own"] is not None for pair in pairs.values()):
            break
        row = own_and_other(frames_THWC[:count], times[:count], own, other)
        for part, pair in pairs.items():
            if pair["own"] is None:
                pairs[part] = {"own": row[f"{part}_own_px"], "other": row[f"{part}_other_px"]}
    return [{"kind": f"action ({part})"} | pair for part, pair in pairs.items()]


def instruction_pairs(ask: Any, moment: Moment, other: str) -> list[dict[str, Any]]:
    """The episode's sentence and another task's, from the same noise: is the first nearer to what the expert does?

    Compared where both can be followed for longest.
    """
    from physisforcing.planner.imagination_scores import ImaginationScoring, score_chunk

    rows = []
    for sentence in (moment.observation.instruction, other):
        frames, times = ask(sentence)
        scored = score_chunk(frames, times, moment.executed[0], moment.real_THWC, moment.real_times_T)
        rows.append(scored.row)
    found = []
    for part in ("arm", "object"):
        names = [f"{part}_px_{horizon:g}s" for horizon in reversed(ImaginationScoring().horizons)]
        both = [(rows[0].get(name), rows[1].get(name)) for name in names]
        own, swapped = next((pair for pair in both if None not in pair), (None, None))
        found.append({"kind": f"instruction ({part})", "own": own, "other": swapped})
    return found


def other_sentence(task: str, tasks: Sequence[str]) -> str:
    """The general sentence of another task: the next one compared, or of ``OTHER_TASKS``."""
    from physisforcing.envs.robotwin.task_facts import instruction_templates

    others = [name for name in (*tasks[tasks.index(task) + 1 :], *tasks, *OTHER_TASKS) if name != task]
    return str(instruction_templates(others[0])["full_description"])


def summary_lines(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """``planner.comparison_controls.Sensitivity`` by model, kind and task."""
    from physisforcing.planner.comparison_controls import summarise_sensitivity

    return summarise_sensitivity(sensitivity_pairs(rows))


def sensitivity_measurements(
    lines: Sequence[Any], config: CompareConfig, scene_seeds: Mapping[str, Sequence[int]], **shared: Any
) -> list[Any]:
    """One measurement a share; ``against``: the mean margin in pixels and the pairs that could not be measured."""
    from physisforcing.planner.measurements import measurement

    found = []
    for line in lines:
        if line.share is not None:
            kind = line.kind.replace(" (", "/").removesuffix(")")
            claim = f"compare/{config.claims}/{line.model}/{line.task}/sensitivity/{kind}"
            against = {"margin_px": line.margin, "missing": line.missing}
            interval = {"low": line.low, "high": line.high}
            interval |= {"seeds": scene_seeds.get(line.task, ())[: config.sensitivity]}
            found.append(measurement(claim, line.share, unit="share", n=line.n, against=against, **interval, **shared))
    return found


def plain(lines: Sequence[Any]) -> list[dict[str, Any]]:
    """For ``summary.json``."""
    return [dataclasses.asdict(line) for line in lines]


def _horizon(spec: WorldModelSpec) -> int:
    return planning_horizon(spec, DecoderNeeds(returns=frozenset({"frames"})))


def _steps(spec: WorldModelSpec) -> int:
    """Control steps that an imagination lasts. ``UserError`` for a model whose actions last longer or shorter than ours."""
    if spec.action_spec is not None and abs(spec.action_spec.dt - DT) > 1e-6:
        got, wanted = f"actions of {spec.action_spec.dt:g} s", f"{DT:g} s, a control step"
        raise UserError("sensitivity", got=got, wanted=wanted, fix="sensitivity=0")
    return max(1, round((_horizon(spec) - 1) * spec.frame_dt / DT))
