"""The files of the target cache: what is computed for a window, where it lies, and whether it is whole.

A shard holds, for W windows of T frames with N points: int16 track coordinates in fractions of a pixel of the recorded picture
(1/64 up to 512 pixels a side; float16 would lose a quarter of a pixel at the right border), packed visibility, the depth under each
query, the rigid body that it lies on, and what the encoder finds alike: its features (float16), or the cosines of a few
hundred tokens. Features of an encoder that sees single frames are those of frame ``start + stride * 4k``, the last one of each
latent frame, and are shared by the windows of an episode, since starts and latent frames are both 8 control steps apart.

Shards are mapped into memory, not read: a window costs the pages that it lies on, after one pass over the file that compares its
checksum.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core import ground_truth
from physisforcing.core.digests import file_sha256
from physisforcing.core.errors import DatasetError, UserError

from ..teachers import ground_truth as tracker
from ..teachers.frame_encoder import INFO as FRAME_ENCODER
from ..teachers.protocols import TeacherInfo
from ..teachers.selection import GROUND_TRUTH, Teachers, TeachersConfig

if TYPE_CHECKING:
    from physisforcing.core.episodes import EpisodeSource

SCHEMA = "physisforcing.targets/4"
#: Track coordinates are stored in this fraction of a pixel, for pictures of up to 512 pixels a side.
SUBPIXELS = 64
#: Pixel frames a latent frame.
TEMPORAL_STRIDE = 4
#: What a recipe folder says about its shards.
RECIPE_FILE = "recipe.json"


@dataclass(slots=True, kw_only=True)
class Geometry:
    """Windows of ``frames`` pictures, ``stride`` control steps apart, start at every ``start_stride``-th step, which must be one
    with stored depth where the depth is the simulator's; tracks start from ``grid_rows`` x ``grid_columns`` points. ``token_rows`` x
    ``token_columns``: the denoiser's tokens a latent frame, on which features are computed.
    """

    frames: int = 17
    stride: int = 2
    start_stride: int = ground_truth.STORED_STRIDE
    grid_rows: int = tracker.GRID[0]
    grid_columns: int = tracker.GRID[1]
    token_rows: int = 15
    token_columns: int = 20

    def __post_init__(self) -> None:
        if self.frames < 1 + TEMPORAL_STRIDE or (self.frames - 1) % TEMPORAL_STRIDE:
            raise UserError("recipe.frames", got=self.frames, wanted="1 + 4k", fix="use 17")
        for item in fields(Geometry):
            if getattr(self, item.name) < 1:
                raise UserError(f"recipe.{item.name}", got=getattr(self, item.name), wanted="1 or more", fix="raise it")

    @property
    def points(self) -> int:
        return self.grid_rows * self.grid_columns

    @property
    def tokens(self) -> tuple[int, int, int]:
        """(F, h, w)."""
        return (self.frames - 1) // TEMPORAL_STRIDE + 1, self.token_rows, self.token_columns

    def starts(self, length: int) -> NDArray[np.int64]:
        """First control steps of the windows of an episode."""
        return np.arange(0, length, self.start_stride)

    def steps(self, start: int, length: int) -> NDArray[np.int64]:
        """Control steps of a window's pictures; past the end the last one repeats."""
        return np.minimum(start + self.stride * np.arange(self.frames), length - 1)

    def latent_steps(self, start: int, length: int) -> NDArray[np.int64]:
        """Control steps whose pictures a frame encoder sees: the last one of each latent frame."""
        return self.steps(start, length)[::TEMPORAL_STRIDE]


