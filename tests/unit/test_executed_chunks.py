"""What was executed, on disk: chunks come back, damage is named, and the names of bodies tell their roles."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from drawn_scene import FINGER, OBJECT, TABLE, truth
from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.executed import ExecutedChunk, load_executed, roles_by_name, save_executed


def test_roles_follow_the_names() -> None:
    names = [
        "table",
        "footprint",
        "fl_link2",
        "fl_link7",
        "left_camera",
        "hand",
        "left_finger",
        "link3",
        "021_cup",
        "box",
    ]
    roles = ("scenery", "robot", "robot", "gripper", "robot", "gripper", "gripper", "robot", "object", "object")
    assert roles_by_name(names) == roles


def test_executed_chunks_come_back_and_damage_is_named(tmp_path: Path) -> None:
    chunk = truth()[0]
    save_executed(tmp_path / "a.safetensors", chunk)
    again = load_executed(tmp_path / "a.safetensors")
    for field in dataclasses.fields(ExecutedChunk):
        before, after = getattr(chunk, field.name), getattr(again, field.name)
        assert np.array_equal(before, after) if isinstance(before, np.ndarray) else before == after, field.name
    assert again.first_contact(OBJECT, [FINGER]) == 6 and again.first_contact(OBJECT, [TABLE]) is None
    blob = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(blob[: len(blob) // 2])
    with pytest.raises(DatasetError, match=r"b\.safetensors"):
        load_executed(tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="success_T"):
        save_executed(tmp_path / "c.safetensors", dataclasses.replace(chunk, success_T=np.zeros(3, bool)))
    assert not (tmp_path / "c.safetensors").exists()
