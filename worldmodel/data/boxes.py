"""Boxes round grippers and objects in the head camera's picture, from the simulator's body ids."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.ground_truth import GroundTruth

#: Gripper links of both arms (the wrist and the two fingers), and bodies that are scenery.
GRIPPER = re.compile(r"f[lr]_link[678]$")
SCENERY = re.compile(r"(ground|wall|table|footprint|.*camera|f[lr]_.*)$")
#: Visible bodies of fewer pixels than this give no box.
MIN_PIXELS = 12


def gripper_and_object_boxes(truth: GroundTruth, frame: int, *, margin: int = 4) -> NDArray[np.int64]:
    """Boxes (top, bottom, left, right), half open, int64 [N,4], in pixels of the picture halved (120x160).

    ``frame``: one with stored body ids. Each arm's gripper is one box, each object another; ``margin`` pixels are added on every
    side and the box is cut at the border.
    """
    ids = truth.body_id_map(frame)
    groups: dict[str, NDArray[np.bool_]] = {}
    for body, name in truth.body_names.items():
        if GRIPPER.fullmatch(name):
            key = name[:2]
        elif not SCENERY.fullmatch(name):
            key = f"object {body}"
        else:
            continue
        groups[key] = groups.get(key, np.zeros(ids.shape, bool)) | (ids == body)
    height, width = ids.shape[0] // 2, ids.shape[1] // 2
    boxes = []
    for mask in groups.values():
        if mask.sum() < MIN_PIXELS:
            continue
        rows, columns = np.flatnonzero(mask.any(1)) // 2, np.flatnonzero(mask.any(0)) // 2
        top, left = max(0, rows[0] - margin), max(0, columns[0] - margin)
        boxes.append((top, min(height, rows[-1] + 1 + margin), left, min(width, columns[-1] + 1 + margin)))
    return np.array(boxes, dtype=np.int64).reshape(-1, 4)


def box_mask(boxes_N4: NDArray[np.int64], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The union of boxes as a mask [H,W]."""
    mask = np.zeros(size, bool)
    for top, bottom, left, right in boxes_N4:
        mask[top:bottom, left:right] = True
    return mask
