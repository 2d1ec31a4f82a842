"""Requests that the contract suite asks of a world model, made from its spec alone, and how far two answers are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.protocols import WorldModel
from physisforcing.core.types import FeatureRequest, Rollout, RolloutRequest, WorldModelSpec
from physisforcing.worldmodel.adapters.fitting import place

#: Names that a spec may use.
CONDITIONS = frozenset({"text", "actions", "goal", "proprioception"})
RETURNS = frozenset({"frames", "latents", "features"})


@dataclass(slots=True, kw_only=True)
class CheckSettings:
    """``max_samples``: no request asks for more videos than that. ``state_dim``: joint targets where the spec names no actions.

    Tolerances in grey levels (0..255): ``batch_tolerance`` greatest difference between a sample alone and in a batch,
    ``first_frame_tolerance`` mean difference between the first frame and the context, ``sensitivity`` smallest mean difference that
    counts as following a condition. Latents and features are measured in percent of their own standard deviation instead.
    """

    instructions: list[str] = field(
        default_factory=lambda: ["press the bell with the left arm", "lift the red bottle off the table"]
    )
    state_dim: int = 14
    max_samples: int = 4
    batch_tolerance: float = 2.0
    first_frame_tolerance: float = 30.0
    sensitivity: float = 0.01


@dataclass(slots=True, kw_only=True)
class Row:
    """One context with everything that its model may want."""

    context_VTHWC: NDArray[np.uint8]
    instruction: str
    proprioception_KA: NDArray[np.float32] | None = None
    actions_PA: NDArray[np.float32] | None = None
    goal_VHWC: NDArray[np.uint8] | None = None
    id: tuple[str, int, int] | None = None


@dataclass(slots=True, frozen=True)
class Difference:
    """Greatest and mean absolute difference, in ``unit``."""

    greatest: float
    mean: float
    unit: str

    def measured(self, prefix: str = "") -> dict[str, float]:
        return {f"{prefix}greatest": round(self.greatest, 4), f"{prefix}mean": round(self.mean, 6)}


class Probe:
    """A model under test, and requests that it must be able to answer.

    A model that answers only to certain inputs (recorded videos, a simulator's own states) may offer ``examples()``: requests of one
    context and one sample each, at least two with different contexts. They are used instead of made-up pictures.
    ``pictures`` uint8 [H,W,3]: used instead of made-up ones, each for all views and context frames, resized to the model's view.
    """

    def __init__(
        self,
        model: WorldModel,
        settings: CheckSettings,
        pictures: Sequence[NDArray[np.uint8]] = (),
        load_again: Callable[[], WorldModel] | None = None,
    ) -> None:
        self.model, self.settings, self.load_again = model, settings, load_again
        self._pictures = pictures
        self._rows: list[Row] = []
        self._answers: dict[int, Rollout] = {}
        self.overwritten: set[str] = set()

    @property
    def spec(self) -> WorldModelSpec:
        return self.model.spec

    @property
    def views(self) -> int:
        """Length of the V axis: a collage is one picture."""
        return 1 if self.spec.views.tiles else len(self.spec.views.names)

    @property
    def horizon(self) -> int:
        """The shortest rollout: what is not about length is asked of this one."""
        return min(self.spec.horizons)

    @property
    def main(self) -> str:
        """The return that answers are compared by."""
        return next(name for name in ("frames", "latents", "features") if name in self.spec.returns)

    @property
    def features(self) -> FeatureRequest:
        """Features of the middle block at high noise."""
        return FeatureRequest(taps=(max(1, self.spec.blocks // 2),))

    # ------------------------------------------------------------------ requests

    def row(self, index: int) -> Row:
        """Context ``index``; different ones differ in picture and instruction."""
        if not self._rows:
            self._rows = self._examples() or [self._made_up(i) for i in range(4)]
        return self._rows[index % len(self._rows)]

    def request(
        self,
        rows: Sequence[Row],
        seeds: Sequence[Sequence[int]],
        *,
        horizon: int | None = None,
        returns: frozenset[str] | None = None,
    ) -> RolloutRequest:
        """A request of these contexts with ``seeds[b][s]``. Sample s of a context gets its actions, moved a little further for each s."""
        horizon = self.horizon if horizon is None else horizon
        returns = frozenset({self.main}) if returns is None else returns
        extra = {}
        if any(row.id is not None for row in rows):
            extra["ids"] = [row.id for row in rows]
        return RolloutRequest(
            context_BVTHWC=np.stack([row.context_VTHWC for row in rows]),
            instructions=[row.instruction for row in rows],
            seeds_BS=np.asarray(seeds, np.int64),
            horizon=horizon,
            proprioception_BKA=_stack([row.proprioception_KA for row in rows]),
            actions_BSPA=_stack([self._actions(row, len(seeds[0]), horizon) for row in rows]),
            goal_BVHWC=_stack([row.goal_VHWC for row in rows]),
            returns=returns,
            features=self.features if "features" in returns else None,
            **extra,
        )

    def base_request(self, seed: int = 11) -> RolloutRequest:
        """Context 0, one sample."""
        return self.request([self.row(0)], [[seed]])

    def base(self, seed: int = 11) -> Rollout:
        """The answer to ``base_request``, asked once for each seed. Arrays of the request that it changed are noted in ``overwritten``."""
        if seed not in self._answers:
            request, before = self.base_request(seed), self.base_request(seed)
            self._answers[seed] = self.model.rollout(request)
            for name in ("context_BVTHWC", "seeds_BS", "proprioception_BKA", "actions_BSPA", "goal_BVHWC"):
                if not np.array_equal(getattr(request, name), getattr(before, name)):
                    self.overwritten.add(name)
        return self._answers[seed]

    def action_rows(self, horizon: int) -> int:
        """Rows of an action chunk for ``horizon`` frames."""
        spec = self.spec
        assert spec.action_spec is not None
        return round((horizon - 1) * spec.frame_dt / spec.action_spec.dt)

    def limits(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Lowest and highest value of every action, within -1..1 where the spec sets no limit."""
        spec = self.spec.action_spec
        if spec is None:
            return (-np.ones(self.settings.state_dim, np.float32), np.ones(self.settings.state_dim, np.float32))
        low, high = np.asarray(spec.low, np.float32), np.asarray(spec.high, np.float32)
        return np.where(np.isfinite(low), low, -1).astype(np.float32), np.where(np.isfinite(high), high, 1).astype(
            np.float32
        )

    def moved(self, row: Row, share: float) -> Row:
        """The same context with actions that go ``share`` of the way from the middle of the range to its end."""
        return replace(row, actions_PA=self._ramp(self.horizon, share))

    # ------------------------------------------------------------------ parts

    def _actions(self, row: Row, samples: int, horizon: int) -> NDArray[np.float32] | None:
        if row.actions_PA is None:
            return None
        if horizon == self.horizon:
            first = row.actions_PA
        else:
            first = self._ramp(horizon, 0.5)
        low, high = self.limits()
        return np.stack([(first + 0.02 * s * (high - low)).clip(low, high) for s in range(samples)]).astype(np.float32)

    def _ramp(self, horizon: int, share: float) -> NDArray[np.float32]:
        low, high = self.limits()
        way = np.linspace(0, share, self.action_rows(horizon) + 1, dtype=np.float32)[1:, None]
        middle = (low + high) / 2
        return (middle + way * (high - middle)).astype(np.float32)

    def _made_up(self, index: int) -> Row:
        spec, conditions = self.spec, self.spec.conditions
        layout, low_high = spec.views, self.limits()
        views = [self._picture(index, view) for view in range(self.views)]
        context = np.repeat(np.stack(views)[:, None], spec.context_frames, axis=1)
        state = np.repeat(((low_high[0] + low_high[1]) / 2)[None], max(1, len(spec.proprioception_lags)), axis=0)
        text = self.settings.instructions[index % len(self.settings.instructions)]
        goal = np.stack([scene(100 * index + 50 + view, layout.height, layout.width) for view in range(self.views)])
        return Row(
            context_VTHWC=context,
            instruction=text if "text" in conditions else "",
            proprioception_KA=state if "proprioception" in conditions else None,
            actions_PA=self._ramp(self.horizon, 0.5) if "actions" in conditions else None,
            goal_VHWC=goal if "goal" in conditions else None,
        )

    def _picture(self, index: int, view: int) -> NDArray[np.uint8]:
        layout = self.spec.views
        if not self._pictures:
            return scene(100 * index + view, layout.height, layout.width)
        picture = self._pictures[index % len(self._pictures)]
        return place(picture, layout.height, layout.width, "stretch")

    def _examples(self) -> list[Row]:
        offered = getattr(self.model, "examples", None)
        if offered is None or self._pictures:
            return []
        rows = []
        for request in offered():
            actions = request.actions_BSPA
            rows.append(
                Row(
                    context_VTHWC=request.context_BVTHWC[0],
                    instruction=request.instructions[0],
                    proprioception_KA=None if request.proprioception_BKA is None else request.proprioception_BKA[0],
                    actions_PA=None if actions is None else actions[0, 0],
                    goal_VHWC=None if request.goal_BVHWC is None else request.goal_BVHWC[0],
                    id=None if request.ids is None else request.ids[0],
                )
            )
        return rows


def scene(number: int, height: int, width: int) -> NDArray[np.uint8]:
    """A made-up picture [H,W,3]: a shaded table, two dark arms and a few blocks. The number decides colours and places."""
    generator = np.random.default_rng([7, number])
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    table = generator.uniform(90, 190, 3)
    picture = np.stack([table[0] + 40 * y - 20 * x, table[1] + 35 * y, table[2] + 30 * y + 10 * x], axis=-1)
    for side in (0.05, 0.8):
        left, top = side + 0.1 * generator.random(), 0.05 + 0.1 * generator.random()
        arm = (x > left) & (x < left + 0.12) & (y > top) & (y < top + 0.4)
        picture[arm] = (50, 52, 58)
    for _ in range(3):
        left, top = generator.uniform(0.2, 0.7), generator.uniform(0.2, 0.55)
        block = (np.abs(x - left) < 0.06) & (np.abs(y - top) < 0.05)
        picture[block] = generator.integers(30, 230, 3)
    return picture.round().clip(0, 255).astype(np.uint8)


def output(rollout: Rollout, name: str) -> NDArray:
    """One of the returned arrays by its name in ``spec.returns``; AssertionError where it is missing."""
    found = {
        "frames": rollout.frames_BSVTHWC,
        "latents": rollout.latents_BSCFhw,
        "features": rollout.features_BSKFhwD,
    }[name]
    assert found is not None, f"no {name} in the rollout"
    return found


def difference(a: NDArray, b: NDArray, name: str) -> Difference:
    """Frames in grey levels, everything else in percent of the standard deviation of ``a``."""
    assert a.shape == b.shape, f"shapes {a.shape} and {b.shape}"
    gap = np.abs(a.astype(np.float64) - b.astype(np.float64))
    if name == "frames":
        return Difference(float(gap.max()), float(gap.mean()), "grey levels")
    scale = 100 / max(float(a.astype(np.float64).std()), 1e-12)
    return Difference(float(gap.max()) * scale, float(gap.mean()) * scale, "% of the standard deviation")


def _stack(parts: list[NDArray | None]) -> NDArray | None:
    found = [part for part in parts if part is not None]
    assert len(found) in (0, len(parts)), "all contexts or none"
    return np.stack(found) if found else None
