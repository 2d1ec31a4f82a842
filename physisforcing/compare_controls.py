"""The controls of ``physis compare`` that stand in for the world model under the same planner and decoder."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.lerobot import LeRobotDataset
from physisforcing.core.protocols import WorldModel
from physisforcing.core.types import Rollout, RolloutRequest, WorldModelSpec

from .plan_scenes import Scenes


@dataclasses.dataclass(slots=True, frozen=True)
class Control:
    """``needs_demos``: it shows demonstrations of the compared scenes."""

    needs_demos: bool = False


#: Name -> what it needs.
VIDEOS: dict[str, Control] = {
    "frozen": Control(),
    "noise": Control(),
    "perfect": Control(),
    "oracle": Control(needs_demos=True),
    "other": Control(needs_demos=True),
    "objects_erased": Control(needs_demos=True),
}


def control_model(
    name: str, env: Any, demos: str, execute_horizon: int, prompt_template: str = "{instruction}"
) -> WorldModel:
    """The control for episodes of the live environment ``env`` (unwrapped). ``demos``: dataset with the compared scenes, where the control
    needs one. ``prompt_template``: what the planner puts round the episode's sentence, which ``perfect`` must not see. What has a ``close`` runs a process of its own until then."""
    from physisforcing.envs import control_models

    if name == "frozen":
        return control_models.FrozenFrame()
    if name == "noise":
        return control_models.NoiseWorldModel()
    if name == "perfect":
        from physisforcing.envs.simulator_world_model import SimulatorWorldModel
        from physisforcing.planner.worldarena import unprompted

        return unprompted(SimulatorWorldModel().bind(env), prompt_template)
    dataset = LeRobotDataset(demos)
    if name == "other":
        return control_models.OtherEpisodeWorldModel(dataset, execute_horizon=execute_horizon)
    assert name in ("oracle", "objects_erased"), name
    return _OwnRecording(name, dataset, execute_horizon, env)


def check_demonstrations(root: str, scenes: Scenes) -> None:
    """``UserError`` unless there is a successful demonstration of every scene, recorded in that very scene (its hash, where a manifest
    says it)."""
    dataset = LeRobotDataset(root)
    known = {(e.task_name, e.seed): e for e in dataset.episodes if e.success is not False}
    fix = "leave demos= out, then they are recorded; or controls=[...] without oracle, other and objects_erased"
    for task, seeds in scenes.seeds.items():
        for seed in seeds:
            if (task, seed) not in known:
                got = f"no successful demonstration of {task} {seed} in {root}"
                raise UserError("demos", got=got, wanted="one of every compared scene", fix=fix)
            entry, found = scenes.entries.get((task, seed)), known[task, seed].scene_hash
            if entry is not None and found != entry.scene_hash:
                got = f"{task} {seed} recorded in scene {found[:12]}"
                raise UserError("demos", got=got, wanted=f"scene {entry.scene_hash[:12]} of the manifest", fix=fix)


class _OwnRecording:
    """The demonstration of the same scene as a world model: its own pictures, or the same drawn again without the task's objects."""

    def __init__(self, name: str, dataset: LeRobotDataset, execute_horizon: int, env: Any) -> None:
        from physisforcing.envs.control_models import PlayedVideo
        from physisforcing.envs.twin_client import TwinClient

        self._dataset = dataset
        self._places = {(e.task_name, e.seed): e.index for e in dataset.episodes if e.success is not False}
        self._twin = TwinClient(env.task_name, env.options) if name == "objects_erased" else None
        self._player = PlayedVideo(
            name, self._recording, fingerprint=dataset.fingerprint(), execute_horizon=execute_horizon
        )
        self.spec: WorldModelSpec = self._player.spec

    def rollout(self, request: RolloutRequest) -> Rollout:
        return self._player.rollout(request)

    def close(self) -> None:
        if self._twin is not None:
            self._twin.close()

    def _recording(self, task: str, seed: int) -> NDArray[np.uint8]:
        if (task, seed) not in self._places:
            fix = "leave demos= out, then the expert's demonstrations of the compared scenes are recorded"
            got = f"no successful demonstration of {task} {seed}"
            raise DatasetError("demos", got=got, wanted="every compared scene", fix=fix)
        index = self._places[task, seed]
        if self._twin is None:
            return self._dataset.frames(index)
        from physisforcing.envs.erase import ObjectEraser

        return ObjectEraser(self._twin).episode(self._dataset, index)
