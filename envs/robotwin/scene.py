"""One built RoboTwin scene: the task object with our hooks, its physics clock, bodies, contacts and scene hash."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .renderer import cameras_on_demand, rasterised
from .runtime import Runtime
from .shared_scene import load_actors_of
from .unseen_objects import unseen_objects


class PhysicsClock:
    """Counts the physics steps of a scene and tells who wants to know.

    ``before`` and ``after`` are called around every ``scene.step()``, whoever makes it.
    """

    def __init__(self, scene: Any) -> None:
        self.steps = 0
        self.before: Callable[[], None] | None = None
        self.after: Callable[[], None] | None = None
        self._scene, self._step = scene, scene.step
        scene.step = self._hooked

    def _hooked(self) -> None:
        if self.before is not None:
            self.before()
        self._step()
        self.steps += 1
        if self.after is not None:
            self.after()

    def release(self) -> None:
        """Undo the hook, which otherwise keeps the scene alive through a reference cycle."""
        self.before = self.after = None
        del self._scene.step
        del self._scene, self._step


class SpawnRecorder:
    """Notes every free-standing actor as it was created, before any physics moved it.

    ``painted``: also the colours of meshes, where they are not those of their files.
    """

    def __init__(self, scene: Any, *, painted: bool = False) -> None:
        self._scene, self._painted = scene, painted
        self._seen: set[int] = set()
        self.actors: list[dict[str, Any]] = []

    def __call__(self) -> None:
        import sapien

        entities = self._scene.entities
        if len(entities) == len(self._seen):
            return
        for entity in entities:
            number = int(entity.per_scene_id)
            if number in self._seen:
                continue
            self._seen.add(number)
            if entity.find_component_by_type(sapien.physx.PhysxArticulationLinkComponent) is not None:
                continue
            if entity.find_component_by_type(sapien.physx.PhysxRigidBaseComponent) is None:
                continue
            self.actors.append(
                {
                    "name": entity.name,
                    "pose": _rounded([*entity.pose.p, *entity.pose.q]),
                    "shapes": [self._shape(s) for s in self._shapes(entity)],
                }
            )

    @staticmethod
    def _shapes(entity: Any) -> list[Any]:
        import sapien

        body = entity.find_component_by_type(sapien.render.RenderBodyComponent)
        return [] if body is None else list(body.render_shapes)

    def _shape(self, shape: Any) -> dict[str, Any]:
        described: dict[str, Any] = {
            "type": type(shape).__name__,
            "pose": _rounded([*shape.local_pose.p, *shape.local_pose.q]),
        }
        for field in ("half_size", "radius", "half_length", "scale"):
            if hasattr(shape, field):
                described[field] = _rounded(np.atleast_1d(getattr(shape, field)))
        if hasattr(shape, "filename"):
            path = Path(shape.filename)
            described["file"] = path.as_posix().rpartition("/objects/")[2] or path.name
            if self._painted:
                described["colours"] = [_rounded(part.material.base_color) for part in shape.parts]
        else:
            described["colour"] = _rounded(shape.material.base_color)
        return described


def _rounded(values: Any) -> list[float]:
    return [round(float(v), 6) + 0.0 for v in values]


def scene_hash(drawn: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON of what was drawn."""
    return hashlib.sha256(json.dumps(drawn, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def headless_task(
    runtime: Runtime,
    task: str,
    shadows: str,
    *,
    scene_of: str | None = None,
    unseen_seed: int | None = None,
) -> Any:
    """An instance of RoboTwin's task class that draws only on request and counts its physics steps.

    ``scene_of``: the task that puts the objects there, in place of the task itself. ``unseen_seed``: they look as no
    training scene's do (``unseen_objects.py``). Attributes added: ``clock`` (PhysicsClock) and ``spawned``
    (SpawnRecorder), both from ``setup_scene`` on.
    """
    base = runtime.task_class(task)
    owner = None if scene_of is None else runtime.task_class(scene_of)

    class HeadlessTask(base):  # type: ignore[misc, valid-type]
        def setup_scene(self, **kwargs: Any) -> None:
            with rasterised(shadows):
                super().setup_scene(**kwargs)
            self.clock = PhysicsClock(self.scene)
            self.spawned = SpawnRecorder(self.scene, painted=unseen_seed is not None)
            self.clock.before = self.spawned
            self.clock.after = self._physics_stepped

        def load_camera(self, **kwargs: Any) -> None:
            with cameras_on_demand(self.scene):
                super().load_camera(**kwargs)

        def load_actors(self) -> None:
            unseen = unseen_seed is not None
            with unseen_objects(runtime.create_actor, self.scene, unseen_seed) if unseen else nullcontext():
                if owner is None:
                    super().load_actors()
                else:
                    load_actors_of(owner, base, self)

        def _physics_stepped(self) -> None:
            robot = getattr(self, "robot", None)
            if robot is not None:
                robot.physics_stepped()

        def _update_render(self) -> None:
            """Nothing: the environment brings the render scene up to date when it draws."""

        def get_obs(self) -> dict[str, Any]:
            """Nothing: upstream draws all its cameras here after a success."""
            return {}

    HeadlessTask.__name__ = HeadlessTask.__qualname__ = task
    return HeadlessTask()


class Bodies:
    """Rigid bodies of a scene (actors, table, ground and robot links) in the order of their ids."""

    def __init__(self, scene: Any) -> None:
        import sapien

        self.entities = sorted(
            (e for e in scene.entities if e.find_component_by_type(sapien.physx.PhysxBaseComponent) is not None),
            key=lambda e: e.per_scene_id,
        )
        self._moving = [e.find_component_by_type(sapien.physx.PhysxRigidBodyComponent) for e in self.entities]
        self.ids_K = np.array([e.per_scene_id for e in self.entities], dtype=np.uint16)

    def names(self) -> dict[int, str]:
        """Id -> entity name (names repeat, ids do not)."""
        return {int(e.per_scene_id): e.name for e in self.entities}

    def poses(self) -> NDArray[np.float32]:
        """float32 [K,7]: xyz in metres, wxyz, in the world."""
        poses_K7 = np.empty((len(self.entities), 7), dtype=np.float32)
        for row, entity in zip(poses_K7, self.entities, strict=True):
            pose = entity.pose
            row[:3], row[3:] = pose.p, pose.q
        return poses_K7

    def motion(self) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Linear (m/s) and angular (rad/s) velocities [K,6], and which bodies the engine has put to sleep, [K]; zero and
        False for what cannot move.
        """
        velocities_K6 = np.zeros((len(self.entities), 6), dtype=np.float32)
        asleep_K = np.zeros(len(self.entities), dtype=np.bool_)
        for k, body in enumerate(self._moving):
            if body is not None:
                velocities_K6[k, :3], velocities_K6[k, 3:] = body.linear_velocity, body.angular_velocity
                asleep_K[k] = body.sleeping if hasattr(body, "sleeping") else body.is_sleeping
        return velocities_K6, asleep_K

    def settled(self) -> list[list[Any]]:
        """[name, x, y, z, qw, qx, qy, qz] of every free body (no robot link), rounded to 1e-5; in the order of their ids."""
        import sapien

        free = sapien.physx.PhysxRigidDynamicComponent
        found = []
        for entity in self.entities:
            if entity.find_component_by_type(free) is not None:
                pose = entity.pose
                found.append([entity.name, *(round(float(v), 5) + 0.0 for v in (*pose.p, *pose.q))])
        return found

    def finite(self) -> bool:
        """Whether every pose is a number; solids that were pressed into each other can be thrown to infinity."""
        return bool(np.all(np.isfinite(self.poses())))


class ContactLog:
    """Impulses exchanged by each pair of bodies since the last ``restart``."""

    def __init__(self, scene: Any) -> None:
        self._scene = scene
        self._impulse: dict[tuple[int, int], float] = {}

    def restart(self) -> None:
        self._impulse.clear()

    def add_last_step(self) -> None:
        """Add the contacts that the last physics step resolved."""
        found: dict[tuple[int, int], list[float]] = {}
        for contact in self._scene.get_contacts():
            norms = []
            for point in contact.points:
                x, y, z = point.impulse.tolist()
                norms.append(math.sqrt(x * x + y * y + z * z))
            if any(norms):
                a, b = (int(body.entity.per_scene_id) for body in contact.bodies)
                found.setdefault((a, b) if a < b else (b, a), []).extend(norms)
        for pair, norms in found.items():
            # the engine lists contacts in an order that depends on addresses; this sum does not
            self._impulse[pair] = self._impulse.get(pair, 0.0) + math.fsum(norms)

    def pairs(self) -> list[tuple[int, int, float]]:
        """(lower id, higher id, sum of impulse norms in N*s), sorted."""
        return [(a, b, total) for (a, b), total in sorted(self._impulse.items())]
