"""WorldArena's two layouts of image-action pairs for training a policy, written and read.

``worldarena_chunks``: what the released data engine writes, ``<task>/.../first_frames/episode{i}_chunk{start:06d}.png`` and
``<task>/.../video/...json``; its rows start with the pose already reached at the picture, and its ``i`` is a list index
(``core.worldarena.list_numbers``). ``worldarena_track2``: the challenge's ``<task>/episode_{i}/{label,image}/frame_{k}``; 40 rows a picture.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError, unknown_name
from physisforcing.core.files import replace_text
from physisforcing.core.lerobot_format import write_json
from physisforcing.core.worldarena import SIDECAR, SIDECAR_SCHEMA, demo_folder, list_numbers, read_sidecar

from .worldarena_layouts import RECORDED, enlarged, read_png, refuse_filled, write_png

LAYOUTS = ("worldarena_chunks", "worldarena_track2")
#: Rows of actions a picture, and what the first row is: ``pose``: the drive targets at the picture, ``next``: those of the next step.
ROWS = {"worldarena_chunks": 45, "worldarena_track2": 40}
FIRST_ROW = {"worldarena_chunks": "pose", "worldarena_track2": "next"}
NUMBERINGS = ("number", "list_index")


@dataclass(slots=True, kw_only=True)
class Pair:
    """One picture with the actions from it on.

    ``picture_HW3`` uint8; ``state_A``: drive targets at the picture; ``actions_PA``: rows as ``FIRST_ROW`` of the layout says; float32.
    ``label``: who made picture and actions, as it is written into the picture's metadata.
    """

    task: str
    number: int
    start: int
    picture_HW3: NDArray[np.uint8]
    instruction: str
    state_A: NDArray[np.float32]
    actions_PA: NDArray[np.float32]
    label: str = RECORDED


def rows_from(layout: str, joints_NA: NDArray[np.float32], start: int, rows: int) -> NDArray[np.float32]:
    """[rows,A] of a pair at control step ``start`` of drive targets ``joints_NA``; past the end the last row repeats."""
    first = start + (0 if FIRST_ROW[layout] == "pose" else 1)
    return joints_NA[np.minimum(np.arange(first, first + rows), len(joints_NA) - 1)]


class PairWriter:
    """Writes pairs in one of the layouts below ``root``, which is empty or not there.

    ``numbering`` (chunks only): names hold the episode's ``number``, or, as theirs, its ``list_index`` among ``episodes`` (task -> numbers
    in the order of the list). ``name``: of the model, for Track 2's folder ``<name>_eval_track2_data_engine``.
    """

    def __init__(
        self,
        root: str | Path,
        layout: str,
        *,
        rows: int = 0,
        numbering: str = "number",
        episodes: Mapping[str, Sequence[int]] | None = None,
        name: str = "model",
    ) -> None:
        if layout not in LAYOUTS:
            raise unknown_name("layout", layout, LAYOUTS, see="physis data export --help")
        if numbering not in NUMBERINGS:
            raise unknown_name("numbering", numbering, NUMBERINGS, see="physis data export --help")
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError("name", got=name, wanted="letters, digits, '_', '-' and '.'", fix="name=my_model")
        self.layout, self.rows, self.numbering, self.name = layout, rows or ROWS[layout], numbering, name
        self.episodes = {task: list(numbers) for task, numbers in (episodes or {}).items()}
        refuse_filled(Path(root))
        self.root = Path(root) / f"{name}_eval_track2_data_engine" if layout == "worldarena_track2" else Path(root)
        self._written: list[dict[str, Any]] = []

    def add(self, pair: Pair) -> None:
        """Write one picture with its actions. ``UserError`` for other numbers of rows or joints."""
        actions, state = np.asarray(pair.actions_PA, np.float32), np.asarray(pair.state_A, np.float32)
        if actions.shape != (self.rows, 14) or state.shape != (14,) or not np.isfinite(actions).all():
            got, wanted = f"{list(actions.shape)} and state {list(state.shape)}", f"finite [{self.rows},14] and [14]"
            raise UserError("actions", got=got, wanted=wanted, fix=f"rows={len(actions)}, or imagine further")
        (self._add_chunk if self.layout == "worldarena_chunks" else self._add_frame)(pair, actions, state)
        told = {"task": pair.task, "number": pair.number, "start": pair.start, "label": pair.label}
        self._written.append(told | {"generated": pair.label != RECORDED})

    def _add_chunk(self, pair: Pair, actions_PA: NDArray[np.float32], state_A: NDArray[np.float32]) -> None:
        place = pair.number
        if self.numbering == "list_index":
            place = self.episodes[pair.task].index(pair.number)
        folder, name = demo_folder(self.root, pair.task), f"episode{place}_chunk{pair.start:06d}"
        image = folder / "first_frames" / f"{name}.png"
        write_png(image, enlarged(pair.picture_HW3[None])[0], pair.label)
        content = {
            "instruction": pair.instruction,
            "actions": actions_PA.tolist(),
            "states": state_A.tolist(),
            "first_frame": str(image.resolve()),
            "label": pair.label,
        }
        replace_text(folder / "video" / f"{name}.json", json.dumps(content) + "\n")

    def _add_frame(self, pair: Pair, actions_PA: NDArray[np.float32], state_A: NDArray[np.float32]) -> None:
        folder = self.root / pair.task / f"episode_{pair.number}"
        image = f"image/frame_{pair.start}.png"
        write_png(folder / image, enlarged(pair.picture_HW3[None])[0], pair.label)
        content = {
            "image_path": image,
            "actions": actions_PA.tolist(),
            "state": state_A.tolist(),
            "instruction": pair.instruction,
            "label": pair.label,
        }
        replace_text(folder / "label" / f"frame_{pair.start}.json", json.dumps(content) + "\n")

    def finalize(self, about: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Write what the folder holds (and Track 2's ``model_README.md`` from ``about``); ``UserError`` without pairs."""
        if not self._written:
            raise UserError("episodes", got="none", wanted="at least one picture", fix="check tasks= and the dataset")
        content = {
            "schema": SIDECAR_SCHEMA,
            "layout": self.layout,
            "rows": self.rows,
            "first_row": FIRST_ROW[self.layout],
            "numbering": self.numbering,
            "lists": self.episodes if self.numbering == "list_index" else {},
            "pairs": self._written,
        }
        if self.layout == "worldarena_track2":
            facts = {"Model Name": self.name, "Action Space": "joint14"} | dict(about or {})
            lines = ["# Model README", *(f"\n## {head}\n\n`{text}`" for head, text in facts.items())]
            replace_text(self.root / "model_README.md", "\n".join(lines) + "\n")
        write_json(self.root / SIDECAR, content)
        return content


