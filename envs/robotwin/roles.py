"""What each rigid body of a scene is: what it stands on, part of the robot, one of its hands, or an object of the task."""

from __future__ import annotations

from typing import Any

#: RoboTwin's names of what a scene stands on.
SCENERY = ("ground", "wall", "table")


def entity_ids(things: list[Any]) -> set[int]:
    """Body ids of entities, actors, links or whole articulations."""
    found: set[int] = set()
    for thing in things:
        links = thing.get_links() if hasattr(thing, "get_links") else [thing]
        found |= {int(getattr(link, "entity", link).per_scene_id) for link in links}
    return found


def actor_ids(actor: Any) -> set[int]:
    """Body ids of one of RoboTwin's ``Actor`` or ``ArticulationActor``."""
    return entity_ids([actor.actor])


def robot_ids(robot: Any) -> set[int]:
    """Body ids of all links of both arms."""
    return entity_ids([robot.left_entity, robot.right_entity])


def hand_ids(robot: Any, side: str) -> set[int]:
    """Body ids of one hand: the link that carries it and the fingers."""
    joints = [getattr(robot, f"{side}_ee"), *(joint for joint, *_ in getattr(robot, f"{side}_gripper"))]
    return entity_ids([joint.child_link for joint in joints])


def scene_roles(env: Any) -> tuple[str, ...]:
    """The role (``core.executed.ROLES``) of each body in the order of ``env.body_poses()``, from the scene itself and not from names."""
    robot, names = env._task.robot, env.body_names()
    links, hands = robot_ids(robot), hand_ids(robot, "left") | hand_ids(robot, "right")
    roles = {int(number): "scenery" if names[int(number)] in SCENERY else "object" for number in env.body_poses()[0]}
    roles |= dict.fromkeys(links, "robot") | dict.fromkeys(hands, "gripper")
    return tuple(roles[int(number)] for number in env.body_poses()[0])
