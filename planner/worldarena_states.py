"""The numbers in WorldArena's ``states/`` files: end-effector poses in two orders, or joints; which one is always said.

RoboTwin records, for each arm, xyz in metres and a quaternion wxyz of the last link (its gripper bias is 0.12 m for aloha-agilex,
which is subtracted again). WorldArena's script writes these with the RIGHT arm first; its Track 2 page documents the LEFT arm first and
quaternions xyzw. A file of 16 numbers does not say which it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError, unknown_name

from .tool import TOOL_LINKS

#: Layouts of a row of ``states/``. ``left_first``: as documented for Track 2. ``right_first``: as the released script writes.
#: ``joint14``: drive targets, the same numbers as ``actions/``.
STATES = ("left_first", "right_first", "joint14")
GRIPPERS = (6, 13)


def state_names(layout: str) -> list[str]:
    """Names of the columns of a row of ``states/``."""
    if layout not in STATES:
        raise unknown_name("states", layout, STATES, see="planner/worldarena_states.py")
    if layout == "joint14":
        return [
            f"{arm}_{part}" for arm in ("left", "right") for part in (*(f"joint_{k}" for k in range(1, 7)), "gripper")
        ]
    arms, quaternion = (("left", "right"), "xyzw") if layout == "left_first" else (("right", "left"), "wxyz")
    parts = [*"xyz", *(f"q{part}" for part in quaternion), "gripper"]
    return [f"{arm}_{part}" for arm in arms for part in parts]


def link_poses(
    poses_TK7: NDArray[np.floating], ids_K: NDArray[np.integer], names: Mapping[int, str]
) -> NDArray[np.float64]:
    """[T,2,7] xyz and quaternion wxyz (w >= 0) of the last link of the left and the right arm, from an episode's body poses.

    Equal to RoboTwin's ``get_left_ee_pose`` and ``get_right_ee_pose``. ``UserError`` for a robot without these links.
    """
    by_name = {name: number for number, name in names.items()}
    columns = []
    for link in TOOL_LINKS:
        place = np.flatnonzero(np.asarray(ids_K) == by_name.get(link, -1))
        if len(place) != 1:
            raise UserError("states", got=f"no {link}", wanted="the aloha-agilex robot", fix="states=joint14")
        columns.append(int(place[0]))
    found = np.asarray(poses_TK7, np.float64)[:, columns]
    turned = np.where(found[..., 3:4] < 0, -1.0, 1.0)
    return np.concatenate([found[..., :3], turned * found[..., 3:]], axis=-1)


def states_of(
    layout: str, joints_TA: NDArray[np.floating], poses_T27: NDArray[np.float64] | None
) -> NDArray[np.float32]:
    """Rows of ``states/`` [T,16] or [T,14]. ``joints_TA``: drive targets at each frame; ``poses_T27`` as ``link_poses`` gives them."""
    state_names(layout)
    joints = np.asarray(joints_TA, np.float32)
    if layout == "joint14":
        return joints
    if poses_T27 is None:
        fix = "collect with ground truth, or states=joint14"
        raise UserError("states", got="an episode without ground truth", wanted="poses of the robot's links", fix=fix)
    if len(poses_T27) != len(joints):
        raise UserError(
            "states", got=f"{len(poses_T27)} poses", wanted=f"{len(joints)}, one a frame", fix="collect again"
        )
    arms = [_arm(poses_T27[:, side], joints[:, GRIPPERS[side]], layout) for side in (0, 1)]
    return np.concatenate(arms if layout == "left_first" else arms[::-1], axis=1).astype(np.float32)


def poses_of(layout: str, states_TS: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Back: poses [T,2,7] (left, right; wxyz) and gripper openings [T,2] from rows of 16 numbers in a known layout."""
    if layout not in ("left_first", "right_first"):
        raise unknown_name("states", layout, STATES[:2], see="planner/worldarena_states.py")
    rows = np.asarray(states_TS, np.float64)
    if rows.ndim != 2 or rows.shape[1] != 16:
        raise UserError("states", got=f"shape {list(rows.shape)}", wanted="[T,16]", fix="states=joint14 has no poses")
    arms = [rows[:, :8], rows[:, 8:]] if layout == "left_first" else [rows[:, 8:], rows[:, :8]]
    order = [0, 1, 2, 6, 3, 4, 5] if layout == "left_first" else list(range(7))
    return np.stack([arm[:, order] for arm in arms], axis=1), np.stack([arm[:, 7] for arm in arms], axis=1)


def _arm(pose_T7: NDArray[np.float64], gripper_T: NDArray[np.float32], layout: str) -> NDArray[np.float64]:
    order = [0, 1, 2, 4, 5, 6, 3] if layout == "left_first" else list(range(7))
    return np.concatenate([pose_T7[:, order], gripper_T[:, None]], axis=1)
