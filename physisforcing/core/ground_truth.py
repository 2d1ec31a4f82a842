"""Exact ground truth of one episode, stored beside the dataset: poses, cameras, contacts, depth and body ids.

One safetensors file an episode, ``ground_truth/chunk-000/episode_000000.safetensors``. Depth and body ids are 16-bit
PNGs (lossless) of the stored frames only; everything else is there for every frame.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import DatasetError, UserError
from .lerobot_format import GROUND_TRUTH_PATH, place

SCHEMA = "physisforcing.ground_truth/1"
#: Depth unit: metres per count of the uint16 maps. Count 0 means that nothing was hit.
METRES_PER_COUNT = 1e-3
#: Depth and body ids are stored for frames 0, 8, 16, ... unless every frame was asked for.
STORED_STRIDE = 8
_MAX_SIDE = 8192

_ARRAYS: dict[str, tuple[str, int]] = {
    "body_ids_K": ("uint16", 1),
    "body_poses_TK7": ("float32", 3),
    "intrinsics_V33": ("float64", 3),
    "world_to_camera_TV44": ("float64", 4),
    "contact_frame_M": ("int32", 1),
    "contact_pair_M2": ("uint16", 2),
    "contact_impulse_M": ("float32", 1),
    "stored_frames_D": ("int32", 1),
    "depth_png": ("uint8", 1),
    "depth_offsets": ("int64", 1),
    "ids_png": ("uint8", 1),
    "ids_offsets": ("int64", 1),
}


@dataclass(slots=True, kw_only=True)
class GroundTruth:
    """What the simulator knows about an episode of T frames, K rigid bodies, V views, M contacts, D stored frames.

    ``body_poses_TK7``: world position (metres) and quaternion wxyz of each rigid body (actors and robot links).
    ``intrinsics_V33``: pixels, integers at pixel centres. ``world_to_camera_TV44``: OpenCV axes (x right, y down, z
    forward). ``contact_*``: frame, the two body ids, impulse in N*s. ``depth_png`` and ``ids_png``: concatenated 16-bit
    PNGs, image ``d * V + v`` (stored frame d, view v) occupies bytes ``offsets[i]:offsets[i + 1]``; ``encode_maps``
    builds them. Depth is the distance along the optical axis in mm, 0 where nothing was hit; body id 0 is background.
    An id in the maps that ``body_ids_K`` lacks stands still.
    """

    body_ids_K: NDArray[np.uint16]
    body_poses_TK7: NDArray[np.float32]
    body_names: dict[int, str]
    view_names: tuple[str, ...]
    size: tuple[int, int]
    intrinsics_V33: NDArray[np.float64]
    world_to_camera_TV44: NDArray[np.float64]
    contact_frame_M: NDArray[np.int32]
    contact_pair_M2: NDArray[np.uint16]
    contact_impulse_M: NDArray[np.float32]
    stored_frames_D: NDArray[np.int32]
    depth_png: NDArray[np.uint8]
    depth_offsets: NDArray[np.int64]
    ids_png: NDArray[np.uint8]
    ids_offsets: NDArray[np.int64]
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def num_frames(self) -> int:
        return len(self.body_poses_TK7)

    def has_maps(self, frame: int) -> bool:
        """Whether depth and body ids of this frame are stored."""
        return bool(np.any(self.stored_frames_D == frame))

    def nearest_stored(self, frame: int) -> int:
        """The stored frame nearest to ``frame`` (the earlier one of two at equal distance)."""
        return int(self.stored_frames_D[np.argmin(np.abs(self.stored_frames_D.astype(np.int64) - frame))])

    def depth(self, frame: int, view: int = 0) -> NDArray[np.uint16]:
        """Depth [H,W] in mm of a stored frame. Raises ``UserError`` for a frame that is not stored."""
        return self._decode(self.depth_png, self.depth_offsets, frame, view)

    def body_id_map(self, frame: int, view: int = 0) -> NDArray[np.uint16]:
        """Body ids [H,W] of a stored frame. Raises ``UserError`` for a frame that is not stored."""
        return self._decode(self.ids_png, self.ids_offsets, frame, view)

    def _decode(self, blob: NDArray[np.uint8], offsets: NDArray[np.int64], frame: int, view: int) -> NDArray[np.uint16]:
        found = np.flatnonzero(self.stored_frames_D == frame)
        if len(found) == 0:
            some = ", ".join(map(str, self.stored_frames_D[:4]))
            fix = "start the window on a stored frame, or collect with ground_truth=full"
            raise UserError(
                "frame",
                got=frame if some else f"{frame} of an episode that has poses only",
                wanted=f"a frame with stored depth ({some + ', ...' if some else 'none here'})",
                fix=fix if some else "collect with ground_truth=sparse or full",
            )
        if not 0 <= view < len(self.view_names):
            raise UserError("view", got=view, wanted=f"0 to {len(self.view_names) - 1}", fix="see view_names")
        index = int(found[0]) * len(self.view_names) + view
        return _decode_png16(blob[offsets[index] : offsets[index + 1]].tobytes(), self.size)


def encode_maps(maps: Sequence[NDArray[np.uint16]]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """uint16 pictures [H,W], frame-major (all views of the first stored frame first) -> PNG bytes and their offsets."""
    blobs = [_encode_png16(picture) for picture in maps]
    offsets = np.concatenate([[0], np.cumsum([len(b) for b in blobs])]).astype(np.int64)
    return np.frombuffer(b"".join(blobs), dtype=np.uint8), offsets


def episode_path(root: Path | str, episode: int) -> Path:
    """Where an episode's ground truth lies inside a dataset."""
    return Path(root) / GROUND_TRUTH_PATH.format(**place(episode))


