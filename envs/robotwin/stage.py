"""A scene that is only drawn: its bodies stand where they are told to stand, and no physics moves them.

A picture depends on where the bodies are and on nothing else of the physics. So a second scene of the same seed draws what a first one
looks like, bit by bit, from the first one's body poses alone: while the first goes on, after it has gone, or with some bodies left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError
from physisforcing.core.types import CameraSpec

from .live import release
from .roles import scene_roles

if TYPE_CHECKING:
    from .env import RoboTwinEnv


class Stage:
    """``env``: a ``RoboTwinEnv`` with the cameras to draw, used for nothing else; another one may be live in the same process."""

    def __init__(self, env: RoboTwinEnv) -> None:
        self.env = env
        self._hidden: frozenset[int] = frozenset()
        self._shown: tuple[bytes, frozenset[int]] | None = None

    def set_up(self, seed: int) -> None:
        """Build the scene of ``seed``; no environment may be live. Errors: see ``RoboTwinEnv.reset``. Afterwards none is live, either,
        and after an error no scene stands here."""
        self._hidden, self._shown = frozenset(), None
        try:
            self.env.reset(seed=seed, options={"observe": False})
        except BaseException:
            self.env.close()  # what was built of the scene
            raise
        finally:
            release(self.env)  # else whoever is live again would find its place taken, and hide why
        self.ids_K = self.env.body_poses()[0]
        self.roles_K = scene_roles(self.env)

    @property
    def scene_hash(self) -> str:
        """Of the scene that stands here, or an empty string."""
        return self.env._hash if self.env._task is not None else ""

    @property
    def seed(self) -> int:
        """Of the scene that stands here, or -1."""
        return self.env.seed_used if self.env._task is not None else -1

    def objects(self) -> frozenset[int]:
        """Body ids of the task's objects."""
        return frozenset(int(n) for n, role in zip(self.ids_K, self.roles_K, strict=True) if role == "object")

    def arrange(self, poses_K7: NDArray[np.float32], hidden: Iterable[int] = ()) -> None:
        """Put every body where ``poses_K7`` says (xyz metres, wxyz; order of ``body_poses``), leave out the bodies ``hidden``, draw.

        What is shown already is not drawn again.
        """
        import sapien

        if poses_K7.shape != (len(self.ids_K), 7):
            got, wanted = f"shape {list(poses_K7.shape)}", f"[{len(self.ids_K)},7], one row for each body of this scene"
            raise UserError("poses_K7", got=got, wanted=wanted, fix="give the poses of an episode of this scene")
        wanted_hidden = frozenset(map(int, hidden))
        shown = np.asarray(poses_K7, np.float32).tobytes(), wanted_hidden
        if shown == self._shown:
            return
        entities = self.env._bodies.entities
        for entity, pose_7 in zip(entities, poses_K7, strict=True):
            entity.set_pose(sapien.Pose(pose_7[:3], pose_7[3:]))
        for number, entity in zip(map(int, self.ids_K), entities, strict=True):
            if (number in wanted_hidden) != (number in self._hidden):
                body = entity.find_component_by_type(sapien.render.RenderBodyComponent)
                if body is not None:
                    body.visibility = 0.0 if number in wanted_hidden else 1.0
        self._hidden, self._shown = wanted_hidden, shown
        self.env._pictures.draw()

    def pictures(self) -> NDArray[np.uint8]:
        """uint8 [V,H,W,3] of what was arranged last, cameras in the environment's order."""
        return np.stack([self.env._pictures.rgb(name) for name in self.env.camera_names])

    def maps(self) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
        """Depth in mm and body ids, uint16 [H,W], of the first camera."""
        return self.env.depth_and_ids(self.env.camera_names[0])

    def camera(self) -> CameraSpec:
        """The first camera, as of the last picture."""
        return self.env.cameras()[0]

    def close(self) -> None:
        self.env.close()