# ------------------------------------------------------------------------------------------------------------------ readers


def read_chunks(root: str | Path, metadata: Sequence[Mapping[str, Any]] | None = None, below: int = 25) -> list[Pair]:
    """Pairs of a ``worldarena_chunks`` folder, in the order of task, episode number and start.

    Names of folders that we did not write hold list indices: ``metadata`` is the ``robotwin_metadata.json`` that they were made from, and
    ``below`` the limit of episode numbers there. ``UserError`` where neither says which episode a file belongs to.
    """
    root = Path(root)
    told = read_sidecar(root)
    found = []
    for folder in sorted(root.glob("*/*/*/video")):
        task = folder.parts[-4]
        for path in folder.glob("episode*_chunk*.json"):
            match = re.fullmatch(r"episode(\d+)_chunk(\d{6})", path.stem)
            if match:
                number = _number(int(match[1]), task, told, metadata, below)
                found.append(_read_chunk(path, task, number, int(match[2])))
    if not found:
        wanted = "<task>/*/*/video/episode0_chunk000000.json"
        raise UserError(str(root), got="no chunks", wanted=wanted, fix="correct the path")
    return sorted(found, key=lambda pair: (pair.task, pair.number, pair.start))


def _number(
    place: int, task: str, told: Mapping[str, Any], metadata: Sequence[Mapping[str, Any]] | None, below: int
) -> int:
    if told.get("numbering") == "number":
        return place
    numbers = told.get("lists", {}).get(task)
    if numbers is None and metadata is not None:
        numbers = list_numbers(metadata, task, below)
    if numbers is None:
        fix = "give metadata= of the dataset that they were made from"
        raise UserError("names", got="list indices without their list", wanted="the order of episodes", fix=fix)
    if place >= len(numbers):
        got = f"episode{place} of a list of {len(numbers)}"
        raise UserError(
            "names", got=got, wanted="an index of the list", fix="give the metadata= that belongs to the files"
        )
    return int(numbers[place])


def _read_chunk(path: Path, task: str, number: int, start: int) -> Pair:
    content = _read_json(path, {"instruction": str, "actions": list, "states": list})
    picture, label = read_png(path.parent.parent / "first_frames" / f"{path.stem}.png")
    return _pair(path, task, number, start, picture, content, content["states"], label)


def read_track2(root: str | Path) -> list[Pair]:
    """Pairs of a ``worldarena_track2`` folder (the one with ``model_README.md``), in the order of task, episode and frame."""
    root, found = Path(root), []
    for path in root.glob("*/episode_*/label/frame_*.json"):
        episode, frame = re.fullmatch(r"episode_(\d+)", path.parts[-3]), re.fullmatch(r"frame_(\d+)", path.stem)
        if episode is None or frame is None:
            continue
        content = _read_json(path, {"image_path": str, "instruction": str, "actions": list, "state": list})
        # By its place and not by image_path: that comes with the folder and may name any file of this machine.
        picture, label = read_png(path.parent.parent / "image" / f"{path.stem}.png")
        about = (path.parts[-4], int(episode[1]), int(frame[1]))
        found.append(_pair(path, *about, picture, content, content["state"], label))
    if not found:
        wanted = "<task>/episode_0/label/frame_0.json"
        raise UserError(str(root), got="no labels", wanted=wanted, fix="give the folder that holds model_README.md")
    return sorted(found, key=lambda pair: (pair.task, pair.number, pair.start))


def _pair(
    path: Path,
    task: str,
    number: int,
    start: int,
    picture: NDArray[np.uint8],
    content: Mapping[str, Any],
    state: Any,
    label: str,
) -> Pair:
    try:
        actions, now = np.asarray(content["actions"], np.float32), np.asarray(state, np.float32)
    except (ValueError, TypeError) as error:
        raise _wrong(path, str(error)) from error
    if actions.ndim != 2 or actions.shape[1] != 14 or now.shape != (14,) or not np.isfinite(actions).all():
        raise _wrong(path, f"actions {list(actions.shape)}, state {list(now.shape)}")
    return Pair(
        task=task,
        number=number,
        start=start,
        picture_HW3=picture,
        instruction=content["instruction"],
        state_A=now,
        actions_PA=actions,
        label=label or str(content.get("label", "")),
    )


def _read_json(path: Path, keys: Mapping[str, type]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _wrong(path, str(error)) from error
    if not isinstance(content, dict) or any(not isinstance(content.get(name), kind) for name, kind in keys.items()):
        raise _wrong(path, str(content))
    return content


def _wrong(path: Path, got: str) -> UserError:
    wanted = "an instruction, a state of 14 numbers and actions [P,14]"
    return UserError(str(path), got=got[:120], wanted=wanted, fix="write the folder again, or leave the file out")
