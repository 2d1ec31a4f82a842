"""Teachers by name: settings in, a tracker, depth estimator or encoder out.

============  ====================  =============================================  =========================
kind          name                  weights                                        licence of the weights
============  ====================  =============================================  =========================
tracker       classical             none (optical flow)                            Apache-2.0 (OpenCV)
tracker       cotracker3            ``path``, and ``source``: its code             CC-BY-NC-4.0 (both)
depth         depth_anything        ``path``, version 2: ViT-S / larger            Apache-2.0 / CC-BY-NC-4.0
encoder       efficientnet_lite0    of a package from PyPI                         Apache-2.0
encoder       vjepa2                ``path``                                       MIT
encoder       vjepa2_resize         ``path``; the paper's 64 frames of 256x256     MIT
encoder       dinov2                ``path``                                       Apache-2.0
encoder       dinov3                ``path``                                       DINOv3's own
============  ====================  =============================================  =========================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from physisforcing.core.errors import UserError, unknown_name

from .protocols import PERMISSIVE, DepthEstimator, PointTracker, VideoEncoder

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(slots=True, kw_only=True)
class TeacherConfig:
    """Which teacher, from where, on what.

    ``path``: folder or file of the weights. ``checksum``: SHA-256 that they must have; none is any, and for cotracker3 that of the
    published file. ``source``: folder of CoTracker's code, none takes the installed package; other teachers bring theirs.
    ``device``: none is where the command runs. ``dtype``: float32, or on a GPU float16 or bfloat16: half the time and less, with
    answers that ``benchmarks/teacher_parity.py`` holds against those of float32.
    """

    name: str
    path: str | None = None
    checksum: str | None = None
    source: str | None = None
    device: str | None = None
    dtype: str = "float32"


@dataclass(slots=True, frozen=True)
class _Entry:
    """``licence`` of the weights, or how to find it before they are loaded. ``permissive``: how a user gets a permissive one."""

    make: Callable[[TeacherConfig], Any]
    licence: str | Callable[[TeacherConfig], str]
    permissive: str = ""


def make_tracker(config: TeacherConfig, *, permissive_only: bool = False) -> PointTracker:
    """A point tracker. Errors as ``make_depth``."""
    return _make("tracker", TRACKERS, config, permissive_only)


def make_depth(config: TeacherConfig, *, permissive_only: bool = False) -> DepthEstimator:
    """A depth estimator. Raises ``UserError`` for an unknown name, for weights that are missing or not those expected, and with
    ``permissive_only`` for weights that may not be used for everything."""
    return _make("depth", DEPTHS, config, permissive_only)


def make_encoder(config: TeacherConfig, *, permissive_only: bool = False) -> VideoEncoder:
    """A video encoder. Errors as ``make_depth``."""
    return _make("encoder", ENCODERS, config, permissive_only)


def _make(kind: str, entries: Mapping[str, _Entry], config: TeacherConfig, permissive_only: bool) -> Any:
    if config.name not in entries:
        raise unknown_name(kind, config.name, entries, see="physisforcing.worldmodel.teachers.registry")
    if config.dtype not in _DTYPES:
        raise UserError("dtype", got=config.dtype, wanted=", ".join(_DTYPES), fix="write dtype=float32")
    entry = entries[config.name]
    if permissive_only:  # before anything large is read
        licence = entry.licence if isinstance(entry.licence, str) else entry.licence(config)
        _check_permissive(kind, entries, config, licence)
    teacher = entry.make(config)
    if permissive_only:
        _check_permissive(kind, entries, config, teacher.info.licence)
    return teacher


def _check_permissive(kind: str, entries: Mapping[str, _Entry], config: TeacherConfig, licence: str) -> None:
    if licence not in PERMISSIVE:
        raise UserError(
            kind,
            got=f"{config.name} ({licence})",
            wanted=f"weights under {', '.join(PERMISSIVE)}",
            fix=f"choose {', '.join(entry.permissive for entry in entries.values() if entry.permissive)}",
        )


def _classical(config: TeacherConfig) -> PointTracker:
    _refuse(config, "path", "checksum", "source", "dtype")
    from .classical import ClassicalTracker

    return ClassicalTracker()


def _cotracker3(config: TeacherConfig) -> PointTracker:
    from .cotracker3 import PUBLISHED_SHA256, CoTracker3

    path, checksum = _path(config, "the file of its weights"), config.checksum or PUBLISHED_SHA256
    exact = CoTracker3(path, checksum, source=config.source, device=config.device or "cpu")
    if config.dtype == "float32":
        return exact
    from .fast_cotracker import FastCoTracker3

    return FastCoTracker3(exact, dtype={"float16": "fp16", "bfloat16": "bf16"}[config.dtype])


def _depth_anything(config: TeacherConfig) -> DepthEstimator:
    _refuse(config, "source")
    from .depth_anything import DepthAnything

    return DepthAnything.from_folder(_path(config), **_placement(config))


def _depth_anything_licence(config: TeacherConfig) -> str:
    from .depth_anything import licence_in

    return licence_in(config.path)


def _efficientnet(config: TeacherConfig) -> VideoEncoder:
    _refuse(config, "path", "checksum", "source", "dtype")
    from .frame_encoder import FrameEncoder

    return FrameEncoder().to(config.device or "cpu")


def _vjepa2(mode: str) -> Callable[[TeacherConfig], VideoEncoder]:
    def make(config: TeacherConfig) -> VideoEncoder:
        _refuse(config, "source")
        from .vjepa2 import VJepa2

        encoder = VJepa2.from_folder(_path(config), mode=mode, **_placement(config))
        if config.dtype == "float32" or not (config.device or "cpu").startswith("cuda"):
            return encoder
        from .fast_vjepa2 import speed_up

        return speed_up(encoder)

    return make


def _dino(*families: str) -> Callable[[TeacherConfig], VideoEncoder]:
    def make(config: TeacherConfig) -> VideoEncoder:
        _refuse(config, "source")
        from .dino import Dino

        return Dino.from_folder(_path(config), families=families, **_placement(config))

    return make


def _path(config: TeacherConfig, wanted: str = "the folder of its weights") -> str:
    if config.path is None:
        raise UserError(
            f"{config.name}.path",
            got=None,
            wanted=wanted,
            fix=f"download the model yourself and give {wanted}; nothing is downloaded here",
        )
    return config.path


def _placement(config: TeacherConfig) -> dict[str, Any]:
    import torch

    return {"checksum": config.checksum, "device": config.device or "cpu", "dtype": getattr(torch, config.dtype)}


def _refuse(config: TeacherConfig, *fields: str) -> None:
    """``UserError`` for a setting that this teacher would ignore."""
    for field in fields:
        plain = "float32" if field == "dtype" else None
        if (value := getattr(config, field)) != plain:
            raise UserError(
                f"{config.name}.{field}",
                got=value,
                wanted=f"{plain}: this teacher does not take it",
                fix=f"remove {field}",
            )


TRACKERS: Mapping[str, _Entry] = {
    "classical": _Entry(_classical, "Apache-2.0", "classical"),
    "cotracker3": _Entry(_cotracker3, "CC-BY-NC-4.0"),
}
DEPTHS: Mapping[str, _Entry] = {
    "depth_anything": _Entry(_depth_anything, _depth_anything_licence, "depth_anything with the weights of ViT-S"),
}
ENCODERS: Mapping[str, _Entry] = {
    "efficientnet_lite0": _Entry(_efficientnet, "Apache-2.0", "efficientnet_lite0"),
    "vjepa2": _Entry(_vjepa2("aligned"), "MIT", "vjepa2"),
    "vjepa2_resize": _Entry(_vjepa2("resize"), "MIT", "vjepa2_resize"),
    "dinov2": _Entry(_dino("dinov2", "dinov2_with_registers"), "Apache-2.0", "dinov2"),
    "dinov3": _Entry(_dino("dinov3_vit"), "LicenseRef-DINOv3"),
}
