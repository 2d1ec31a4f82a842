"""What the readers of HDF5 demonstrations share: files read with care, JPEG columns with the right colours.

Camera pictures are stored as JPEG files, padded with zeros to one length. Older recorders handed RGB arrays to an encoder
that expects BGR: a standard decoder then sees red and blue exchanged. Newer ones write standard JPEG files and mark them
with a comment ``XPL-RGB1``. Both come back as RGB here.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .digests import file_sha256
from .episodes import EpisodeSource
from .errors import DatasetError, UserError, unknown_name
from .lerobot_format import HEAD, INDEX_FEATURES, EpisodeInfo, video_feature

MARKER = b"XPL-RGB1"
CHANNELS = ("auto", "rgb", "bgr")
MAX_SIDE, MAX_FRAMES = 8192, 200_000
FIX = "copy the file again from its source, or leave the episode out"


@dataclass(slots=True, kw_only=True)
class Hdf5Episode:
    """One file as a reader found it. ``kept``: frame numbers in the file that the episode consists of."""

    path: Path
    task_name: str
    instruction: str
    fps: float
    kept: NDArray[np.int64]
    columns: dict[str, NDArray[Any]]
    #: our camera name -> path of its pictures inside the file
    pictures: dict[str, str]
    seed: int = -1
    success: bool | None = None
    policy: str = ""
    embodiment: str = ""
    joint_names: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    repeats: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


class Hdf5Dataset(EpisodeSource):
    """Episodes of HDF5 files with the interface of ``LeRobotDataset``.

    ``channels``: ``auto`` trusts the marker of JPEG files and takes plain arrays as RGB; ``rgb`` and ``bgr`` say how a
    standard decoder (or the array) has them. ``DatasetError`` names a damaged file, ``UserError`` a missing h5py.
    """

    def __init__(self, root: str | Path, found: Sequence[Hdf5Episode], *, channels: str = "auto") -> None:
        if channels not in CHANNELS:
            raise unknown_name("channels", channels, CHANNELS, see="core/hdf5.py")
        self.root, self._found, self._channels = Path(root), list(found), channels
        first = self._found[0]
        for other in self._found[1:]:
            self._check_alike(first, other)
        self.fps = first.fps
        self.tasks = list(dict.fromkeys(one.instruction for one in self._found))
        self._starts = np.cumsum([0, *(len(one.kept) for one in self._found)])
        self.features = self._make_features(first)
        self.info = {
            "fps": self.fps,
            "features": self.features,
            "robot_type": first.embodiment,
            "left_out": list(first.left_out),
            "repeats": sum(one.repeats for one in self._found),
        }
        self.episodes = [self._info(index, one) for index, one in enumerate(self._found)]

    @staticmethod
    def _check_alike(first: Hdf5Episode, other: Hdf5Episode) -> None:
        for name in ("fps", "joint_names", "embodiment"):
            mine, theirs = getattr(other, name), getattr(first, name)
            if mine != theirs:
                fix = "open folders of one robot and one rate each"
                raise DatasetError(f"{other.path} {name}", got=mine, wanted=f"{theirs} as in {first.path}", fix=fix)
        for name in ("columns", "pictures"):
            mine, theirs = sorted(getattr(other, name)), sorted(getattr(first, name))
            if mine != theirs:
                fix = "open folders that were recorded with the same settings"
                raise DatasetError(f"{other.path} {name}", got=mine, wanted=f"{theirs} as in {first.path}", fix=fix)

    def _make_features(self, first: Hdf5Episode) -> dict[str, dict[str, Any]]:
        features: dict[str, dict[str, Any]] = {}
        for camera, place in first.pictures.items():
            with open_hdf5(first.path) as file:
                picture = self._decode(first, pictures_of(file, place, first.path), 0, None)
            features[f"observation.images.{camera}"] = video_feature(picture.shape[0], picture.shape[1], self.fps)
        for name, values in first.columns.items():
            names = list(first.joint_names) if values.shape[1:] == (len(first.joint_names),) else None
            features[name] = {"dtype": values.dtype.name, "shape": list(values.shape[1:]) or [1], "names": names}
        return features | INDEX_FEATURES

    @staticmethod
    def _info(index: int, one: Hdf5Episode) -> EpisodeInfo:
        return EpisodeInfo(
            index=index,
            length=len(one.kept),
            instruction=one.instruction,
            task_name=one.task_name,
            seed=one.seed,
            success=one.success,
            scene_hash="",
            policy=one.policy,
            embodiment=one.embodiment,
            assets_version="",
            runtime="",
            content_sha256="",
            key="",
            row={"path": str(one.path), "repeats": one.repeats, **one.extra},
        )

    def content_hash(self, index: int) -> str:
        self.episode(index)
        one = self._found[index]
        return file_sha256(one.path, f"{self._channels}|{one.instruction}|{one.fps}|".encode() + one.kept.tobytes())

    def columns(self, index: int) -> dict[str, NDArray[Any]]:
        episode, one = self.episode(index), self._found[index]
        count = np.arange(episode.length)
        return dict(one.columns) | {
            "timestamp": (count / self.fps).astype(np.float32),
            "frame_index": count,
            "episode_index": np.full(episode.length, index),
            "index": self._starts[index] + count,
            "task_index": np.full(episode.length, self.tasks.index(one.instruction)),
        }

    def frames(self, index: int, indices: Sequence[int] | None = None, key: str = HEAD) -> NDArray[np.uint8]:
        self._check_key(key)
        wanted, one = self._wanted(index, indices), self._found[index]
        size = tuple(self.features[key]["shape"][:2])
        camera = key.removeprefix("observation.images.")
        with open_hdf5(one.path) as file:
            stored = pictures_of(file, one.pictures[camera], one.path)
            decoded = {i: self._decode(one, stored, int(one.kept[i]), size) for i in sorted(set(wanted))}
        return np.stack([decoded[i] for i in wanted])

    def _decode(self, one: Hdf5Episode, stored: Any, number: int, size: tuple[int, ...] | None) -> NDArray[np.uint8]:
        where = f"{one.path} {stored.name} frame {number}"
        value = stored[number]
        if isinstance(value, np.ndarray) and value.ndim == 3:
            picture, swapped = np.asarray(value, np.uint8), self._channels == "bgr"
        else:
            jpeg = jpeg_bytes(value, where)
            picture, marked = decode_jpeg(jpeg, where)
            swapped = not marked if self._channels == "auto" else self._channels == "bgr"
        if size is not None and picture.shape[:2] != size:
            got, wanted = f"{picture.shape[0]}x{picture.shape[1]}", f"{size[0]}x{size[1]} as the first episode"
            raise DatasetError(where, got=got, wanted=wanted, fix="open folders of one picture size each")
        return np.ascontiguousarray(picture[..., ::-1]) if swapped else picture


def open_hdf5(path: Path) -> Any:
    """An HDF5 file for reading; ``UserError`` without h5py, ``DatasetError`` for a missing or damaged file."""
    try:
        import h5py
    except ImportError as error:
        raise UserError("h5py", got="not installed", wanted="h5py, which reads HDF5", fix="pip install h5py") from error
    if not path.is_file():
        raise DatasetError(str(path), got="no such file", wanted="an HDF5 episode", fix=FIX)
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DatasetError(str(path), got=str(error), wanted="a whole HDF5 file", fix=FIX) from error


def dataset_at(file: Any, place: str, path: Path) -> Any | None:
    """The HDF5 dataset at ``place`` (a/b/c), or None where there is none. Links that leave the file are refused."""
    import h5py

    here = file
    for part in place.split("/"):
        if not isinstance(here, h5py.Group) or part not in here:
            return None
        link = here.get(part, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise DatasetError(f"{path} {place}", got=type(link).__name__, wanted="data inside the file", fix=FIX)
        here = here[part]
    if not isinstance(here, h5py.Dataset):
        return None
    if here.external or here.is_virtual:
        raise DatasetError(f"{path} {place}", got="data of another file", wanted="data inside the file", fix=FIX)
    return here


def pictures_of(file: Any, place: str, path: Path) -> Any:
    stored = dataset_at(file, place, path)
    if stored is None:
        raise DatasetError(f"{path} {place}", got="no such dataset", wanted="pictures of the camera", fix=FIX)
    return stored


def numbers_at(file: Any, place: str, path: Path, *, rank: int | None = None) -> NDArray[np.float64] | None:
    """Finite numbers at ``place``, None where there is nothing; ``DatasetError`` for anything else."""
    stored = dataset_at(file, place, path)
    if stored is None:
        return None
    if stored.dtype.kind not in "fiub" or (rank is not None and stored.ndim != rank):
        got = f"{stored.dtype} {list(stored.shape)}"
        wanted = "numbers" if rank is None else f"numbers of rank {rank}"
        raise DatasetError(f"{path} {place}", got=got, wanted=wanted, fix=FIX)
    values = np.asarray(stored[()], dtype=np.float64)
    if not np.isfinite(values).all():
        raise DatasetError(f"{path} {place}", got="NaN or infinity", wanted="finite numbers", fix=FIX)
    return values


def check_lengths(path: Path, lengths: Iterable[tuple[str, int]]) -> int:
    """The common length of an episode's datasets."""
    named = dict(lengths)
    if len(set(named.values())) != 1 or not 0 < min(named.values()) <= MAX_FRAMES:
        raise DatasetError(str(path), got=named, wanted="one length of 1 or more for all datasets", fix=FIX)
    return next(iter(named.values()))


