"""The pack's objects: shapes, colours and RoboTwin ``model_data``, in metres, y up, standing on y = 0.

RoboTwin reads a contact point as a frame C: the gripper comes along -C_y and its fingers close along C_z. A functional
point is a frame that ``place_actor`` brings onto a target. Sizes follow the official objects of the same name, so that
the task code's distances (how far a finger reaches below its tool centre, where a bell counts as touched) mean the same
here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from .meshes import Color, Mesh, bounds, box, lathe, prism, ring_pieces, write_glb

Frame = list[list[float]]
#: How far a fingertip reaches beyond the tool centre: the finger ends 0.071 after joint 7, the centre lies 0.0354 after.
FINGERTIP_REACH = 0.0356
STEEL, INK, PAPER = (0.62, 0.65, 0.70), (0.10, 0.11, 0.13), (0.93, 0.92, 0.88)


@dataclass(slots=True, kw_only=True)
class ModelObject:
    """One model of an object: what is drawn, what collides (convex pieces) and its named frames."""

    visual: list[Mesh]
    collision: list[Mesh]
    contact_points: list[Frame] = field(default_factory=list)
    functional_points: list[Frame] = field(default_factory=list)
    target_points: list[Frame] = field(default_factory=list)
    orientation_point: Frame = field(default_factory=list)
    stable: bool = True


def frame(x_axis: ArrayLike, y_axis: ArrayLike, z_axis: ArrayLike, position: ArrayLike) -> Frame:
    """A 4x4 with the given axes as columns, rounded so that files carry no floating point noise."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.stack([x_axis, y_axis, z_axis], axis=1)
    matrix[:3, 3] = position
    return (np.round(matrix, 6) + 0.0).tolist()


def upright(position: ArrayLike) -> Frame:
    """The model's own axes at ``position``: the gripper comes from above, fingers close along z."""
    return frame((1, 0, 0), (0, 1, 0), (0, 0, 1), position)


def standing(height: float) -> Frame:
    """A functional point on the axis at ``height`` whose z axis points up."""
    return frame((1, 0, 0), (0, 0, 1), (0, -1, 0), (0, height, 0))


def bell(radius: float, height: float, dome: Color, button: Color) -> ModelObject:
    """A call bell: dark foot, dome, button. Contact point 0 lies under the button, so that a click presses 5 mm deep."""
    foot, shoulder = 0.16 * height, 0.80 * height
    arc = [(radius * 0.92 * np.cos(a), foot + (shoulder - foot) * np.sin(a)) for a in np.linspace(0, np.pi / 2, 6)[:-1]]
    knob = 0.13 * radius + 0.004
    visual = [
        lathe([(0, 0), (radius, 0), (radius, foot), (0, foot)], 24, INK),
        lathe([*arc, (0, shoulder)], 24, dome, 0.35),
        lathe([(knob, shoulder - 0.004), (knob, height - 0.002), (knob * 0.7, height), (0, height)], 12, button),
    ]
    collision = [
        lathe([(0, 0), (radius, 0), (radius, foot), (0, foot)], 12, INK),
        lathe([(0, foot), (arc[0][0], foot), (arc[2][0], arc[2][1]), (arc[4][0], arc[4][1]), (0, shoulder)], 12, dome),
        lathe([(0, shoulder - 0.004), (knob, shoulder - 0.004), (knob, height), (0, height)], 8, button),
    ]
    # click_bell stops the tool centre 55 mm above contact point 0; the tip then stands 5 mm inside the button.
    return ModelObject(
        visual=visual,
        collision=collision,
        contact_points=[upright((0, height + 0.005 + FINGERTIP_REACH - 0.055 - 0.010, 0))],
    )


