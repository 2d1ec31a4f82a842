"""What truly happens while an episode runs, chunk by chunk, to hold imaginations against (``core.executed``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError
from physisforcing.core.executed import ExecutedChunk
from physisforcing.core.ground_truth import METRES_PER_COUNT
from physisforcing.core.types import CameraSpec

from .robotwin.roles import scene_roles


@dataclass(slots=True, kw_only=True)
class Moment:
    """Where everything is after so many control steps. ``contacts``: as ``RoboTwinEnv.contacts``, of the step that ends here."""

    poses_K7: NDArray[np.float32]
    contacts: list[tuple[int, int, float]]
    success: bool


def moment(env: Any) -> Moment:
    """This moment of a ``RoboTwinEnv``."""
    return Moment(poses_K7=env.body_poses()[1], contacts=env.contacts(), success=bool(env.success))


@dataclass(slots=True, kw_only=True)
class View:
    """What one camera saw: where it stands, depth in mm and body ids, uint16 [H,W]."""

    camera: CameraSpec
    depth_HW: NDArray[np.uint16]
    body_HW: NDArray[np.uint16]


@dataclass(slots=True, kw_only=True)
class SceneBodies:
    """The bodies of a scene: ids and roles in the order of their poses, names by id."""

    ids_K: NDArray[np.uint16]
    roles_K: tuple[str, ...]
    names: dict[int, str]

    @classmethod
    def of(cls, env: Any) -> SceneBodies:
        """Those of a ``RoboTwinEnv`` that has been reset."""
        return cls(ids_K=env.body_poses()[0], roles_K=scene_roles(env), names=env.body_names())


def executed_chunk(bodies: SceneBodies, view: View, moments: Sequence[Moment], start_step: int) -> ExecutedChunk:
    """``moments``: the one that ``view`` shows, and those after each control step since."""
    contacts = [(row, *pair) for row, now in enumerate(moments) for pair in now.contacts]
    table = np.array(contacts, dtype=np.float64).reshape(-1, 4)
    return ExecutedChunk(
        poses_TK7=np.stack([now.poses_K7 for now in moments]),
        body_ids_K=bodies.ids_K,
        body_names=bodies.names,
        contact_step_M=table[:, 0].astype(np.int32),
        contact_pair_M2=table[:, 1:3].astype(np.uint16),
        contact_impulse_M=table[:, 3].astype(np.float32),
        intrinsics_33=view.camera.intrinsics_33,
        world_to_camera_44=view.camera.world_to_camera_44,
        depth_HW=(view.depth_HW * METRES_PER_COUNT).astype(np.float32),
        body_HW=view.body_HW,
        success_T=np.array([now.success for now in moments]),
        start_step=start_step,
        roles_K=bodies.roles_K,
    )


class ChunkRecorder:
    """``rollout.Recorder`` that keeps every chunk of an episode as an ``ExecutedChunk``: one begins every ``every`` control steps.

    ``env``: the (unwrapped) environment, which draws ``camera``. A picture is needed only where a chunk begins (``needs_picture``),
    which is where a planner looks as well.
    """

    def __init__(self, env: Any, *, every: int, camera: str = "head") -> None:
        if every < 1:
            raise UserError("every", got=every, wanted="1 or more control steps", fix="the planner's execute_horizon")
        if camera not in env.camera_names:
            fix = f"make the environment with cameras=({camera!r},)"
            raise UserError("camera", got=camera, wanted=f"one of {', '.join(env.camera_names) or 'none'}", fix=fix)
        self.every, self.camera = every, camera
        self._bodies: SceneBodies | None = None
        self._moments: list[Moment] = []
        self._views: dict[int, View] = {}

    def needs_picture(self, step: int) -> bool:
        """Whether ``frame`` wants to see the moment after ``step`` control steps."""
        return step % self.every == 0

    def frame(self, env: Any, observation: dict[str, Any]) -> None:
        """The next moment of ``env`` (unwrapped); frame 0 first."""
        step = len(self._moments)
        if step == 0:
            self._bodies = SceneBodies.of(env)
        self._moments.append(moment(env))
        if self.needs_picture(step):
            assert f"{self.camera}_rgb" in observation, f"step {step} was not drawn"
            depth_HW, body_HW = env.depth_and_ids(self.camera)
            place = env.camera_names.index(self.camera)
            self._views[step] = View(camera=env.cameras()[place], depth_HW=depth_HW, body_HW=body_HW)

    def finish(self) -> list[ExecutedChunk]:
        """The chunks in order; the last one ends with the last frame, and one without any step is left out."""
        assert self._bodies is not None, "no frame was recorded"
        last = len(self._moments) - 1
        return [
            executed_chunk(self._bodies, view, self._moments[start : min(start + self.every, last) + 1], start)
            for start, view in self._views.items()
            if start < last
        ]
