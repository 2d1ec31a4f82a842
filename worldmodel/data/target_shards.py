"""The files of the target cache: what is computed for a window, where it lies, and whether it is whole.

A shard holds, for W windows of T frames with N points: int16 track coordinates in 1/64 pixel of the recorded picture
(float16 would lose a quarter of a pixel at the right border), packed visibility, the depth in mm under
each query, the rigid body that it lies on, and the encoder's features (float16) of the frames that windows need: frame ``start + stride * 4k``, the
last one of each latent frame. All windows of an episode share these, since starts and latent frames are both 8
control steps apart.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from physisforcing.core import ground_truth
from physisforcing.core.errors import DatasetError, UserError

from ..teachers import ground_truth as tracker

if TYPE_CHECKING:
    from physisforcing.core.lerobot import LeRobotDataset

SCHEMA = "physisforcing.targets/3"
#: Track coordinates are stored in this fraction of a pixel.
SUBPIXELS = 64
#: Pictures of more pixels a side have coordinates that the stored format cannot hold; tracks outside a picture are clipped.
MAX_SIDE = (np.iinfo(np.int16).max + 1) // SUBPIXELS
#: Pixel frames a latent frame.
TEMPORAL_STRIDE = 4


@dataclass(slots=True, kw_only=True)
class TargetRecipe:
    """What targets are computed for. Windows of ``frames`` pictures, ``stride`` control steps apart, start at every
    ``start_stride``-th step, which must be one with stored depth; tracks start from ``grid_rows`` x ``grid_columns``
    points."""

    frames: int = 17
    stride: int = 2
    start_stride: int = ground_truth.STORED_STRIDE
    grid_rows: int = tracker.GRID[0]
    grid_columns: int = tracker.GRID[1]

    def __post_init__(self) -> None:
        if self.frames < 1 + TEMPORAL_STRIDE or (self.frames - 1) % TEMPORAL_STRIDE:
            raise UserError("recipe.frames", got=self.frames, wanted="1 + 4k", fix="use 17")
        for name in ("stride", "start_stride", "grid_rows", "grid_columns"):
            if getattr(self, name) < 1:
                raise UserError(f"recipe.{name}", got=getattr(self, name), wanted="1 or more", fix="raise it")

    @property
    def points(self) -> int:
        return self.grid_rows * self.grid_columns

    def describe(self) -> dict[str, object]:
        """Everything a shard depends on apart from the episode."""
        from ..teachers.frame_encoder import FINGERPRINT

        return {
            "schema": SCHEMA,
            "frames": self.frames,
            "stride": self.stride,
            "start_stride": self.start_stride,
            "grid": [self.grid_rows, self.grid_columns],
            "tracks": f"ground_truth/{tracker.VERSION}",
            "encoder": FINGERPRINT,
        }

    def digest(self) -> str:
        return _sha256(json.dumps(self.describe(), sort_keys=True).encode())[:16]

    def starts(self, length: int) -> NDArray[np.int64]:
        """First control steps of the windows of an episode."""
        return np.arange(0, length, self.start_stride)

    def steps(self, start: int, length: int) -> NDArray[np.int64]:
        """Control steps of a window's pictures; past the end the last one repeats."""
        return np.minimum(start + self.stride * np.arange(self.frames), length - 1)

    def latent_steps(self, start: int, length: int) -> NDArray[np.int64]:
        """Control steps whose pictures the encoder sees: the last one of each latent frame."""
        return self.steps(start, length)[::TEMPORAL_STRIDE]


@dataclass(slots=True, kw_only=True)
class EpisodeTargets:
    """A shard in memory. ``size``: (H, W) of the pixels. ``body_WN``: -1 unknown. ``teacher_EChw``: float16."""

    starts_W: NDArray[np.int32]
    points_WTN2: NDArray[np.int16]
    visible_WTN: NDArray[np.bool_]
    depth_WN: NDArray[np.uint16]
    body_WN: NDArray[np.int32]
    encoded_steps_E: NDArray[np.int32]
    teacher_EChw: NDArray[np.float16]
    size: tuple[int, int]


