"""Statistics of states and actions as Fast-WAM releases them (reference sections 2.6 and 5) -> ours and back.

A released ``dataset_stats.json`` has, for ``action`` and ``state`` and each of their keys, vectors ``global_{mean,std,min,max,q01,q99}``
and the same for each step of a chunk, which no released policy uses. Units are those of the vectors: radians, and 0..1 of a gripper.
Fast-WAM reads the two that its config's ``norm_default_mode`` names; these are written, to the last bit of what they are read back as.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError, unknown_name

from .normalization import KINDS, SMALLEST_RANGE, ActionStatistics, Scale

NAME = "dataset_stats.json"
#: What is added to a deviation before it divides.
STD_ADDED = 1e-8
#: The one key that released files have for ``action`` and ``state``.
KEY = "default"
#: Kind -> (the statistics that it is made of, Fast-WAM's name of it).
PUBLISHED = {"zscore": (("mean", "std"), "z-score"), "minmax": (("min", "max"), "min/max")}
#: All that a released file has, each over all steps and for each step of a chunk.
STATISTICS = ("min", "max", "q01", "q99", "mean", "std")
_FIX = "use the file that was released with these weights"


def find_statistics(checkpoint: Path) -> Path | None:
    """The statistics beside a released checkpoint: ``<its name>_dataset_stats.json`` or ``dataset_stats.json``."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    beside = (folder / f"{checkpoint.stem}_{NAME}", folder / NAME)
    return next((path for path in beside if path.is_file()), None)


def read_released(path: Path, kind: str, *, action_dim: int, state_dim: int) -> ActionStatistics:
    """``kind``: ``zscore`` (RoboTwin) or ``minmax`` (LIBERO): the file does not say which its policy was trained with.

    The same numbers as published: deviations are divided by with 1e-8 added, and a dimension whose range is below 1e-4 has its
    smallest value taken off, not its middle. ``UserError`` for a missing key, another width, and numbers that are not finite.
    """
    if kind not in KINDS:
        raise unknown_name("normalization", kind, KINDS, see="docs/policy_weights.md")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(str(path), got=repr(error), wanted="released statistics", fix=_FIX) from error
    action, state = (
        _scale(_only(values, name, path), kind, width, f"{path}: {name}")
        for name, width in (("action", action_dim), ("state", state_dim))
    )
    steps, episodes = (int(values.get(name) or 0) for name in ("num_transition", "num_episodes"))
    source = {"released": path.name}
    return ActionStatistics(action=action, state=state, kind=kind, steps=steps, episodes=episodes, source=source)


def _only(values: Any, name: str, path: Path) -> tuple[str, Mapping[str, Any]]:
    """-> (the one key of ``name``, its statistics): which of several comes first in the vector is in no file."""
    found = values.get(name) if isinstance(values, dict) else None
    if not isinstance(found, dict) or len(found) != 1:
        got = sorted(found) if isinstance(found, dict) else "nothing"
        raise UserError(f"{path}: {name}", got=got, wanted="one key, as in the released files", fix=_FIX)
    return next(iter(found.items()))


def _scale(found: tuple[str, Mapping[str, Any]], kind: str, width: int, where: str) -> Scale:
    key, values = found
    wanted = (f"global_{name}" for name in PUBLISHED[kind][0])
    first, second = (_row(values.get(name), width, f"{where}.{key}.{name}") for name in wanted)
    return _read(kind, first, second)


def _read(kind: str, first: NDArray[np.float64], second: NDArray[np.float64]) -> Scale:
    """Of two statistics, each [D]."""
    if kind == "zscore":
        return Scale(offset_D=first, scale_D=second + STD_ADDED)
    span = second - first
    still = span < SMALLEST_RANGE
    return Scale(offset_D=np.where(still, first, (first + second) / 2), scale_D=np.where(still, 1.0, span / 2))


def _row(value: Any, width: int, where: str) -> NDArray[np.float64]:
    try:
        row = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        row = np.full(0, np.nan)
    if row.shape != (width,) or not np.isfinite(row).all():
        got = "nothing" if value is None else f"shape {list(row.shape)}, or numbers that are not finite"
        raise UserError(where, got=got, wanted=f"{width} finite numbers", fix=_FIX)
    return row


def write_released(statistics: ActionStatistics) -> tuple[dict[str, Any], list[str]]:
    """-> (content of ``dataset_stats.json``, the names of what a released file has and this one does not, since ours do not keep it).

    ``read_released`` makes the same offsets and scales of it, bit for bit. ``UserError`` names a dimension for which no two float64
    numbers do that, such as a deviation below 1e-8.
    """
    names = PUBLISHED[statistics.kind][0]
    values: dict[str, Any] = {}
    for name in ("state", "action"):
        scale: Scale = getattr(statistics, name)
        pairs = [
            _pair(statistics.kind, float(offset), float(size), f"statistics: {name}[{k}]")
            for k, (offset, size) in enumerate(zip(scale.offset_D, scale.scale_D, strict=True))
        ]
        rows = {f"global_{key}": list(row) for key, row in zip(names, zip(*pairs, strict=True), strict=True)}
        values[name] = {KEY: rows}
    counts = {"num_episodes": statistics.episodes, "num_transition": statistics.steps}
    values |= {name: count for name, count in counts.items() if count}
    missing = [f"global_{name}" for name in STATISTICS if name not in names]
    missing += [f"stepwise_{name}" for name in STATISTICS]
    return values, missing + [name for name, count in counts.items() if not count]


def _pair(kind: str, offset: float, scale: float, where: str) -> tuple[float, float]:
    """The two statistics of one dimension that are read as this offset and scale."""
    for first, second in (_deviations if kind == "zscore" else _ranges)(offset, scale):
        read = _read(kind, np.array([first]), np.array([second]))
        if read.offset_D[0] == offset and read.scale_D[0] == scale:
            return first, second
    got = f"offset {offset!r} and scale {scale!r}, which no two of {PUBLISHED[kind][0]} are read as"
    fix = "train with statistics of recordings (physis train policy)"
    raise UserError(where, got=got, wanted="what dataset_stats.json can hold", fix=fix)


def _deviations(offset: float, scale: float) -> Iterator[tuple[float, float]]:
    return ((offset, std) for std in _near(scale - STD_ADDED) if std >= 0)


def _ranges(offset: float, scale: float) -> Iterator[tuple[float, float]]:
    """First the ends that are one scale from the middle, each with the numbers beside it: sum and difference were rounded. Then, since a
    dimension that never moved has scale 1 as well, its value twice."""
    side = math.copysign(1.0, offset)
    for far in _near(offset + side * scale):  # of the two ends the larger: the other one follows from it
        for middle in (far - 2 * side * scale, 2 * offset - far):
            for near in _near(middle):
                yield (near, far) if side > 0 else (far, near)
    yield offset, offset


def _near(value: float) -> tuple[float, ...]:
    return value, math.nextafter(value, math.inf), math.nextafter(value, -math.inf)


def told(kind: str) -> str:
    """With which settings a file of this kind is read: it does not say so itself."""
    return f"{NAME} is of kind {kind}: norm_default_mode={PUBLISHED[kind][1]} in Fast-WAM's data config, normalization={kind} with kind=fastwam here"
