"""States for ``action_following.py``: held-out moments of expert episodes, each with two executions that go on differently.

The fork of a moment is restored, so that both executions begin in the same state: the expert's next 32 control steps, and 32 steps of
smooth random targets. One safetensors file holds what a model is asked and where every point truly went; measuring needs no simulator.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from physisforcing.core.errors import UserError
from physisforcing.core.types import PointTracks
from physisforcing.envs.diversions import random_targets
from physisforcing.envs.recording import EpisodeRecorder
from physisforcing.envs.seeds import Job, Outcome, SeedPlan, run_seeds
from physisforcing.worldmodel.data.boxes import SCENERY
from physisforcing.worldmodel.data.windows import FRAME_STRIDE, WINDOW_FRAMES, lagged_states, window_actions
from physisforcing.worldmodel.teachers.classical import ClassicalTracker
from physisforcing.worldmodel.teachers.ground_truth import point_tracks
from physisforcing.worldmodel.text import MAX_TOKENS, TEXT_WIDTH, TextEmbedder

#: What the two executions of a state are.
CHUNKS = ("expert", "random")
GROUPS = ("arm", "object")
LAGS = (0, 8, 16)
#: Query grid (rows, columns): every second pixel of 120x160.
GRID, SIZE = (60, 80), (120, 160)
#: Points are informative where the executions put them so far apart (pixels of 120x160) in a picture in which both show them.
APART_PX = 1.5
#: Points of each group at most, and at least for a state to be taken.
MOST, LEAST = 48, 8
#: The expert moves an object by more than this (metres) within the window; moments tried of one scene.
OBJECT_M, TRIES = 0.02, 3


@dataclass(slots=True, kw_only=True)
class States:
    """S states, 2 executions each, N points at most. Coordinates are pixels of 120x160.

    ``context_SHWC`` uint8; ``text_SLD`` float16: the embedded instruction, so that measuring needs no sentence encoder;
    ``proprioception_SKA`` at ``LAGS``; ``actions_S2PA``; ``group_SN``: place in ``GROUPS``, -1 for nothing;
    ``points_S2TN2``, ``visible_S2TN``: true tracks; ``tracked_S2TN2``, ``seen_S2TN``: what the tracker finds in the executed video.
    """

    context_SHWC: NDArray[np.uint8]
    text_SLD: NDArray[np.float16]
    proprioception_SKA: NDArray[np.float32]
    actions_S2PA: NDArray[np.float32]
    group_SN: NDArray[np.int8]
    points_S2TN2: NDArray[np.float32]
    visible_S2TN: NDArray[np.bool_]
    tracked_S2TN2: NDArray[np.float32]
    seen_S2TN: NDArray[np.bool_]
    about: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.about)

    def save(self, path: Path) -> None:
        from safetensors.numpy import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: getattr(self, name) for name in ARRAYS}, path, metadata={"about": json.dumps(self.about)})

    @classmethod
    def load(cls, path: Path) -> States:
        from safetensors import safe_open

        if not path.is_file():
            raise UserError("states", got=str(path), wanted="a file of states", fix="make it with --collect")
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in ARRAYS}
            return cls(**arrays, about=json.loads(file.metadata()["about"]))

    @classmethod
    def join(cls, parts: list[States]) -> States:
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS}
        return cls(**arrays, about=[row for part in parts for row in part.about])


ARRAYS = tuple(field.name for field in fields(States) if field.name != "about")


class StateMaker:
    """Makes the state of one scene a job and leaves it in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.text = folder, TextEmbedder()
        self._env: Any = None

    def handle(self, job: Job) -> Outcome:
        env = self._ready(job.task)
        states_TA, steps = expert_path(env, job.seed)
        generator = np.random.default_rng([job.seed, len(states_TA)])
        tried = generator.permutation(steps)[:TRIES].tolist()
        for step in tried:
            found = state_at(env, job, states_TA, int(step), generator)
            if found is not None:
                sentence = found.about[0]["instruction"]
                found.text_SLD[:] = self.text.batch([sentence])[0].numpy()
                found.save(self.folder / f"{job.task}-{job.seed:08d}.safetensors")
                return Outcome(task=job.task, seed=job.seed, kind="recorded")
        reason = f"{len(tried)} moments of {len(steps)} in which an object moves"
        return Outcome(task=job.task, seed=job.seed, kind="rejected", message=reason)

    def _ready(self, task: str) -> Any:
        import gymnasium

        import physisforcing.envs.robotwin  # noqa: F401  (registers the tasks)

        if self._env is None or self._env.task_name != task:
            self.close()
            self._env = gymnasium.make(f"RoboTwin/{task}-v0", disable_env_checker=True).unwrapped
        return self._env

    def close(self) -> None:
        env, self._env = self._env, None
        if env is not None:
            env.close()