def shard_path(dataset: LeRobotDataset, episode: int, recipe: TargetRecipe, cache: str | Path | None = None) -> Path:
    """Where an episode's targets are, or will be. Raises ``DatasetError`` when it was recorded without ground truth."""
    return (
        (Path(cache) if cache else dataset.root / "targets")
        / recipe.digest()
        / f"{content_digest(dataset, episode)[:32]}.safetensors"
    )


def write_shard(path: Path, targets: EpisodeTargets, recipe: TargetRecipe, content: str) -> None:
    """Write a shard aside and rename it."""
    from safetensors.numpy import save_file

    arrays: dict[str, np.ndarray] = {
        "starts_W": targets.starts_W,
        "points_WTN2": targets.points_WTN2,
        "visible_WTb": np.packbits(targets.visible_WTN, axis=-1),
        "depth_WN": targets.depth_WN,
        "body_WN": targets.body_WN,
        "encoded_steps_E": targets.encoded_steps_E,
        "teacher_EChw": targets.teacher_EChw,
    }
    header = {
        "recipe": recipe.describe(),
        "content": content,
        "size": list(targets.size),
        "payload_sha256": _payload(arrays),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(arrays, aside, metadata={"targets": json.dumps(header, sort_keys=True)})
    os.replace(aside, path)


def read_shard(
    dataset: LeRobotDataset, episode: int, recipe: TargetRecipe, cache: str | Path | None = None
) -> EpisodeTargets:
    """An episode's targets. Raises ``DatasetError`` when they are missing, damaged, or those of something else."""
    from safetensors import SafetensorError, safe_open

    path = shard_path(dataset, episode, recipe, cache)
    fix = f"delete it and run physis data targets data=[{dataset.root}]" + (f" cache={cache}" if cache else "")
    if not path.is_file():
        raise DatasetError(
            f"targets of episode {episode}", got="none", wanted=str(path), fix=fix.removeprefix("delete it and ")
        )
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})["targets"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if header["recipe"] != recipe.describe() or header["content"] != content_digest(dataset, episode):
            raise ValueError("computed from something else")
        if header["payload_sha256"] != _payload(arrays):
            raise ValueError("its arrays do not match its checksum")
        targets = EpisodeTargets(
            visible_WTN=np.unpackbits(arrays.pop("visible_WTb"), axis=-1, count=recipe.points).astype(bool),
            size=(int(header["size"][0]), int(header["size"][1])),
            **arrays,
        )
        _check(targets, recipe)
    except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
        raise DatasetError(
            f"targets of episode {episode}", got=f"{path}: {error}", wanted="a whole shard", fix=fix
        ) from error
    return targets


def _check(targets: EpisodeTargets, recipe: TargetRecipe) -> None:
    windows, frames, points = len(targets.starts_W), recipe.frames, recipe.points
    expected = {
        "points_WTN2": (windows, frames, points, 2),
        "visible_WTN": (windows, frames, points),
        "depth_WN": (windows, points),
        "body_WN": (windows, points),
    }
    for name, shape in expected.items():
        if getattr(targets, name).shape != shape:
            raise ValueError(f"{name} has shape {list(getattr(targets, name).shape)}, not {list(shape)}")
    if targets.teacher_EChw.ndim != 4 or len(targets.teacher_EChw) != len(targets.encoded_steps_E):
        raise ValueError(f"teacher_EChw has shape {list(targets.teacher_EChw.shape)}")


def content_digest(dataset: LeRobotDataset, episode: int) -> str:
    """Digest of what targets depend on: the recorded episode and its ground truth."""
    path = dataset.ground_truth_path(episode)
    if path is None:
        raise DatasetError(
            f"ground truth of episode {episode}",
            got="none",
            wanted=str(ground_truth.episode_path(dataset.root, episode)),
            fix="collect with ground truth (physis data collect), or train without physics losses",
        )
    state = path.stat()
    truth = _file_digest(path, state.st_mtime_ns, state.st_size)
    return _sha256(f"{dataset.content_hash(episode)} {truth}".encode())


@functools.lru_cache(maxsize=1 << 16)
def _file_digest(path: Path, _modified: int, _size: int) -> str:
    return _sha256(path.read_bytes())


def _payload(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
