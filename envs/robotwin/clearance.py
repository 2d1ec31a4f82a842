"""How far a planned arm motion stays from the table and from the arm itself.

The arm is reduced to a few points (elbow, wrist, palm, finger tips) and its forearm to a segment; the motion to a few
joint configurations. That is enough to tell the branches of inverse kinematics apart: elbow above or below the table,
hand beside or inside the forearm.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Top of RoboTwin's table and its front edge (world, metres), with a hand's width before the edge.
TABLE_TOP, TABLE_FRONT = 0.74, -0.40
#: aloha-agilex's hand in the frame of its last joint, metres: finger tips ahead of it, finger rail ahead and to both sides,
#: middle of the palm.
FINGERTIP, PALM, PALM_HALF_WIDTH, PALM_CENTRE = 0.150, 0.066, 0.085, 0.040
#: Least height above the table (metres) of elbow, wrist, end joint, finger tips, palm ends; tips may press what lies there.
HEIGHTS = np.array([0.040, 0.035, 0.040, -0.004, 0.015, 0.015])
#: Length of the forearm's segment and least distance of the hand from it.
FOREARM, FOREARM_DISTANCE = 0.22, 0.045


class ArmClearance:
    """Clearance of one arm. ``links``: indices of the child links of joints 1 to 6 in the pinocchio model."""

    def __init__(self, model: Any, root: Any, links: list[int], columns: NDArray[np.intp]) -> None:
        self._model, self._links, self._columns = model, links, columns
        self._root_44 = root.to_transformation_matrix()

    def at(self, qpos: NDArray[np.float64]) -> float:
        """Metres to spare (negative: too close) with all active joints of the robot at ``qpos``."""
        self._model.compute_forward_kinematics(qpos)
        elbow_44, wrist_44, hand_44 = (
            self._root_44 @ self._model.get_link_pose(self._links[i]).to_transformation_matrix() for i in (2, 3, 5)
        )
        hand, ahead, across = hand_44[:3, 3], hand_44[:3, 0], hand_44[:3, 1]
        tips = hand + FINGERTIP * ahead
        palm = hand + PALM * ahead + PALM_HALF_WIDTH * across
        other_palm = hand + PALM * ahead - PALM_HALF_WIDTH * across
        points_N3 = np.stack([elbow_44[:3, 3], wrist_44[:3, 3], hand, tips, palm, other_palm])
        above_N = np.where(points_N3[:, 1] > TABLE_FRONT, points_N3[:, 2] - TABLE_TOP - HEIGHTS, np.inf)
        from_wrist_N3 = np.stack([tips, palm, other_palm, hand + PALM_CENTRE * ahead]) - wrist_44[:3, 3]
        back = -elbow_44[:3, 0]
        along_N = np.clip(from_wrist_N3 @ back, 0.0, FOREARM)
        beside_N = np.linalg.norm(from_wrist_N3 - along_N[:, None] * back, axis=1) - FOREARM_DISTANCE
        return float(min(above_N.min(), beside_N.min()))

    def along(self, qpos: NDArray[np.float64], goal_J: NDArray[np.float64], samples: int = 8) -> float:
        """Least clearance on the straight line in joint space from ``qpos`` to ``goal_J`` (this arm's joints), its end
        included.
        """
        moved = np.array(qpos, dtype=float)
        start_J = moved[self._columns].copy()
        least = np.inf
        for part in np.arange(1, samples + 1) / samples:
            moved[self._columns] = start_J + part * (goal_J - start_J)
            least = min(least, self.at(moved))
        return least