@dataclass(slots=True, kw_only=True)
class TargetRecipe(Geometry):
    """What targets are computed for, and by which teachers. ``names``: those of tracker, depth and encoder in ``TeachersConfig``;
    ``relations``, ``common``: as there."""

    names: str = "ground_truth/ground_truth/efficientnet_lite0"
    tracker: TeacherInfo = GROUND_TRUTH
    depth: TeacherInfo = GROUND_TRUTH
    encoder: TeacherInfo = FRAME_ENCODER
    relations: int = 0
    common: str = "keep"

    @property
    def teachers(self) -> dict[str, TeacherInfo]:
        return {"tracker": self.tracker, "depth": self.depth, "encoder": self.encoder}

    @property
    def needs_truth(self) -> bool:
        """Whether targets come from the simulator's ground truth, in part or all."""
        return self.depth.name == "ground_truth" or self.exact_points

    @property
    def exact_points(self) -> bool:
        """Whether points are followed by the simulator, which knows their bodies."""
        return self.tracker.name in ("ground_truth", "degraded")

    def describe(self) -> dict[str, Any]:
        """Everything a shard depends on apart from the episode: geometry, and each teacher's name, version, licence and
        checksum."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        return {"schema": SCHEMA, **plain, **{kind: asdict(info) for kind, info in self.teachers.items()}}

    @classmethod
    def from_description(cls, described: Mapping[str, Any]) -> TargetRecipe:
        """The inverse of ``describe``. Raises ``ValueError`` or ``TypeError`` for anything else."""
        values = dict(described)
        if values.pop("schema", None) != SCHEMA:
            raise ValueError(f"not {SCHEMA}")
        return cls(**{name: TeacherInfo(**v) if isinstance(v, dict) else v for name, v in values.items()})

    def digest(self) -> str:
        return _sha256(json.dumps(self.describe(), sort_keys=True).encode())[:16]


@dataclass(slots=True, kw_only=True)
class EpisodeTargets:
    """A shard in memory. ``size``: (H, W) of the pixels; ``subpixels``: units of ``points_WTN2`` a pixel.

    ``depth_WN``: float32, ``depth_kind`` says of what (``metric`` in metres, 0 unknown; ``disparity``; ``off``). ``body_WN``: -1
    unknown. ``features_EhwC``: float16, rows ``rows_WF`` of a window's latent frames. Compact relations instead: ``token_WK`` uint16
    places in F*h*w, ``count_W`` how many of the K are used, ``relation_WR`` int8 cosines times 127, R = K (K - 1) / 2 pairs (i < j)
    row by row. What a recipe does not make has a length of 0. ``channels``: of the encoder's features.
    """

    starts_W: NDArray[np.int32]
    points_WTN2: NDArray[np.int16]
    visible_WTN: NDArray[np.bool_]
    depth_WN: NDArray[np.float32]
    body_WN: NDArray[np.int32]
    rows_WF: NDArray[np.int32]
    features_EhwC: NDArray[np.float16]
    token_WK: NDArray[np.uint16]
    count_W: NDArray[np.int32]
    relation_WR: NDArray[np.int8]
    size: tuple[int, int]
    subpixels: int = SUBPIXELS
    depth_kind: str = "metric"
    channels: int = 0


def subpixels_of(size: tuple[int, int]) -> int:
    """Units a pixel in which tracks over pictures of ``size`` fit 16 bits: a power of two, 64 at most."""
    return min(SUBPIXELS, 1 << max(0, ((np.iinfo(np.int16).max + 1) // max(size)).bit_length() - 1))


def cache_folder(dataset: EpisodeSource, cache: str | Path | None = None) -> Path:
    return Path(cache) if cache else dataset.root / "targets"


def shard_path(dataset: EpisodeSource, episode: int, recipe: TargetRecipe, cache: str | Path | None = None) -> Path:
    """Where an episode's targets are, or will be. Raises ``DatasetError`` when they need a ground truth that was not recorded."""
    name = f"{content_digest(dataset, episode, recipe.needs_truth)[:32]}.safetensors"
    return cache_folder(dataset, cache) / recipe.digest() / name


