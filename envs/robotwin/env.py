"""RoboTwin's tasks behind gymnasium.

Time base: one ``step`` is 15 physics steps of 1/250 s. ``state`` is RoboTwin's vector of drive targets u; an action is
the next u, approached by linear interpolation (``control="interpolated"``), or by upstream's ``take_action``
(``"topp"``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError, unknown_name
from physisforcing.core.types import DT, PHYSICS_STEPS_PER_ACTION, ActionSpec, CameraSpec

from .arguments import checked_action
from .embodiment import load_embodiment, resolve_assets
from .episode import build_task, discard_task, interpolate, play_expert
from .expert import PlannerConfig, robot_class
from .fork import SimulatorState, capture, restore
from .instructions import check_instruction, instruction_for
from .live import claim, release
from .observation import Drawing, drive_targets, measured_joints, observation_space, read_pictures
from .randomization import check_randomization, drawn_randomization, randomization_label
from .renderer import CAMERAS, Pictures, check_shadows, keep_renderer
from .runtime import load_runtime
from .scene import Bodies, ContactLog, scene_hash
from .shared_scene import check_scene_of
from .tasks import step_limit, task_info

CONTROLS = ("interpolated", "topp")
#: ``reset()`` without a seed draws one from the training range.
TRAIN_SEEDS = 10_000


class RoboTwinEnv(gymnasium.Env):
    """One RoboTwin task.

    Observation (dict): ``<camera>_rgb`` uint8 [240,320,3]; with ``depth`` also ``<camera>_depth`` uint16 [240,320] in
    mm; with ``body_ids`` also ``<camera>_body_ids`` uint16 [240,320]; ``state`` float32 [A], the drive targets;
    ``state_measured`` float32 [A], the measured joints (radians; gripper 0 closed .. 1 open); ``instruction``.

    Action: float32 [A] drive targets (``action_spec``: 14 for six-joint arms, 16 for seven). Targets outside the joint
    limits are clipped to them, and ``info["clipped_steps"]`` counts the steps in which that happened. NaN, infinities
    and wrong shapes raise ``UserError``.

    ``terminated``: the task's check, run after every physics step, has succeeded once. ``truncated``: the runtime's
    step limit in calls of ``step``, or a body whose pose is no number any more (``info["diverged"]``). Reward: 1 in the
    step that succeeds, else 0.

    ``scene_of``: the task whose scene this one is played in, with its own sentence and check (``shared_scene.py``):
    what a policy does there shows whether it listens.

    ``reset`` raises ``UnstableSceneError`` for a seed whose scene does not come to rest, and ``UserError`` while another
    environment of this process has been reset and not closed, or for a task whose objects the assets lack. Making the
    environment raises ``VulkanUnavailableError`` without a rendering device.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": [], "render_fps": 1 / DT}

    def __init__(
        self,
        task: str,
        *,
        cameras: tuple[str, ...] = ("head",),
        depth: bool = False,
        body_ids: bool = False,
        control: str = "interpolated",
        assets: str | Path | None = None,
        embodiment: str | Sequence[Any] | None = None,
        randomization: str = "demo_clean",
        scene_of: str | None = None,
        shadows: str = "directional",
        instruction: str = "template",
        planner: PlannerConfig | None = None,
    ) -> None:
        self.task_name = task_info(task)["name"]
        #: What makes another environment that builds the same scenes and moves alike.
        self.options: dict[str, Any] = {
            "control": control,
            "assets": assets,
            "embodiment": embodiment,
            "randomization": randomization,
            "scene_of": scene_of,
            "shadows": shadows,
            "instruction": instruction,
            "planner": planner,
        }
        self.scene_of = check_scene_of(task, scene_of)
        for camera in cameras:
            if camera not in CAMERAS:
                raise unknown_name("cameras", camera, CAMERAS, see="envs/robotwin/renderer.py")
        if control not in CONTROLS:
            raise unknown_name("control", control, CONTROLS, see="RoboTwinEnv")
        self.camera_names, self.control = tuple(cameras), control
        self.depth, self.body_ids = depth, body_ids
        self.shadows, self.instruction_kind = check_shadows(shadows), check_instruction(instruction)
        from physisforcing.core.vulkan import ensure_vulkan_env

        ensure_vulkan_env()
        self._runtime = load_runtime()
        self._assets = resolve_assets(assets)
        self._embodiment = load_embodiment(self._assets, embodiment)
        self.randomization = check_randomization(randomization, self._assets)
        self._robot_class = robot_class(
            self._runtime.robot.Robot, planner or PlannerConfig(), curobo=self._runtime.curobo
        )
        self.action_spec: ActionSpec = self._embodiment.action_spec
        self._low = np.array(self.action_spec.low, dtype=np.float32)
        self._high = np.array(self.action_spec.high, dtype=np.float32)
        self.step_limit = step_limit(self.task_name)
        self.action_space = gymnasium.spaces.Box(self._low, self._high, dtype=np.float32)
        self.observation_space = observation_space(self.camera_names, self.action_spec, depth=depth, body_ids=body_ids)
        self._task: Any = None
        self._drawing: Drawing | None = None
        self._instruction = self.expert_failure = ""

    # ------------------------------------------------------------------ episode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Build the scene of ``seed`` and let it settle; the global generators of numpy, random and torch come back
        unchanged.

        The info of a reset also has ``settled``: [name, xyz, wxyz] of every free body, rounded to 1e-5 (metres).
        ``options={"observe": False}`` leaves out the pictures (the observation then has only state and instruction).
        """
        super().reset(seed=seed)
        claim(self)
        chosen = int(self.np_random.integers(TRAIN_SEEDS)) if seed is None else int(seed)
        self._drop_task()
        self.seed_used = chosen
        keep_renderer()
        task = build_task(self, chosen)
        self._task = task
        task.clock.before = None
        task.clock.steps = 0
        task.clock.after = self._physics_stepped
        self.steps = self.clipped_steps = 0
        self.success = self.diverged = False
        self._played = self._expert_played = False
        self._commands: list[NDArray[np.float64]] = []
        self._on_boundary: Callable[[], None] | None = None
        self._pictures = Pictures(task, self.camera_names)
        self._bodies, self._contacts = Bodies(task.scene), ContactLog(task.scene)
        self._contacts.add_last_step()
        self._instruction = instruction_for(self._runtime, self.task_name, task, chosen, self.instruction_kind)
        self._hash = scene_hash(self._drawn())
        pictures = (options or {}).get("observe", True)
        return self.observe(pictures=pictures), self._info() | {"settled": self._bodies.settled()}

    def step(self, action: NDArray[np.float32]) -> tuple[dict, float, bool, bool, dict]:
        """Approach the drive targets ``action`` [A] during one control step."""
        return self._advance(action, observe=True)

    def step_blind(self, action: NDArray[np.float32]) -> tuple[dict, float, bool, bool, dict]:
        """``step`` without drawing: the observation has only state and instruction."""
        return self._advance(action, observe=False)

    def _advance(self, action: Any, *, observe: bool) -> tuple[dict, float, bool, bool, dict]:
        self._check_ready()
        goal_A, clipped = checked_action(action, self.action_spec)
        had_success = self.success
        self.clipped_steps += clipped
        self._act(goal_A)
        reward = float(self.success and not had_success)
        observation = self.observe(pictures=observe)
        truncated = self.diverged or self.steps >= self.step_limit
        return observation, reward, self.success, truncated, self._info()

    def _act(self, goal_A: NDArray[np.float64]) -> None:
        """The physics of one control step; ``goal_A`` is inside the limits."""
        self._played = True
        self._commands.append(goal_A)
        self.steps += 1
        self._contacts.restart()
        if self.control == "interpolated":
            interpolate(self._task, self._embodiment, goal_A)
            assert self._task.clock.steps % PHYSICS_STEPS_PER_ACTION == 0
        else:
            self._task.take_action(goal_A)
            self.success = self.success or bool(self._task.eval_success)
        self.diverged = self.diverged or not self._bodies.finite()

    def fork(self) -> SimulatorState:
        """This moment of the episode, to come back to with ``restore``; the episode goes on undisturbed.

        ``UserError`` in a scene that the expert moved: repeat its drive targets with ``step`` instead.
        """
        self._check_ready()
        return capture(self)

    def restore(self, state: SimulatorState) -> None:
        """Go back (or on) to a fork of this scene, any number of times and in any order; ``step`` then continues bit-equally
        to the episode that was forked, random states included. No picture is drawn.

        The steps before the fork are repeated (see ``fork.py`` for why nothing less is exact), so this takes a reset and
        their physics. ``UserError`` for a fork of another scene; ``StateDriftError`` when the repetition is not bit-equal.
        """
        self._check_ready()
        restore(self, state)

    def play_expert(self, on_frame: Callable[[int], None] | None = None) -> bool:
        """Run the task's expert from the scene just reset; True when every motion was found and the check holds at the
        end.

        ``on_frame(t)`` is called at physics steps 0, 15, 30, ... (frame t at t*dt), when ``observe()``,
        ``body_poses()`` and ``contacts()`` show that moment. The drive targets of frame t+1 are action t: replaying
        them through ``step`` repeats the episode. The last motion is held to the end of its block of 15 physics steps.
        ``expert_failure`` says why it failed.
        """
        self._check_ready()
        return play_expert(self, on_frame)

    def _physics_stepped(self) -> None:
        task = self._task
        task.robot.physics_stepped()
        self._contacts.add_last_step()
        if not self.success:
            self.success = bool(task.check_success())
        if self._on_boundary is not None and task.clock.steps % PHYSICS_STEPS_PER_ACTION == 0:
            self._on_boundary()

    # ------------------------------------------------------------------ what can be seen

    def observe(self, *, pictures: bool = True) -> dict[str, Any]:
        """The observation of this moment; draws the requested cameras unless ``pictures`` is False."""
        return self.begin_observe()() if pictures else self._seen_joints()

    def begin_observe(self, *, maps: bool = False) -> Callable[[], dict[str, Any]]:
        """Start drawing this moment. The function given waits for the pictures and returns the observation.

        Physics may go on meanwhile, which hides the wait for the GPU. ``maps``: with depth and body ids, whatever the
        environment's own setting. Before anything else is drawn, or the scene goes, the pictures are fetched.
        """
        joints = self._seen_joints()
        self._await_pictures()
        pictures, depth, body_ids = self._pictures, self.depth or maps, self.body_ids or maps
        pictures.draw()
        self._drawing = Drawing(lambda: read_pictures(pictures, depth=depth, body_ids=body_ids) | joints)
        return self._drawing

    def _await_pictures(self) -> None:
        """A scene that is freed under the renderer takes the process with it."""
        drawing, self._drawing = self._drawing, None
        if drawing is not None:
            drawing()

    def _seen_joints(self) -> dict[str, Any]:
        self._check_ready()
        robot = self._task.robot
        return {
            "state": np.clip(drive_targets(robot).astype(np.float32), self._low, self._high),
            "state_measured": measured_joints(robot).astype(np.float32),
            "instruction": self._instruction,
        }

    def depth_and_ids(self, camera: str = "head") -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
        """Depth in mm and body ids, both uint16 [240,320], of the last picture drawn by ``observe``."""
        self._check_ready()
        return self._pictures.depth(camera), self._pictures.body_ids(camera)

    def body_poses(self) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
        """Ids [K] and world poses [K,7] (xyz metres, wxyz) of every rigid body; body-id pictures have the same ids."""
        self._check_ready()
        return self._bodies.ids_K, self._bodies.poses()

    def body_names(self) -> dict[int, str]:
        """Body id -> name in the scene (names may repeat)."""
        self._check_ready()
        return self._bodies.names()

    def cameras(self) -> list[CameraSpec]:
        """Intrinsics and world-to-camera matrices of the requested cameras, as of the last picture."""
        self._check_ready()
        return self._pictures.specs()

    def contacts(self) -> list[tuple[int, int, float]]:
        """(lower id, higher id, impulse in N*s) of each pair that touched during this frame's physics steps.

        These are up to 15 steps; at frame 0 it is the last settling step. The impulse is the sum of the norms of all
        contact-point impulses.
        """
        self._check_ready()
        return self._contacts.pairs()

    # ------------------------------------------------------------------ bookkeeping

    def _info(self) -> dict[str, Any]:
        return {
            "is_success": self.success,
            "step": self.steps,
            "seed": self.seed_used,
            "scene_hash": self._hash,
            "task": self.task_name,
            "control": self.control,
            "embodiment": self._embodiment.name,
            "assets": self._assets.label,
            "runtime": self._runtime.label,
            "planner": self._robot_class.planner_name,
            "randomization": randomization_label(self.randomization, self._assets),
            "scene_of": self.scene_of or self.task_name,
            "renderer": f"sapien rasteriser, shadows={self.shadows}",
            "cameras": self.camera_names,
            "step_limit": self.step_limit,
            "clipped_steps": self.clipped_steps,
            "diverged": self.diverged,
        }

    def _drawn(self) -> dict[str, Any]:
        """What the scene hash covers. The cameras are the robot's whole rig: drawing some of them changes no scene."""
        rig = [
            {key: camera.get(key) for key in ("name", "type", "position", "forward", "left")}
            for camera in self._embodiment.config["static_camera_list"]
        ]
        return {
            "task": self.task_name,
            **({"scene_of": self.scene_of} if self.scene_of else {}),
            "seed": self.seed_used,
            "runtime": self._runtime.label,
            "assets": self._assets.label,
            "embodiment": self._embodiment.name,
            "cameras": rig,
            "actors": self._task.spawned.actors,
            **drawn_randomization(self._task, self.randomization),
        }

    def _check_ready(self) -> None:
        if self._task is None:
            raise UserError("env", got="no scene", wanted="a reset before anything else", fix="call reset(seed=...)")

    def _drop_task(self) -> None:
        if self._task is not None:
            task, self._task = self._task, None
            try:
                self._await_pictures()
            finally:
                self._pictures = self._bodies = self._contacts = None  # type: ignore[assignment]
                discard_task(task)

    def close(self) -> None:
        """Release the scene; another environment of this process may then be reset."""
        self._drop_task()
        release(self)