def jpeg_bytes(value: Any, where: str) -> bytes:
    """One stored JPEG file without its padding, from bytes or an array of them."""
    raw = value.tobytes() if isinstance(value, np.ndarray) else bytes(value)
    jpeg = raw.rstrip(b"\0")
    if not jpeg.startswith(b"\xff\xd8") or not jpeg.endswith(b"\xff\xd9"):
        wanted = "a whole JPEG file (it begins with FF D8 and ends with FF D9)"
        raise DatasetError(where, got=f"{len(jpeg)} bytes {jpeg[:4].hex()}..{jpeg[-2:].hex()}", wanted=wanted, fix=FIX)
    return jpeg


def decode_jpeg(jpeg: bytes, where: str) -> tuple[NDArray[np.uint8], bool]:
    """[H,W,3] as a standard decoder has it, and whether the file carries the marker of standard colours."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as picture:
            # The header is compared before anything is inflated.
            if max(picture.size) > MAX_SIDE or picture.mode != "RGB":
                raise ValueError(f"{picture.mode} {picture.size[1]}x{picture.size[0]}")
            comment = picture.info.get("comment", b"")
            return np.asarray(picture, dtype=np.uint8), MARKER in comment
    except (UnidentifiedImageError, ValueError, OSError, SyntaxError) as error:
        raise DatasetError(where, got=str(error), wanted="a colour JPEG file", fix=FIX) from error