def save(path: Path | str, truth: GroundTruth) -> None:
    """Write aside, then rename: a killed writer never leaves half a file."""
    from safetensors.numpy import save_file

    problem = _problem(truth)
    if problem:
        raise UserError("ground truth", got=problem, wanted="consistent shapes and values", fix="check the recorder")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {
        "schema": SCHEMA,
        "body_names": {str(k): v for k, v in sorted(truth.body_names.items())},
        "view_names": list(truth.view_names),
        "size": list(truth.size),
        "extra": dict(sorted(truth.extra.items())),
    }
    arrays = {name: np.ascontiguousarray(getattr(truth, name), dtype=dtype) for name, (dtype, _) in _ARRAYS.items()}
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    # One metadata key: safetensors does not keep the order of several, and equal truths should give equal bytes.
    save_file(arrays, aside, metadata={"ground_truth": json.dumps(header, sort_keys=True)})
    os.replace(aside, path)


def load(path: Path | str, *, frames: int | None = None) -> GroundTruth:
    """Read and check an episode's ground truth. Raises ``DatasetError`` naming a missing or damaged file, or one of another number of
    frames than its episode's ``frames``."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    fix = "collect this episode again (physis data collect resumes)"
    if not path.is_file():
        raise DatasetError("ground truth", got=str(path), wanted="an existing file", fix=fix)
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("ground_truth", "null"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError, OSError) as error:
        raise DatasetError("ground truth", got=f"{path}: {error}", wanted="a whole file", fix=fix) from error
    try:
        truth = _from_parts(header, arrays)
        problem = _problem(truth)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise DatasetError("ground truth", got=f"{path}: {problem}", wanted=f"schema {SCHEMA}", fix=fix)
    if frames is not None and truth.num_frames != frames:
        wanted = f"the {frames} frames of its episode"
        raise DatasetError(str(path), got=f"{truth.num_frames} frames", wanted=wanted, fix="collect it again")
    return truth


def _from_parts(header: dict, arrays: dict[str, np.ndarray]) -> GroundTruth:
    if header["schema"] != SCHEMA:
        raise ValueError(f"schema {header['schema']!r}")
    if set(arrays) != set(_ARRAYS):
        raise ValueError(f"arrays {sorted(set(arrays) ^ set(_ARRAYS))} missing or unknown")
    return GroundTruth(
        body_names={int(k): str(v) for k, v in header["body_names"].items()},
        view_names=tuple(str(v) for v in header["view_names"]),
        size=(int(header["size"][0]), int(header["size"][1])),
        extra={str(k): str(v) for k, v in header["extra"].items()},
        **arrays,
    )


def _problem(truth: GroundTruth) -> str | None:
    """What is inconsistent, or None. Everything that indexing later relies on is checked here."""
    for name, (dtype, rank) in _ARRAYS.items():
        array = getattr(truth, name)
        if array.dtype != np.dtype(dtype) or array.ndim != rank:
            return f"{name} is {array.dtype}{list(array.shape)}, not {dtype} of rank {rank}"
    frames, bodies, views = truth.num_frames, len(truth.body_ids_K), len(truth.view_names)
    contacts, stored = len(truth.contact_frame_M), len(truth.stored_frames_D)
    shapes = {
        "body_poses_TK7": (frames, bodies, 7),
        "intrinsics_V33": (views, 3, 3),
        "world_to_camera_TV44": (frames, views, 4, 4),
        "contact_pair_M2": (contacts, 2),
        "contact_impulse_M": (contacts,),
        "depth_offsets": (stored * views + 1,),
        "ids_offsets": (stored * views + 1,),
    }
    for name, shape in shapes.items():
        if getattr(truth, name).shape != shape:
            return f"{name} has shape {list(getattr(truth, name).shape)}, not {list(shape)}"
    if frames == 0 or views == 0 or not all(0 < side <= _MAX_SIDE for side in truth.size):
        return f"{frames} frames, {views} views, size {truth.size}"
    if len(np.unique(truth.body_ids_K)) != bodies:
        return "body_ids_K repeats an id"
    for name in ("body_poses_TK7", "intrinsics_V33", "world_to_camera_TV44", "contact_impulse_M"):
        if not np.isfinite(getattr(truth, name)).all():
            return f"{name} is not finite"
    for name, last in (("contact_frame_M", frames), ("stored_frames_D", frames)):
        values = getattr(truth, name)
        if len(values) and (values.min() < 0 or values.max() >= last or (np.diff(values) < 0).any()):
            return f"{name} is not an ascending list of frames below {last}"
    if stored and (np.diff(truth.stored_frames_D) == 0).any():
        return "stored_frames_D repeats a frame"
    for kind in ("depth", "ids"):
        offsets, blob = getattr(truth, f"{kind}_offsets"), getattr(truth, f"{kind}_png")
        if offsets[0] != 0 or offsets[-1] != len(blob) or (np.diff(offsets) < 0).any():
            return f"{kind}_offsets do not partition {len(blob)} bytes"
    return None


def _encode_png16(picture: NDArray[np.uint16]) -> bytes:
    from PIL import Image

    if picture.dtype != np.uint16 or picture.ndim != 2:
        raise UserError(
            "map", got=f"{picture.dtype}{list(picture.shape)}", wanted="uint16 [H,W]", fix="convert to uint16"
        )
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(out, format="PNG", compress_level=4)
    return out.getvalue()


def _decode_png16(blob: bytes, size: tuple[int, int]) -> NDArray[np.uint16]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(blob), formats=["PNG"]) as picture:
            # The header is compared before any pixel is inflated, so a crafted size cannot eat the memory.
            if picture.size != (size[1], size[0]) or not picture.mode.startswith("I"):
                raise ValueError(f"{picture.mode} {picture.size[1]}x{picture.size[0]}")
            decoded = np.asarray(picture)
    except (UnidentifiedImageError, ValueError, OSError, SyntaxError) as error:
        raise DatasetError(
            "ground truth map",
            got=str(error),
            wanted=f"a 16-bit PNG of {size[0]}x{size[1]}",
            fix="collect this episode again",
        ) from error
    return decoded.astype(np.uint16)