def write_shard(path: Path, targets: EpisodeTargets, recipe: TargetRecipe, content: str) -> None:
    """Write a shard aside and rename it; the folder's ``recipe.json`` says what its shards are."""
    from safetensors.numpy import save_file

    arrays = {item.name: getattr(targets, item.name) for item in fields(targets) if "_" in item.name}
    arrays = {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}
    arrays["visible_WTb"] = np.packbits(arrays.pop("visible_WTN"), axis=-1)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    header = {
        "recipe": recipe.describe(),
        "content": content,
        "size": list(targets.size),
        "subpixels": targets.subpixels,
        "depth_kind": targets.depth_kind,
        "channels": targets.channels,
        "payload_sha256": _payload(arrays),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with _aside(path.with_name(RECIPE_FILE)) as aside:
        aside.write_text(json.dumps(recipe.describe(), indent=2, sort_keys=True) + "\n")
    with _aside(path) as aside:
        save_file(arrays, aside, metadata={"targets": json.dumps(header, sort_keys=True)})


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to, renamed to it when the block ends well. Machines may share the folder."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read_shard(
    dataset: EpisodeSource, episode: int, recipe: TargetRecipe, cache: str | Path | None = None
) -> EpisodeTargets:
    """An episode's targets, mapped into memory. Raises ``DatasetError`` when they are missing, damaged, or those of something else."""
    path = shard_path(dataset, episode, recipe, cache)
    fix = f"delete it and run physis data targets data=[{dataset.root}]" + (f" cache={cache}" if cache else "")
    if not path.is_file():
        raise DatasetError(
            f"targets of episode {episode}", got="none", wanted=str(path), fix=fix.removeprefix("delete it and ")
        )
    try:
        content = content_digest(dataset, episode, recipe.needs_truth)
        if (header := _mapped(path)[0])["recipe"] != recipe.describe() or header["content"] != content:
            raise ValueError("computed from something else")
        return _targets(path, recipe)
    except (_unreadable(), ValueError, KeyError, TypeError, OSError) as error:
        raise DatasetError(
            f"targets of episode {episode}", got=f"{path}: {error}", wanted="a whole shard", fix=fix
        ) from error


def open_shard(path: Path) -> tuple[TargetRecipe, EpisodeTargets]:
    """A shard by its file alone, mapped into memory, where its dataset is not at hand: what it says it was computed by must be the recipe
    that its folder is named after. Raises ``DatasetError`` when it is missing or damaged."""
    fix = "make it again with the command that made its folder"
    if not path.is_file():
        raise DatasetError("targets", got="none", wanted=str(path), fix=fix)
    try:
        recipe = TargetRecipe.from_description(_mapped(path)[0]["recipe"])
        if recipe.digest() != path.parent.name:
            raise ValueError(f"of recipe {recipe.digest()}, not of its folder's")
        return recipe, _targets(path, recipe)
    except (_unreadable(), ValueError, KeyError, TypeError, OSError) as error:
        raise DatasetError("targets", got=f"{path}: {error}", wanted="a whole shard", fix=fix) from error


def _targets(path: Path, recipe: TargetRecipe) -> EpisodeTargets:
    """The arrays of a shard of this recipe. Raises ``ValueError`` and others where it is not whole."""
    header, arrays = _mapped(path)
    state = path.stat()
    if header["payload_sha256"] != _verified(path, state.st_mtime_ns, state.st_size):
        raise ValueError("its arrays do not match its checksum")
    targets = EpisodeTargets(
        visible_WTN=np.unpackbits(arrays.pop("visible_WTb"), axis=-1, count=recipe.points).astype(bool),
        size=(int(header["size"][0]), int(header["size"][1])),
        subpixels=int(header["subpixels"]),
        depth_kind=str(header["depth_kind"]),
        channels=int(header["channels"]),
        **arrays,
    )
    _check(targets, recipe)
    return targets