def stapler(width: float, height: float, shell: Color, accent: Color) -> ModelObject:
    """A stapler along z: foot plate, hinge, arm rising to the front. Contact point 2 is where it is pressed."""
    half, length = width / 2, 0.048
    arm = [
        (-length, 0.012),
        (0.0, 0.020),
        (length, 0.45 * height),
        (length, height - 0.006),
        (length - 0.010, height),
        (0.0, 0.95 * height),
        (-length + 0.006, 0.72 * height),
        (-length, 0.62 * height),
    ]
    strip = [(-0.030, 0.86 * height), (0.010, 0.94 * height), (0.010, height), (-0.030, 0.91 * height)]
    visual = [
        box((width, 0.008, 2 * length), (0, 0.004, 0), INK),
        box((width * 0.9, 0.018, 0.024), (0, 0.015, -length + 0.014), STEEL),
        box((width * 0.7, 0.003, 0.020), (0, 0.0095, length - 0.014), STEEL),
        prism(arm, -half * 0.85, half * 0.85, shell, 0.45),
        prism(strip, -half * 0.45, half * 0.45, accent, 0.5),
    ]
    collision = [
        box((width, 0.008, 2 * length), (0, 0.004, 0), INK),
        box((width * 0.9, 0.018, 0.024), (0, 0.015, -length + 0.014), STEEL),
        prism(arm, -half * 0.85, half * 0.85, shell),
    ]
    middle = 0.6 * height
    contacts = [
        frame((0, 0, -1), (0, 1, 0), (1, 0, 0), (0, middle, 0)),
        frame((0, 0, 1), (0, 1, 0), (-1, 0, 0), (0, middle, 0)),
        frame((0, 0, 1), (0, 1, 0), (-1, 0, 0), (0, height - 0.001, 0.032)),
    ]
    return ModelObject(visual=visual, collision=collision, contact_points=contacts)


def bottle(radius: float, height: float, body: Color, label: Color, cap: Color) -> ModelObject:
    """A bottle: body with a label, shoulder, neck, cap. Eight grasps around its middle, which is functional point 0."""
    shoulder, neck, neck_radius = 0.66 * height, 0.82 * height, 0.42 * radius
    band = 1.015 * radius
    visual = [
        lathe(
            [
                (0, 0),
                (radius * 0.9, 0),
                (radius, 0.005),
                (radius, shoulder),
                (neck_radius, neck),
                (neck_radius, 0.9 * height),
            ],
            20,
            body,
            0.3,
        ),
        lathe(
            [(radius, 0.22 * height), (band, 0.22 * height), (band, 0.58 * height), (radius, 0.58 * height)], 20, label
        ),
        lathe(
            [
                (neck_radius, 0.88 * height),
                (neck_radius * 1.25, 0.88 * height),
                (neck_radius * 1.25, height),
                (0, height),
            ],
            16,
            cap,
        ),
    ]
    collision = [
        lathe([(0, 0), (radius, 0), (radius, shoulder), (0, shoulder)], 8, body),
        lathe([(0, shoulder), (radius, shoulder), (neck_radius, neck), (0, neck)], 8, body),
        lathe([(0, neck), (neck_radius * 1.2, neck), (neck_radius * 1.2, height), (0, height)], 8, cap),
    ]
    middle = height / 2
    contacts = []
    for turn in np.arange(8) * (np.pi / 4):
        outward = np.array([np.sin(turn), 0.0, np.cos(turn)])
        contacts.append(frame((0, 1, 0), outward, np.cross((0, 1, 0), outward), (0, middle, 0)))
    return ModelObject(
        visual=visual,
        collision=collision,
        contact_points=contacts,
        functional_points=[standing(middle)],
        target_points=[upright((0, middle, 0))],
        orientation_point=upright((0, height, 0)),
    )


def cup(radius: float, height: float, outside: Color, inside: Color) -> ModelObject:
    """A cup without a handle. Contacts 0/1 and 2/3 grasp the wall at +z and -z; functional point 0 is the bottom."""
    foot, wall, floor = 0.80 * radius, 0.0035, 0.005
    visual = [
        lathe([(0, 0), (foot, 0), (radius, height), (radius - wall, height)], 24, outside, 0.5),
        lathe([(radius - wall, height), (foot - wall, floor), (0, floor)], 24, inside, 0.5),
        lathe(
            [
                (radius * 0.885, 0.42 * height),
                (radius * 0.93, 0.46 * height),
                (radius * 0.955, 0.60 * height),
                (radius * 0.91, 0.60 * height),
            ],
            24,
            inside,
        ),
    ]
    collision = [
        lathe([(0, 0), (foot, 0), (foot, floor), (0, floor)], 12, outside),
        *ring_pieces([(foot - wall, foot, 0.001), (radius - wall, radius, height)], 12),
    ]
    grip, reach = 0.88 * height, radius * 0.95 - wall / 2
    contacts = [
        frame((sign, 0, 0), (0, 1, 0), (0, 0, sign), (0, grip, side * reach)) for side in (1, -1) for sign in (1, -1)
    ]
    return ModelObject(
        visual=visual,
        collision=collision,
        contact_points=contacts,
        functional_points=[standing(0.0)],
        target_points=[upright((0, 0, 0))],
    )


