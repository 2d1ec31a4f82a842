"""Which pictures a world model without weights of its own shows: cameras, size, rate, lengths."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from physisforcing.core.errors import UserError
from physisforcing.core.results import config_hash
from physisforcing.core.types import DT, ActionSpec, ViewLayout, WorldModelSpec

from .robotwin.observation import HEIGHT, WIDTH


def shrinking(height: int, width: int) -> int:
    """How many times smaller than drawn (240x320) a picture is. ``UserError`` unless that is a whole number."""
    factor = HEIGHT // height if height > 0 else 0
    if (factor * height, factor * width) != (HEIGHT, WIDTH):
        wanted = f"{HEIGHT}x{WIDTH}, or a whole number of times smaller"
        raise UserError("size", got=f"{height}x{width}", wanted=wanted, fix="height=120 width=160")
    return factor


@dataclass(slots=True, kw_only=True)
class Geometry:
    """``stride``: control steps from one frame to the next. ``horizons``: numbers of frames, the first one included. The defaults are those
    of the shipped world model."""

    views: tuple[str, ...] = ("head",)
    height: int = 120
    width: int = 160
    stride: int = 2
    horizons: tuple[int, ...] = (17,)

    def __post_init__(self) -> None:
        shrinking(self.height, self.width)
        if self.stride < 1 or not self.horizons or min(self.horizons) < 2:
            got, wanted = f"stride {self.stride}, horizons {self.horizons}", "stride >= 1, horizons >= 2"
            raise UserError("horizons", got=got, wanted=wanted, fix="stride=2 horizons=(17,)")

    @property
    def shrink(self) -> int:
        """How many times smaller than drawn."""
        return shrinking(self.height, self.width)

    def fingerprint(self, name: str, **settings: Any) -> str:
        """Identifies a world model that shows such pictures, by its name and what else it depends on."""
        geometry = {field.name: getattr(self, field.name) for field in fields(Geometry)}
        return config_hash({"name": name, "geometry": geometry, **settings})

    def spec(
        self,
        name: str,
        fingerprint: str,
        *,
        conditions: frozenset[str] = frozenset(),
        proprioception_lags: tuple[int, ...] = (),
        action_spec: ActionSpec | None = None,
    ) -> WorldModelSpec:
        """The spec of a world model that returns such frames."""
        return WorldModelSpec(
            name=name,
            views=ViewLayout(names=self.views, height=self.height, width=self.width),
            context_frames=1,
            horizons=tuple(sorted(self.horizons)),
            frame_dt=self.stride * DT,
            conditions=conditions,
            returns=frozenset({"frames"}),
            proprioception_lags=proprioception_lags,
            action_spec=action_spec,
            fingerprint=fingerprint,
        )
