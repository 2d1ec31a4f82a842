"""Exact forks of an episode.

A scene's future depends on more than poses and velocities: the engine keeps contact manifolds, friction anchors, sleep
counters and the order in which pairs first touched, and offers no way to read or set them. Setting poses, velocities and
drive targets of a scene (SAPIEN's ``pack``/``unpack`` does that) therefore changes what follows: where something is touched,
bodies end up to millimetres elsewhere, and two such restores differ from each other (``benchmarks/env_speed.py`` measures
it). The engine is, however, a deterministic function of the scene and the commands it was given. A fork keeps these
commands beside the visible state; restoring builds the scene again, repeats them without drawing, and compares everything
visible with the fork, bit by bit.

So forking costs nothing and disturbs nothing; restoring costs a reset and the physics of the steps before the fork, or only
the steps in between where the live episode is an earlier part of the forked one.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError

if TYPE_CHECKING:
    from .env import RoboTwinEnv


class StateDriftError(RuntimeError):
    """A repeated episode is not bit-equal to the forked one (another machine, another build, a scene moved by hand)."""


@dataclass(slots=True, kw_only=True)
class ArticulationState:
    """``qpos_J`` [radians or metres], ``qvel_J`` [per s], ``qf_J`` [N*m or N] of the active joints; their drive targets and
    drive velocity targets; the root's pose (xyz, wxyz).
    """

    qpos_J: NDArray[np.float32]
    qvel_J: NDArray[np.float32]
    qf_J: NDArray[np.float32]
    drive_targets_J: NDArray[np.float32]
    drive_velocities_J: NDArray[np.float32]
    root_7: NDArray[np.float32]


@dataclass(slots=True, kw_only=True)
class SimulatorState:
    """One moment of an episode, as arrays and plain values; may be sent to another process.

    ``commands_TA``: the drive targets of every step so far, float64 [T,A], after clipping. ``poses_K7`` (metres, wxyz) and
    ``velocities_K6`` (linear m/s, angular rad/s; zero for what cannot move) of all rigid bodies, ``asleep_K``: which of them
    the engine has put to sleep. ``task_values`` and ``robot_values``: the plain attributes of RoboTwin's task and robot
    objects (latches, counters, gripper values). Random states: numpy's and random's global ones, torch's where loaded, and
    the environment's own. ``contacts``: as ``RoboTwinEnv.contacts``.
    """

    scene_hash: str
    task: str
    seed: int
    control: str
    commands_TA: NDArray[np.float64]
    physics_steps: int
    steps: int
    clipped_steps: int
    success: bool
    diverged: bool
    poses_K7: NDArray[np.float32]
    velocities_K6: NDArray[np.float32]
    asleep_K: NDArray[np.bool_]
    articulations: tuple[ArticulationState, ...]
    contacts: tuple[tuple[int, int, float], ...]
    task_values: dict[str, Any]
    robot_values: dict[str, Any]
    numpy_random: tuple[Any, ...]
    python_random: tuple[Any, ...]
    torch_random: NDArray[np.uint8] | None
    env_random: dict[str, Any]
    env_random_seed: int | None


#: What a repeated episode has to agree in; random states are set, not compared.
COMPARED = tuple(
    field.name
    for field in dataclasses.fields(SimulatorState)
    if not field.name.endswith("_random") and field.name != "env_random_seed"
)


def capture(env: RoboTwinEnv) -> SimulatorState:
    """Body of ``RoboTwinEnv.fork``."""
    if env._expert_played:
        raise UserError(
            "fork",
            got="a scene that the expert moved",
            wanted="a scene moved by step",
            fix="record the drive targets in play_expert(on_frame), reset to the seed, repeat them with step, then fork",
        )
    torch = sys.modules.get("torch")
    velocities_K6, asleep_K = env._bodies.motion()
    return SimulatorState(
        scene_hash=env._hash,
        task=env.task_name,
        seed=env.seed_used,
        control=env.control,
        commands_TA=np.array(env._commands, dtype=np.float64).reshape(-1, env.action_spec.dim),
        physics_steps=env._task.clock.steps,
        steps=env.steps,
        clipped_steps=env.clipped_steps,
        success=env.success,
        diverged=env.diverged,
        poses_K7=env._bodies.poses(),
        velocities_K6=velocities_K6,
        asleep_K=asleep_K,
        articulations=tuple(_articulation(a) for a in _articulations(env._task.robot)),
        contacts=tuple(env._contacts.pairs()),
        task_values=_plain_attributes(env._task),
        robot_values=_plain_attributes(env._task.robot),
        numpy_random=tuple(np.random.get_state(legacy=True)),
        python_random=random.getstate(),
        torch_random=None if torch is None else torch.get_rng_state().numpy().copy(),
        env_random=copy.deepcopy(dict(env.np_random.bit_generator.state)),
        env_random_seed=env.np_random_seed,
    )


def restore(env: RoboTwinEnv, state: SimulatorState) -> None:
    """Body of ``RoboTwinEnv.restore``."""
    for field, here in (("scene_hash", env._hash), ("control", env.control)):
        wanted = getattr(state, field)
        if here != wanted:
            fix = (
                f"reset(seed={state.seed}) of an environment of {state.task}, made with the same arguments, comes first"
            )
            raise UserError(field, got=here, wanted=f"the fork's {wanted}", fix=fix)
    done = env._commands
    behind = not env._expert_played and len(done) <= len(state.commands_TA)
    if not (behind and np.array_equal(np.reshape(done, (-1, env.action_spec.dim)), state.commands_TA[: len(done)])):
        env.reset(seed=state.seed, options={"observe": False})
    for command_A in state.commands_TA[len(env._commands) :]:
        env._act(command_A)
    env.clipped_steps = state.clipped_steps  # commands are kept as they were clipped
    _set_random_states(env, state)
    if wrong := differences(capture(env), state):
        raise StateDriftError(
            f"{state.task} seed {state.seed}: the repeated episode differs from the fork at step {state.steps} in "
            f"{', '.join(wrong)}; forks are exact on one machine with one version of the packages"
        )


def differences(one: SimulatorState, other: SimulatorState) -> list[str]:
    """Names of the fields (random states left out) in which two states are not bit-equal."""
    return [name for name in COMPARED if not _equal(getattr(one, name), getattr(other, name))]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, ArticulationState):
        return all(_equal(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(_equal, one, other))
    return bool(type(one) is type(other) and (one == other or (one != one and other != other)))


def _articulations(robot: Any) -> list[Any]:
    """Each once: with some robots both arms are one articulation."""
    return list({id(entity): entity for entity in (robot.left_entity, robot.right_entity)}.values())


def _articulation(entity: Any) -> ArticulationState:
    joints = entity.get_active_joints()
    root = entity.get_root_pose()
    return ArticulationState(
        qpos_J=np.array(entity.get_qpos()),
        qvel_J=np.array(entity.get_qvel()),
        qf_J=np.array(entity.get_qf()),
        drive_targets_J=np.array([joint.get_drive_target()[0] for joint in joints], dtype=np.float32),
        drive_velocities_J=np.array([joint.get_drive_velocity_target()[0] for joint in joints], dtype=np.float32),
        root_7=np.array([*root.p, *root.q], dtype=np.float32),
    )


def _plain_attributes(owner: Any) -> dict[str, Any]:
    """Attributes that hold only numbers, strings, arrays and containers of them. Left out are parts of the scene, and places
    of files, which differ between machines.
    """
    kept = {name: value for name, value in vars(owner).items() if not name.endswith(("_file", "_path", "_dir"))}
    return {name: copy.deepcopy(value) for name, value in sorted(kept.items()) if is_plain(value)}


def is_plain(value: Any) -> bool:
    """Whether a value is numbers, strings, arrays and containers of them all the way down."""
    if isinstance(value, np.ndarray):
        return value.dtype != object
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(inner) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, np.generic))


def _set_random_states(env: RoboTwinEnv, state: SimulatorState) -> None:
    np.random.set_state(state.numpy_random)
    random.setstate(state.python_random)
    torch = sys.modules.get("torch")
    if torch is not None and state.torch_random is not None:
        torch.set_rng_state(torch.from_numpy(state.torch_random.copy()))
    env.np_random.bit_generator.state = copy.deepcopy(state.env_random)
    env._np_random_seed = state.env_random_seed