def coaster(radius: float, height: float, cork: Color, rim: Color) -> ModelObject:
    """A round coaster with a darker rim. Functional point 0 is the middle of its top."""
    visual = [
        lathe([(0, 0), (radius, 0), (radius, height), (radius * 0.82, height)], 28, rim),
        lathe([(radius * 0.82, height), (0, height)], 28, cork, 0.9),
    ]
    collision = [lathe([(0, 0), (radius, 0), (radius, height), (0, height)], 16, cork)]
    return ModelObject(
        visual=visual,
        collision=collision,
        functional_points=[standing(height)],
        target_points=[upright((0, height, 0))],
    )


_SHELLS: tuple[Color, ...] = (
    (0.80, 0.12, 0.12),
    (0.12, 0.25, 0.72),
    (0.16, 0.17, 0.19),
    (0.10, 0.52, 0.25),
    (0.50, 0.18, 0.58),
    (0.90, 0.45, 0.08),
    (0.05, 0.50, 0.55),
)
_BOTTLES: tuple[tuple[Color, Color, Color], ...] = (
    ((0.12, 0.45, 0.18), PAPER, (0.75, 0.10, 0.10)),
    ((0.15, 0.35, 0.75), (0.95, 0.80, 0.20), INK),
    ((0.60, 0.30, 0.10), (0.90, 0.85, 0.70), (0.85, 0.65, 0.15)),
    ((0.75, 0.15, 0.20), PAPER, (0.90, 0.90, 0.92)),
)


def all_objects() -> dict[str, dict[int, ModelObject]]:
    """Object name -> model id -> model."""
    staplers = {
        i: stapler(0.030 + 0.002 * (i % 4), 0.043 + 0.002 * (i % 3), shell, PAPER if i != 2 else (0.85, 0.70, 0.15))
        for i, shell in enumerate(_SHELLS)
    }
    bottles = {i: bottle(0.030 + 0.001 * (i % 5), 0.236 + 0.004 * (i % 6), *_BOTTLES[(i + 3) % 4]) for i in range(20)}
    return {
        "001_bottle": bottles,
        "019_coaster": {0: coaster(0.066, 0.006, (0.62, 0.42, 0.22), (0.20, 0.13, 0.08))},
        "021_cup": {0: cup(0.0430, 0.0800, (0.16, 0.36, 0.70), (0.95, 0.95, 0.92))},
        "048_stapler": staplers,
        "050_bell": {
            0: bell(0.056, 0.066, (0.93, 0.68, 0.12), (0.80, 0.12, 0.10)),
            1: bell(0.048, 0.053, (0.30, 0.48, 0.66), PAPER),
        },
    }


def model_data(item: ModelObject) -> dict:
    """RoboTwin's ``model_data`` for one model. Everything is in metres, so ``scale`` is 1."""
    center, extents = bounds(item.visual)
    return {
        "center": np.round(center, 6).tolist(),
        "extents": np.round(extents, 6).tolist(),
        "scale": [1.0, 1.0, 1.0],
        "transform_matrix": np.eye(4).tolist(),
        "target_pose": item.target_points,
        "contact_points_pose": item.contact_points,
        "functional_matrix": item.functional_points,
        "orientation_point": item.orientation_point,
        "contact_points_group": [list(range(len(item.contact_points)))] if item.contact_points else [],
        "contact_points_mask": [True] if item.contact_points else [],
        "stable": item.stable,
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def write_objects(root: Path) -> None:
    """Write ``objects`` below the asset root ``root``, with the two indices RoboTwin reads when it is imported."""
    folder = root / "objects"
    for name, models in all_objects().items():
        for part in ("collision", "visual"):
            (folder / name / part).mkdir(parents=True)
        for index, item in models.items():
            _write_json(folder / name / f"model_data{index}.json", model_data(item))
            write_glb(folder / name / "collision" / f"base{index}.glb", item.collision)
            write_glb(folder / name / "visual" / f"base{index}.glb", item.visual)
    (folder / "objaverse").mkdir()
    empty: dict[str, object] = {"item_names": [], "list_of_items": {}, "radius": {}, "z_max": {}, "z_offset": {}}
    _write_json(folder / "objaverse" / "list.json", empty)
    _write_json(folder / "same.json", {})