def expert_path(env: Any, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """-> (the expert's drive targets [T,A], the steps from which on it moves an object within a window)."""
    env.reset(seed=seed, options={"observe": False})
    states, poses = [], []

    def frame(_: int) -> None:
        states.append(env.observe(pictures=False)["state"])
        poses.append(env.body_poses()[1][:, :3].copy())

    env.play_expert(frame)
    names, ids = env.body_names(), env.body_poses()[0]
    objects = [k for k, body in enumerate(ids) if not SCENERY.fullmatch(names[int(body)])]
    places_TK3 = np.stack(poses)[:, objects]
    last = len(states) - 1
    ahead = np.minimum(np.arange(len(states)) + (WINDOW_FRAMES - 1) * FRAME_STRIDE, last)
    moved_T = np.linalg.norm(places_TK3[ahead] - places_TK3, axis=-1).max(1, initial=0.0)
    return np.stack(states), np.flatnonzero(moved_T > OBJECT_M)


def state_at(
    env: Any, job: Job, states_TA: NDArray[np.float32], step: int, generator: np.random.Generator
) -> States | None:
    """The state at ``step`` with both executions, or None where they do not differ enough for arm and object."""
    _, info = env.reset(seed=job.seed, options={"observe": False})
    for target_A in states_TA[1 : step + 1]:
        env.step_blind(target_A)
    fork, actions_2PA = env.fork(), []
    actions_2PA.append(window_actions(states_TA, step))
    actions_2PA.append(random_targets(states_TA[step], len(actions_2PA[0]), env.action_spec, generator))
    pictures, truths = [], []
    for chunk_PA in actions_2PA:
        env.restore(fork)
        frames, tracks, names = execute(env, chunk_PA)
        pictures.append(frames)
        truths.append(tracks)
    assert np.array_equal(pictures[0][0], pictures[1][0]), "both executions begin alike"
    chosen = informative(truths, names, generator)
    if any((chosen[1] == place).sum() < LEAST for place in range(len(GROUPS))):
        return None
    video, queries = np.stack(pictures), np.stack([truths[0].points_TN2[0, chosen[0]]] * 2)
    found = ClassicalTracker().track(torch.from_numpy(video), torch.from_numpy(queries))
    seed_and_step = {"task": job.task, "seed": job.seed, "step": step, "scene_hash": info["scene_hash"]}
    sentence = env.observe(pictures=False)["instruction"]
    seed_and_step |= {"instruction": sentence, "assets": info["assets"], "runtime": info["runtime"]}
    return padded(
        context_SHWC=video[:1, 0],
        text_SLD=np.zeros((1, MAX_TOKENS, TEXT_WIDTH), np.float16),  # the caller fills it
        proprioception_SKA=lagged_states(states_TA, step, LAGS)[None],
        actions_S2PA=np.stack(actions_2PA)[None],
        group_SN=chosen[1][None],
        points_S2TN2=np.stack([t.points_TN2[:, chosen[0]] for t in truths])[None],
        visible_S2TN=np.stack([t.visible_TN[:, chosen[0]] for t in truths])[None],
        tracked_S2TN2=found.points_BTN2.numpy()[None],
        seen_S2TN=found.visible_BTN.numpy()[None],
        about=[seed_and_step],
    )


def execute(env: Any, chunk_PA: NDArray[np.float32]) -> tuple[NDArray[np.uint8], PointTracks, dict[int, str]]:
    """-> (17 pictures uint8 [T,120,160,3], tracks of the whole grid, names of the bodies) while the chunk is executed."""
    recorder = EpisodeRecorder(ground_truth="full", pictures="120x160")
    recorder.frame(env)
    for number, target_A in enumerate(chunk_PA.clip(env.action_spec.low, env.action_spec.high), start=1):
        env.step_blind(target_A)
        if number % FRAME_STRIDE == 0:
            recorder.frame(env)
    recorder.finish()
    truth = recorder.ground_truth()
    tracks = point_tracks(truth, range(WINDOW_FRAMES), GRID, SIZE)
    return np.stack(recorder.images["head"]), tracks, truth.body_names


def informative(
    truths: list[PointTracks], names: dict[int, str], generator: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """-> (points that tell the two executions apart, group of each): of arms and of objects, up to ``MOST`` each."""
    both_TN = truths[0].visible_TN & truths[1].visible_TN
    apart_TN = np.linalg.norm(truths[0].points_TN2 - truths[1].points_TN2, axis=-1)
    tells_N = truths[0].visible_TN[0] & (both_TN & (apart_TN > APART_PX)).any(0)
    arm = {body for body, name in names.items() if name[:2] in ("fl", "fr")}
    things = {body for body, name in names.items() if not SCENERY.fullmatch(name)}
    points, groups = [], []
    for place, bodies in enumerate((arm, things)):
        found = np.flatnonzero(tells_N & np.isin(truths[0].body_N, list(bodies)))
        picked = np.sort(generator.permutation(found)[:MOST])
        points.append(picked)
        groups.append(np.full(len(picked), place, np.int8))
    return np.concatenate(points), np.concatenate(groups)


def padded(**values: Any) -> States:
    """One state with room for as many points as a state may have."""
    room = len(GROUPS) * MOST - values["group_SN"].shape[1]
    for name, axis, filler in (
        ("group_SN", 1, -1),
        ("points_S2TN2", 3, 0),
        ("visible_S2TN", 3, False),
        ("tracked_S2TN2", 3, 0),
        ("seen_S2TN", 3, False),
    ):
        widths = [(0, room if place == axis else 0) for place in range(values[name].ndim)]
        values[name] = np.pad(values[name], widths, constant_values=filler)
    return States(**values)


def collect(
    path: Path, tasks: list[str], count: int, *, start_seed: int, workers: int, tries: int | None = None
) -> States:
    """``count`` states a task, one a scene, in the file ``path``; scenes without a fitting moment are skipped and counted. Continues
    where it was stopped (the states so far lie in ``<path>.parts``)."""
    folder = path.with_name(f"{path.name}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    done = {tuple(part.stem.rsplit("-", 1)): "recorded" for part in folder.glob("*.safetensors")}
    taken = {(task, int(seed)): kind for (task, seed), kind in done.items()}
    plan = SeedPlan(tasks, count, start_seed, taken, tries=tries)
    outcomes: list[Outcome] = []

    def note(outcome: Outcome) -> None:
        outcomes.append(outcome)
        print(
            f"{outcome.task} {outcome.seed}: {outcome.kind} {outcome.message[-300:]} {outcome.seconds:.0f} s",
            flush=True,
        )

    run_seeds(plan, partial(StateMaker, folder), workers=workers, on_outcome=note)
    files = [file for task in tasks for file in sorted(folder.glob(f"{task}-*.safetensors"))[:count]]
    if not files:
        raise UserError("states", got="none", wanted=f"{count} a task", fix="read why the scenes were skipped")
    states = States.join([States.load(file) for file in files])
    states.save(path)
    skipped = [f"{outcome.task}/{outcome.seed} {outcome.kind}" for outcome in outcomes if outcome.kind != "recorded"]
    print(
        f"{path}: {len(states)} states, {path.stat().st_size / 1e6:.1f} MB; skipped {len(skipped)}: {', '.join(skipped)}"
    )
    return states