def find_recipe(folders: list[Path], config: TeachersConfig, geometry: Geometry) -> TargetRecipe:
    """The one recipe with the names of ``config`` and the ``geometry`` in these cache folders, for a machine that has targets but
    not the weights they were made with. Raises ``UserError`` when there is none or more than one."""
    found: dict[str, TargetRecipe] = {}
    for path in (path for folder in folders for path in sorted(folder.glob(f"*/{RECIPE_FILE}"))):
        try:
            recipe = TargetRecipe.from_description(json.loads(path.read_text()))
        except (ValueError, TypeError):  # of another version of this package
            continue
        same = all(getattr(recipe, item.name) == getattr(geometry, item.name) for item in fields(Geometry))
        wanted = (config.names, config.relations, config.common)
        if same and (recipe.names, recipe.relations, recipe.common) == wanted and _fits(recipe, config):
            found[recipe.digest()] = recipe
    if len(found) == 1:
        return next(iter(found.values()))
    missing = ", ".join(f"teacher.{kind}.path" for kind in Teachers(config).unidentified)
    raise UserError(
        missing,
        got="none given",
        wanted=f"the weights, or targets of {config.names} made before; found {sorted(found) or 'none'}",
        fix=f"give {missing}, or run physis data targets where the weights are and copy its folder",
    )


def _precision(version: str) -> str:
    """The precision that a teacher's version names; float32 where it names none."""
    if "bf16" in version or "bfloat16" in version:
        return "bfloat16"
    return "float16" if "fp16" in version or "float16" in version else "float32"


def _fits(recipe: TargetRecipe, config: TeachersConfig) -> bool:
    """Whether a recipe is what the config says of its teachers, as far as it says anything."""
    teachers = Teachers(config)
    for kind, info in recipe.teachers.items():
        settings = getattr(config, kind)
        if config.permissive_only and not info.permissive:
            return False
        if kind not in teachers.unidentified:
            if info != teachers.info(kind):
                return False
        elif (settings.checksum and settings.checksum.lower() != info.checksum) or settings.dtype != _precision(
            info.version
        ):
            return False
    return True


def _mapped(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    from safetensors import safe_open

    # torch maps the file; the numpy side of safetensors copies it
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {})["targets"])
        return header, {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118 (not a dict)


@functools.lru_cache(maxsize=1 << 16)
def _verified(path: Path, _modified: int, _size: int) -> str:
    """Digest of a shard's arrays as they are on disk; once a process and state of the file."""
    return _payload(_mapped(path)[1])


def _unreadable() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError


def _check(targets: EpisodeTargets, recipe: TargetRecipe) -> None:
    windows, frames, points, (latents, *grid) = (
        len(targets.starts_W),
        recipe.frames,
        recipe.points,
        recipe.tokens,
    )
    tokens, features = recipe.relations, recipe.encoder.name != "none" and not recipe.relations
    expected: dict[str, tuple[int, ...]] = {
        "points_WTN2": (windows, frames, points, 2),
        "visible_WTN": (windows, frames, points),
        "depth_WN": (windows, points),
        "body_WN": (windows, points),
        "rows_WF": (windows, latents if features else 0),
        "features_EhwC": (len(targets.features_EhwC), *grid, targets.channels) if features else (0,) * 4,
        "token_WK": (windows, tokens),
        "count_W": (windows if tokens else 0,),
        "relation_WR": (windows, tokens * (tokens - 1) // 2),
    }
    for name, shape in expected.items():
        if getattr(targets, name).shape != shape:
            raise ValueError(f"{name} has shape {list(getattr(targets, name).shape)}, not {list(shape)}")
    if targets.depth_kind not in ("metric", "disparity", "off"):
        raise ValueError(f"depth of kind {targets.depth_kind}")


def content_digest(dataset: EpisodeSource, episode: int, needs_truth: bool = True) -> str:
    """Digest of what targets depend on: the recorded episode and, where they need it, its ground truth."""
    if not needs_truth:
        return _sha256(dataset.content_hash(episode).encode())
    path = dataset.ground_truth_path(episode)
    if path is None:
        raise DatasetError(
            f"ground truth of episode {episode}",
            got="none",
            wanted=str(ground_truth.episode_path(dataset.root, episode)),
            fix="collect with ground truth (physis data collect), choose teachers that see pictures (teacher=permissive), "
            "or train without physics losses",
        )
    return _sha256(f"{dataset.content_hash(episode)} {file_sha256(path)}".encode())


def _payload(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(memoryview(array).cast("B") if array.size else b"")
    return digest.hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
