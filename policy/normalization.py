"""Normalisation of states and actions: pooled statistics that are stored with the weights, and the exact way back.

Mean and deviation are over all steps of all episodes, each step alike (the published ones weigh every episode alike, however long). They are
merged from counts, means and sums of squares (Chan, Golub and LeVeque 1983), so it does not matter how the steps were divided.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from physisforcing.core.errors import UserError, unknown_name
from physisforcing.core.files import replace_text

NAME = "statistics.json"
KINDS = ("zscore", "minmax")
#: Normalised values are clamped to this, as in the published policy.
CLAMP = 5.0
#: Smallest deviation that is divided by: a joint that never moves keeps its scale.
SMALLEST_STD = 1e-3
#: Dimensions with a smaller range are only centred.
SMALLEST_RANGE = 1e-4


@dataclass(slots=True, kw_only=True)
class Moments:
    """Of numbers [N,D], gathered in parts: count, mean, sum of squared differences from it, smallest and largest (float64)."""

    count: int
    mean_D: NDArray[np.float64]
    square_D: NDArray[np.float64]
    low_D: NDArray[np.float64]
    high_D: NDArray[np.float64]

    @classmethod
    def of(cls, values_ND: NDArray[Any], name: str = "values") -> Moments:
        values = np.asarray(values_ND, dtype=np.float64)
        if values.ndim != 2 or not len(values):
            raise UserError(
                name, got=f"shape {list(values.shape)}", wanted="rows of numbers", fix="see physis data inspect"
            )
        if not np.isfinite(values).all():
            raise UserError(
                name, got="numbers that are not finite", wanted="finite numbers", fix="leave that episode out"
            )
        mean = values.mean(0)
        return cls(
            count=len(values), mean_D=mean, square_D=np.square(values - mean).sum(0), low_D=values.min(0), high_D=values.max(0)
        )  # fmt: skip

    def merged(self, other: Moments) -> Moments:
        """Of both together."""
        count = self.count + other.count
        away = other.mean_D - self.mean_D
        return Moments(
            count=count,
            mean_D=self.mean_D + away * (other.count / count),
            square_D=self.square_D + other.square_D + np.square(away) * (self.count * other.count / count),
            low_D=np.minimum(self.low_D, other.low_D),
            high_D=np.maximum(self.high_D, other.high_D),
        )


def pooled(parts: Iterable[NDArray[Any]], name: str) -> Moments:
    """Moments of all rows of the parts [N,D]. ``UserError`` for parts of different widths, and for none."""
    found: Moments | None = None
    for part in parts:
        one = Moments.of(part, name)
        if found is not None and len(found.mean_D) != len(one.mean_D):
            got = f"{len(one.mean_D)} numbers in one dataset, {len(found.mean_D)} in another"
            raise UserError(name, got=got, wanted="one width", fix="train on datasets of one robot")
        found = one if found is None else found.merged(one)
    if found is None:
        raise UserError(name, got="no episodes", wanted="at least one", fix="data.roots=[<a dataset>]")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Of one kind of vector: ``normalised = (x - offset) / scale``, float64 [D]."""

    offset_D: NDArray[np.float64]
    scale_D: NDArray[np.float64]

    @classmethod
    def of(cls, moments: Moments, kind: str) -> Scale:
        if kind == "zscore":
            return cls(
                offset_D=moments.mean_D, scale_D=np.maximum(np.sqrt(moments.square_D / moments.count), SMALLEST_STD)
            )
        span = moments.high_D - moments.low_D
        return cls(
            offset_D=(moments.high_D + moments.low_D) / 2, scale_D=np.where(span < SMALLEST_RANGE, 1.0, span / 2)
        )  # fmt: skip

    @property
    def width(self) -> int:
        return len(self.offset_D)

    def normalise(self, values: Tensor) -> Tensor:
        """float32 [...,D], clamped to +-5. Computed in float64: offsets may be large beside what varies."""
        offset, scale = self._on(values)
        return ((values.double() - offset) / scale).clamp(-CLAMP, CLAMP).float()

    def saturated(self, values: Tensor) -> float:
        """Share of the numbers that ``normalise`` clamps."""
        offset, scale = self._on(values)
        return float((((values.double() - offset) / scale).abs() > CLAMP).double().mean())

    def denormalise(self, values: Tensor) -> Tensor:
        """The exact inverse, float32 [...,D]; nothing is clamped."""
        offset, scale = self._on(values)
        return (values.double() * scale + offset).float()

    def _on(self, values: Tensor) -> tuple[Tensor, Tensor]:
        assert values.shape[-1] == self.width, f"{values.shape[-1]} numbers, statistics of {self.width}"
        return tuple(torch.from_numpy(x).to(values.device) for x in (self.offset_D, self.scale_D))  # type: ignore[return-value]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionStatistics:
    """How a policy's states and actions are normalised. ``kind``: one of ``KINDS``; ``steps``, ``episodes``: what they were made of."""

    action: Scale
    state: Scale
    kind: str = "zscore"
    steps: int = 0
    episodes: int = 0
    source: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, actions: Iterable[NDArray[Any]], states: Iterable[NDArray[Any]], kind: str = "zscore", episodes: int = 0
    ) -> ActionStatistics:
        """Of the actions and states [T,A] of training episodes."""
        if kind not in KINDS:
            raise unknown_name("normalization", kind, KINDS, see="docs/policy.md")
        action, state = pooled(actions, "action"), pooled(states, "observation.state")
        return cls(
            action=Scale.of(action, kind), state=Scale.of(state, kind), kind=kind, steps=action.count, episodes=episodes
        )  # fmt: skip

    def difference(self, other: ActionStatistics) -> str | None:
        """What tells the normalisation from another one, in words; None where both do the same to the last bit."""
        if self.kind != other.kind:
            return f"{self.kind}, not {other.kind}"
        for name in ("action", "state"):
            for part in ("offset_D", "scale_D"):
                mine, theirs = getattr(getattr(self, name), part), getattr(getattr(other, name), part)
                if not np.array_equal(mine, theirs):
                    return f"another {part.removesuffix('_D')} of {name} (of {self.episodes} episodes, not {other.episodes})"
        return None

    def save(self, folder: Path) -> None:
        """Write ``statistics.json``."""
        values: dict[str, Any] = {
            "kind": self.kind,
            "steps": self.steps,
            "episodes": self.episodes,
            "source": self.source,
        }
        for name in ("action", "state"):
            scale: Scale = getattr(self, name)
            values[name] = {"offset": scale.offset_D.tolist(), "scale": scale.scale_D.tolist()}
        replace_text(folder / NAME, json.dumps(values, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path, *, action_dim: int, state_dim: int) -> ActionStatistics:
        """Read ``statistics.json`` of a policy's folder. ``UserError`` where it is missing, incomplete, of another width or not finite."""
        path = folder / NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError("no object with names")
        except (OSError, ValueError) as error:
            fix = "copy the whole folder: a policy without its statistics acts in the wrong units"
            raise UserError(str(path), got=repr(error), wanted="the statistics of the policy", fix=fix) from error
        if values.get("kind") not in KINDS:
            raise unknown_name(f"{path}: kind", str(values.get("kind")), KINDS, see="docs/policy.md")
        action, state = _scale(values, "action", action_dim, path), _scale(values, "state", state_dim, path)
        more = {
            name: _typed(values, name, kind, path)
            for name, kind in (("steps", int), ("episodes", int), ("source", dict))
        }
        return cls(action=action, state=state, kind=values["kind"], **more)


def _typed(values: Mapping[str, Any], name: str, kind: type, path: Path) -> Any:
    """What was noted beside the numbers; nothing where it was not."""
    if type(found := values.get(name, kind())) is not kind:
        fix = "use the statistics that were saved with these weights"
        raise UserError(f"{path}: {name}", got=found, wanted=kind.__name__, fix=fix)
    return found


def _scale(values: Mapping[str, Any], name: str, width: int, path: Path) -> Scale:
    fix = "use the statistics that were saved with these weights"
    rows, vectors = {}, values.get(name, {})
    if not isinstance(vectors, dict):
        raise UserError(f"{path}: {name}", got=type(vectors).__name__, wanted="offset and scale", fix=fix)
    for key in ("offset", "scale"):
        found = vectors.get(key)
        if not isinstance(found, list) or len(found) != width or any(type(x) not in (int, float) for x in found):
            got: Any = "nothing" if found is None else found
            if isinstance(found, list):
                got = f"{len(found)} numbers" if len(found) != width else "something that is no number"
            raise UserError(f"{path}: {name}.{key}", got=got, wanted=f"{width} numbers", fix=fix)
        rows[key] = np.array(found, dtype=np.float64)
        if not np.isfinite(rows[key]).all() or (key == "scale" and not (rows[key] > 0).all()):
            raise UserError(
                f"{path}: {name}.{key}", got="numbers that are not finite or not positive", wanted="a scale", fix=fix
            )
    return Scale(offset_D=rows["offset"], scale_D=rows["scale"])
