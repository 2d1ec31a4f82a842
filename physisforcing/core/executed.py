"""What truly happened while a chunk of actions was executed: poses, contacts, camera, first depth; one safetensors file a chunk."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DatasetError, UserError
from .ground_truth import METRES_PER_COUNT, GroundTruth, encode_maps

SCHEMA = "physisforcing.executed/1"
#: What a body is: what the scene stands on, a link of the robot, a link of one of its hands, or something of the task.
ROLES = ("scenery", "robot", "gripper", "object")
#: RoboTwin's names of what a scene stands on, and the links of the embodiments that the asset pack has.
_SCENERY = ("ground", "wall", "table")
_GRIPPER = re.compile(r"(f[lr]_link[678]|(panda_)?(hand|(left|right)_?finger))$")
_ROBOT = re.compile(
    r"((f[lr]_)?(base_)?link\d*|panda_link\d+|(left|right|head|front|hand)_?camera.*|camera|footprint)$"
)

_ARRAYS: dict[str, tuple[str, int]] = {
    "poses_TK7": ("float32", 3),
    "body_ids_K": ("uint16", 1),
    "contact_step_M": ("int32", 1),
    "contact_pair_M2": ("uint16", 2),
    "contact_impulse_M": ("float32", 1),
    "intrinsics_33": ("float64", 2),
    "world_to_camera_44": ("float64", 2),
    "depth_HW": ("float32", 2),
    "body_HW": ("uint16", 2),
    "success_T": ("bool", 1),
}


@dataclass(slots=True, kw_only=True)
class ExecutedChunk:
    """T - 1 executed control steps, K rigid bodies, M contacts, one camera that stands still.

    Row 0 is the moment of planning, row k the moment after k executed actions (k * ``DT`` seconds in the nominal time base).
    ``poses_TK7``: xyz metres and wxyz in the world. ``contact_*``: (row, the two body ids, impulse in N*s) of pairs that touched during
    the step that ends at that row. ``depth_HW``: metres along the optical axis at row 0, 0 where nothing was hit; ``body_HW``: body ids
    there, 0 background. ``success_T``: whether the task's check had succeeded by that row. ``start_step``: control steps of the episode
    before row 0. ``roles_K``: one of ``ROLES`` a body; left empty, they follow from the names (``roles_by_name``).
    """

    poses_TK7: NDArray[np.float32]
    body_ids_K: NDArray[np.uint16]
    body_names: dict[int, str]
    contact_step_M: NDArray[np.int32]
    contact_pair_M2: NDArray[np.uint16]
    contact_impulse_M: NDArray[np.float32]
    intrinsics_33: NDArray[np.float64]
    world_to_camera_44: NDArray[np.float64]
    depth_HW: NDArray[np.float32]
    body_HW: NDArray[np.uint16]
    success_T: NDArray[np.bool_]
    start_step: int
    roles_K: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.roles_K:
            self.roles_K = roles_by_name([self.body_names[int(body)] for body in self.body_ids_K])

    @property
    def steps(self) -> int:
        """Executed control steps."""
        return len(self.poses_TK7) - 1

    def bodies(self, role: str) -> list[int]:
        """Ids of the bodies with this role, in order."""
        assert role in ROLES
        return [int(body) for body, own in zip(self.body_ids_K, self.roles_K, strict=True) if own == role]

    def first_contact(self, body: int, others: Sequence[int]) -> int | None:
        """First row at which ``body`` had touched one of ``others``, or None."""
        pair_M2 = self.contact_pair_M2.astype(np.int64)
        other_M = np.where(pair_M2[:, 0] == body, pair_M2[:, 1], pair_M2[:, 0])
        touched_M = (pair_M2 == body).any(1) & np.isin(other_M, list(others))
        return int(self.contact_step_M[touched_M].min()) if touched_M.any() else None

    def ground_truth(self) -> GroundTruth:
        """The same facts as a stored episode has them, with maps of frame 0; depth is rounded to millimetres."""
        counts_HW = np.rint(self.depth_HW / METRES_PER_COUNT).clip(0, np.iinfo(np.uint16).max).astype(np.uint16)
        depth_png, depth_offsets = encode_maps([counts_HW])
        ids_png, ids_offsets = encode_maps([self.body_HW])
        return GroundTruth(
            body_ids_K=self.body_ids_K,
            body_poses_TK7=self.poses_TK7,
            body_names=dict(self.body_names),
            view_names=("camera",),
            size=(int(self.depth_HW.shape[0]), int(self.depth_HW.shape[1])),
            intrinsics_V33=self.intrinsics_33[None],
            world_to_camera_TV44=np.tile(self.world_to_camera_44, (len(self.poses_TK7), 1, 1, 1)),
            contact_frame_M=self.contact_step_M,
            contact_pair_M2=self.contact_pair_M2,
            contact_impulse_M=self.contact_impulse_M,
            stored_frames_D=np.zeros(1, np.int32),
            depth_png=depth_png,
            depth_offsets=depth_offsets,
            ids_png=ids_png,
            ids_offsets=ids_offsets,
        )


def roles_by_name(names: Sequence[str]) -> tuple[str, ...]:
    """Roles of bodies from RoboTwin's names and those of the pack's two robots; every other name is an object of the task.

    >>> roles_by_name(["table", "fl_link2", "fl_link8", "050_bell"])
    ('scenery', 'robot', 'gripper', 'object')
    """

    def role(name: str) -> str:
        if name in _SCENERY:
            return "scenery"
        if _GRIPPER.match(name):
            return "gripper"
        return "robot" if _ROBOT.match(name) else "object"

    return tuple(map(role, names))


def save_executed(path: Path | str, chunk: ExecutedChunk) -> None:
    """Write aside, then rename. ``UserError`` names what is inconsistent."""
    from safetensors.numpy import save_file

    problem = _problem(chunk)
    if problem:
        raise UserError("executed chunk", got=problem, wanted="consistent shapes and values", fix="check the recorder")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {
        "schema": SCHEMA,
        "body_names": {str(k): v for k, v in sorted(chunk.body_names.items())},
        "start_step": int(chunk.start_step),
        "roles": list(chunk.roles_K),
    }
    arrays = {name: np.ascontiguousarray(getattr(chunk, name)) for name in _ARRAYS}
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    save_file(arrays, aside, metadata={"executed": json.dumps(header, sort_keys=True)})
    os.replace(aside, path)


def load_executed(path: Path | str) -> ExecutedChunk:
    """Read and check a chunk. ``DatasetError`` names a missing or damaged file."""
    from safetensors import SafetensorError, safe_open

    path, fix = Path(path), "execute this episode again"
    if not path.is_file():
        raise DatasetError("executed chunk", got=str(path), wanted="an existing file", fix=fix)
    try:
        with safe_open(path, framework="numpy") as file:
            header: Any = json.loads((file.metadata() or {}).get("executed", "null"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if header["schema"] != SCHEMA or set(arrays) != set(_ARRAYS):
            raise ValueError(f"schema {header['schema']!r}, arrays {sorted(set(arrays) ^ set(_ARRAYS))} differ")
        names = {int(k): str(v) for k, v in header["body_names"].items()}
        roles, start = tuple(map(str, header["roles"])), int(header["start_step"])
        chunk = ExecutedChunk(**arrays, body_names=names, start_step=start, roles_K=roles)
        problem = _problem(chunk)
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise DatasetError("executed chunk", got=f"{path}: {problem}", wanted=f"schema {SCHEMA}", fix=fix)
    return chunk


def _problem(chunk: ExecutedChunk) -> str | None:
    """What is inconsistent, or None. Everything that indexing later relies on is checked here."""
    for name, (dtype, rank) in _ARRAYS.items():
        array = getattr(chunk, name)
        if array.dtype != np.dtype(dtype) or array.ndim != rank:
            return f"{name} is {array.dtype}{list(array.shape)}, not {dtype} of rank {rank}"
    rows, bodies, contacts = len(chunk.poses_TK7), len(chunk.body_ids_K), len(chunk.contact_step_M)
    shapes = {
        "poses_TK7": (rows, bodies, 7),
        "contact_pair_M2": (contacts, 2),
        "contact_impulse_M": (contacts,),
        "intrinsics_33": (3, 3),
        "world_to_camera_44": (4, 4),
        "body_HW": chunk.depth_HW.shape,
        "success_T": (rows,),
    }
    for name, shape in shapes.items():
        if getattr(chunk, name).shape != shape:
            return f"{name} has shape {list(getattr(chunk, name).shape)}, not {list(shape)}"
    if rows == 0 or min(chunk.depth_HW.shape) == 0 or chunk.start_step < 0:
        return f"{rows} rows, picture {list(chunk.depth_HW.shape)}, start step {chunk.start_step}"
    if len(np.unique(chunk.body_ids_K)) != bodies or not {int(b) for b in chunk.body_ids_K} <= set(chunk.body_names):
        return "body_ids_K repeats an id or has one without a name"
    if len(chunk.roles_K) != bodies or not set(chunk.roles_K) <= set(ROLES):
        return f"roles {sorted(set(chunk.roles_K))} for {bodies} bodies"
    for name in ("poses_TK7", "intrinsics_33", "world_to_camera_44", "contact_impulse_M", "depth_HW"):
        if not np.isfinite(getattr(chunk, name)).all():
            return f"{name} is not finite"
    if not ((chunk.contact_step_M >= 0) & (chunk.contact_step_M < rows)).all():
        return f"contact_step_M outside 0 to {rows - 1}"
    return None
