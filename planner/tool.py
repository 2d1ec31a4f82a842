"""Where the two tools are, from the poses of the robot's links: the oracle check compares them in millimetres."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError

#: Last link of each arm of aloha-agilex (left, right), and the tool centre in its frame, metres (RoboTwin's gripper bias).
TOOL_LINKS = ("fl_link6", "fr_link6")
TOOL_OFFSET = (0.12, 0.0, 0.0)


def tool_points(
    poses_TK7: NDArray[np.floating],
    ids_K: NDArray[np.integer],
    names: Mapping[int, str],
    *,
    links: Sequence[str] = TOOL_LINKS,
    offset: Sequence[float] = TOOL_OFFSET,
) -> NDArray[np.float64]:
    """World positions [T, links, 3] of the tool centres, metres. Poses are xyz + wxyz. ``UserError`` for a missing link."""
    by_name = {name: number for number, name in names.items()}
    columns = []
    for link in links:
        place = np.flatnonzero(np.asarray(ids_K) == by_name.get(link, -1))
        if len(place) != 1:
            raise UserError("tool link", got=link, wanted=f"one of {sorted(by_name)}", fix="use the aloha-agilex robot")
        columns.append(int(place[0]))
    poses = np.asarray(poses_TK7, np.float64)[:, columns]
    return poses[..., :3] + rotate(poses[..., 3:], np.asarray(offset, np.float64))


def rotate(quaternion_wxyz: NDArray[np.float64], vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotate ``vector`` [3] by quaternions [..., 4]."""
    w, axis = quaternion_wxyz[..., :1], quaternion_wxyz[..., 1:]
    vector = np.broadcast_to(vector, axis.shape)
    twice = 2 * np.cross(axis, vector)
    return vector + w * twice + np.cross(axis, twice)


def tool_errors(executed_T23: NDArray[np.float64], recorded_T23: NDArray[np.float64]) -> dict[str, float]:
    """Distances between executed and recorded tool paths at the same control steps, millimetres.

    Mean, maximum and end value over the arms that move in the recording (more than 5 mm; all arms when none does): the resting
    arm would only dilute the figure.
    """
    count = min(len(executed_T23), len(recorded_T23))
    executed, recorded = executed_T23[:count], recorded_T23[:count]
    moves = np.linalg.norm(recorded_T23 - recorded_T23[:1], axis=-1).max(0) > 0.005
    chosen = moves if moves.any() else np.ones_like(moves)
    distance = 1e3 * np.linalg.norm(executed - recorded, axis=-1)[:, chosen]
    return {
        "tool_mm": float(distance.mean()),
        "tool_mm_max": float(distance.max()),
        "tool_mm_end": float(distance[-1].mean()),
    }
