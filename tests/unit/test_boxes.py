"""Boxes round grippers and objects from body ids."""

from types import SimpleNamespace

import numpy as np

from physisforcing.worldmodel.data.boxes import box_mask, gripper_and_object_boxes


def test_boxes_cover_grippers_and_objects_only():
    ids = np.zeros((240, 320), np.uint16)
    ids[40:60, 100:120] = 7  # finger
    ids[50:70, 110:140] = 8  # the other finger of the same arm: one box
    ids[0:30, 300:320] = 35  # object at the border
    ids[200:203, 10:13] = 36  # too small
    ids[100:200, :] = 6  # table
    ids[80:90, 100:110] = 9  # forearm
    names = {6: "table", 7: "fl_link7", 8: "fl_link8", 9: "fl_link3", 15: "left_camera", 35: "050_bell", 36: "block"}
    truth = SimpleNamespace(body_id_map=lambda frame: ids, body_names=names)
    boxes = gripper_and_object_boxes(truth, 0)
    assert sorted(map(tuple, boxes.tolist())) == [(0, 19, 146, 160), (16, 39, 46, 74)]
    mask = box_mask(boxes, (120, 160))
    assert mask.sum() == 19 * 14 + 23 * 28 and mask[16, 46] and not mask[15, 46]
