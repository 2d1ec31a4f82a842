"""What an observation holds, as a space and as values."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from physisforcing.core.types import ActionSpec

from .renderer import Pictures

HEIGHT, WIDTH = 240, 320
MAX_INSTRUCTION = 512


def observation_space(
    cameras: tuple[str, ...], action_spec: ActionSpec, *, depth: bool, body_ids: bool
) -> gymnasium.spaces.Dict:
    """The space of ``RoboTwinEnv`` observations (its docstring lists the entries)."""
    box, spaces = gymnasium.spaces.Box, {}
    for name in cameras:
        spaces[f"{name}_rgb"] = box(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
        if depth:
            spaces[f"{name}_depth"] = box(0, 65535, (HEIGHT, WIDTH), np.uint16)
        if body_ids:
            spaces[f"{name}_body_ids"] = box(0, 65535, (HEIGHT, WIDTH), np.uint16)
    low, high = (np.array(limit, dtype=np.float32) for limit in (action_spec.low, action_spec.high))
    spaces["state"] = box(low, high, dtype=np.float32)
    # measured joints overshoot their targets, so their bounds are only sanity bounds
    spaces["state_measured"] = box(-20.0, 20.0, (action_spec.dim,), np.float32)
    spaces["instruction"] = gymnasium.spaces.Text(MAX_INSTRUCTION, charset=string.printable)
    return gymnasium.spaces.Dict(spaces)


def read_pictures(pictures: Pictures, *, depth: bool, body_ids: bool) -> dict[str, NDArray]:
    """What the requested cameras saw at the last ``draw``."""
    observation: dict[str, NDArray] = {}
    for name in pictures.cameras:
        observation[f"{name}_rgb"] = pictures.rgb(name)
        if depth:
            observation[f"{name}_depth"] = pictures.depth(name)
        if body_ids:
            observation[f"{name}_body_ids"] = pictures.body_ids(name)
    return observation


class Drawing:
    """Pictures that the renderer is still drawing: a call waits for them, once, and gives the observation."""

    def __init__(self, read: Callable[[], dict[str, Any]]) -> None:
        self._read: Callable[[], dict[str, Any]] | None = read
        self._seen: dict[str, Any] = {}

    def __call__(self) -> dict[str, Any]:
        if self._read is not None:
            self._seen, self._read = self._read(), None
        return self._seen


def drive_targets(robot: Any) -> NDArray[np.float64]:
    """RoboTwin's vector u [A]: targets of the arm joints in radians, grippers 0 closed .. 1 open."""
    return np.array(robot.get_left_arm_jointState() + robot.get_right_arm_jointState(), dtype=np.float64)


def measured_joints(robot: Any) -> NDArray[np.float64]:
    """Where the joints of ``drive_targets`` really are, [A]."""
    values = [robot.get_left_arm_real_jointState(), robot.get_right_arm_real_jointState()]
    for side, arm in zip(("left", "right"), values, strict=True):
        closed, opened = getattr(robot, f"{side}_gripper_scale")
        joint = getattr(robot, f"{side}_gripper")[0][0]
        entity = getattr(robot, f"{side}_entity")
        position = entity.get_qpos()[entity.get_active_joints().index(joint)]
        arm[-1] = (position - closed) / (opened - closed)  # upstream reports the target here
    return np.array(values[0] + values[1], dtype=np.float64)
