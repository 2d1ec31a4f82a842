"""The joint table of the pack's robot: the two front arms of aloha-agilex as numbers.

Names, origins, axes and limits equal those of RoboTwin's aloha-agilex description (``arx5_description_isaac.urdf``,
MIT), so that reach, inverse kinematics and recorded joint targets carry over between the two. The rounded angles
(3.1416, 0.015928) are the description's own and are kept: forward kinematics agrees to 1e-6.
"""

from __future__ import annotations

from dataclasses import dataclass

Vec3 = tuple[float, float, float]


@dataclass(slots=True, kw_only=True, frozen=True)
class Joint:
    """One joint: ``xyz`` metres and ``rpy`` radians from parent to child; ``lower``/``upper`` in radians or metres."""

    name: str
    kind: str  # "fixed", "revolute" or "prismatic"
    parent: str
    child: str
    xyz: Vec3
    rpy: Vec3 = (0.0, 0.0, 0.0)
    axis: Vec3 | None = None
    lower: float = 0.0
    upper: float = 0.0


ROOT_LINK = "footprint"
#: Arm prefix -> (side, origin of the arm's base in the robot's frame, its rotation).
ARMS: dict[str, tuple[str, Vec3, Vec3]] = {
    "fl": ("left", (0.2305, 0.297, 0.782), (0.0, 0.0, 0.02)),
    "fr": ("right", (0.2315, -0.3063, 0.781), (0.0, 0.0, 0.01)),
}
_REVOLUTE = (  # origin, rotation, axis of joints 1..6
    ((0.0, 0.0, 0.058), (0.0, 0.0, 0.0), (0.0, 0.0, 1.0)),
    ((0.025013, 0.00060169, 0.042), (0.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
    ((-0.26396, 0.0044548, 0.0), (-3.1416, 0.0, -0.015928), (0.0, 1.0, 0.0)),
    ((0.246, -0.00025, -0.06), (0.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
    ((0.06775, 0.0015, -0.0855), (0.0, 0.0, -0.015928), (0.0, 0.0, 1.0)),
    ((0.03095, 0.0, 0.0855), (-3.1416, 0.0, 0.0), (1.0, 0.0, 0.0)),
)
_FINGERS = (  # joints 7 and 8 slide the fingers apart
    ((0.08457, 0.024493, -0.00010349), (0.0, 1.0, 0.0)),
    ((0.08457, -0.024496, -0.00010354), (0.0, -1.0, 0.0)),
)
ARM_LIMIT = 10.0
FINGER_TRAVEL = 0.04765
EFFORT, VELOCITY = 100.0, 1000.0


def arm_joints(prefix: str) -> list[Joint]:
    """The joints of one arm, parents before children: mount, joints 1-6, wrist camera, fingers 7 and 8."""
    side, origin, rotation = ARMS[prefix]
    joints = [
        Joint(
            name=f"{prefix}_base_joint",
            kind="fixed",
            parent=ROOT_LINK,
            child=f"{prefix}_base_link",
            xyz=origin,
            rpy=rotation,
        )
    ]
    parent = f"{prefix}_base_link"
    for number, (xyz, rpy, axis) in enumerate(_REVOLUTE, start=1):
        child = f"{prefix}_link{number}"
        joints.append(
            Joint(
                name=f"{prefix}_joint{number}",
                kind="revolute",
                parent=parent,
                child=child,
                xyz=xyz,
                rpy=rpy,
                axis=axis,
                lower=-ARM_LIMIT,
                upper=ARM_LIMIT,
            )
        )
        parent = child
    joints.append(
        Joint(
            name=f"{side}_camera_joint",
            kind="fixed",
            parent=parent,
            child=f"{side}_camera",
            xyz=(0.07, 0.032, 0.065),
            rpy=(0.0, 0.4, 0.0),
        )
    )
    for number, (xyz, axis) in enumerate(_FINGERS, start=7):
        joints.append(
            Joint(
                name=f"{prefix}_joint{number}",
                kind="prismatic",
                parent=parent,
                child=f"{prefix}_link{number}",
                xyz=xyz,
                axis=axis,
                upper=FINGER_TRAVEL,
            )
        )
    return joints


def all_joints() -> list[Joint]:
    """Both arms, left first."""
    return [joint for prefix in ARMS for joint in arm_joints(prefix)]
