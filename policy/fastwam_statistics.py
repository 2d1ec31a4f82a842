"""Statistics of states and actions as Fast-WAM releases them (reference sections 2.6 and 5) -> ours.

A released ``dataset_stats.json`` has, for ``action`` and ``state`` and each of their keys, vectors ``global_{mean,std,min,max,q01,q99}``
and the same for each step of a chunk, which no released policy uses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError, unknown_name

from .normalization import KINDS, SMALLEST_RANGE, ActionStatistics, Scale

NAME = "dataset_stats.json"
#: What is added to a deviation before it divides.
STD_ADDED = 1e-8
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
    wanted = ("global_mean", "global_std") if kind == "zscore" else ("global_min", "global_max")
    first, second = (_row(values.get(name), width, f"{where}.{key}.{name}") for name in wanted)
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
