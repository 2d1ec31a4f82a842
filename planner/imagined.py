"""Episodes that only happened in a world model: one rollout after the other, each from the last picture of the one before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import MissingCapabilityError
from physisforcing.core.protocols import InverseDynamics, WorldModel
from physisforcing.core.types import DT, Rollout, RolloutRequest, WorldModelSpec

from .action_planner import noise_seed
from .frame_store import resize_to


@dataclass(slots=True, kw_only=True)
class ImaginedEpisode:
    """What was imagined.

    ``frames_THWC`` uint8, frame 0 shows the picture it started from, as the model gives it back. ``steps_T``: control step of each frame, from 0.
    ``joints_NA``: drive targets u[0..N-1] at every control step, row 0 the real ones, float32. ``rollouts``: how many were chained.
    """

    frames_THWC: NDArray[np.uint8]
    steps_T: NDArray[np.int64]
    joints_NA: NDArray[np.float32]
    rollouts: int
    cost: dict[str, float] = field(default_factory=dict)

    def joints_at_frames(self) -> NDArray[np.float32]:
        """[T,A] drive targets at the pictures."""
        return self.joints_NA[self.steps_T]


def frame_steps(spec: WorldModelSpec, horizon: int) -> NDArray[np.int64]:
    """Control step of each of ``horizon`` frames. ``MissingCapabilityError`` for a model whose frames fall between control steps."""
    steps = np.arange(horizon) * spec.frame_dt / DT
    whole = np.rint(steps).astype(np.int64)
    if not np.allclose(steps, whole, atol=1e-3):
        wanted = f"frames at multiples of {DT} s"
        raise MissingCapabilityError("frame_dt", got=spec.frame_dt, wanted=wanted, fix="use a model of another rate")
    return whole


def only_picture(picture_HWC: NDArray[np.uint8], spec: WorldModelSpec) -> NDArray[np.uint8]:
    """A head picture as the context of a model with one view and one context frame, uint8 [1,1,1,H,W,C]."""
    if spec.context_frames != 1 or len(spec.views.names) != 1 or "frames" not in spec.returns:
        got = f"{spec.context_frames} context frames, views {spec.views.names}, returns {sorted(spec.returns)}"
        wanted = "one context frame of one view, and frames"
        raise MissingCapabilityError(
            "world_model", got=got, wanted=wanted, fix="use an image-to-video model of the head view"
        )
    return resize_to(picture_HWC[None], spec.views.height, spec.views.width)[None, None]


def lagged(joints: Sequence[NDArray[np.float32]], spec: WorldModelSpec) -> NDArray[np.float32] | None:
    """[1,K,A] drive targets at the model's lags before the last row of ``joints``, clamped at the first; None where it takes none."""
    if not spec.proprioception_lags:
        return None
    last = len(joints) - 1
    return np.stack([joints[max(0, last - lag)] for lag in spec.proprioception_lags])[None]


class Imaginer:
    """A world model and a decoder that go on imagining from what they imagined (text-conditioned models)."""

    def __init__(self, world_model: WorldModel, decoder: InverseDynamics, *, horizon: int | None = None) -> None:
        self.world_model, self.decoder = world_model, decoder
        known = decoder.needs.horizons or world_model.spec.horizons
        self.horizon = horizon or next(
            (h for h in known if h in world_model.spec.horizons), world_model.spec.horizons[0]
        )
        self.steps_T = frame_steps(world_model.spec, self.horizon)

    def imagine(
        self,
        picture_HWC: NDArray[np.uint8],
        history_NA: NDArray[np.float32],
        instruction: str,
        *,
        seed: int,
        min_rows: int = 1,
    ) -> ImaginedEpisode:
        """At least ``min_rows`` drive targets after the real ones.

        ``history_NA``: drive targets up to now, its last row those at the picture. Noise depends on (``seed``, number of the rollout).
        """
        past = [np.asarray(row, np.float32) for row in history_NA]
        joints, frames, steps = [past[-1]], [], []
        cost: dict[str, float] = {}
        context, count = only_picture(picture_HWC, self.world_model.spec), 0
        while len(joints) - 1 < min_rows:
            rollout = self._rollout(context, past, instruction, noise_seed(seed, count, 0))
            chunk = self.decoder.decode(rollout, past[-1][None], [instruction])[0][0].actions_PA
            assert rollout.frames_BSVTHWC is not None
            seen = rollout.frames_BSVTHWC[0, 0, 0]
            # The first frame of a later rollout is the last one of the rollout before.
            skip = 1 if count else 0
            frames.append(seen[skip:])
            steps.append(len(joints) - 1 + self.steps_T[skip:])
            rows = [np.asarray(row, np.float32) for row in chunk]
            joints += rows
            past += rows
            context, count = seen[-1][None, None, None], count + 1
            for name, value in rollout.cost.items():
                cost[name] = cost.get(name, 0.0) + value
        return ImaginedEpisode(
            frames_THWC=np.concatenate(frames),
            steps_T=np.concatenate(steps),
            joints_NA=np.stack(joints),
            rollouts=count,
            cost=cost,
        )

    def _rollout(
        self, context: NDArray[np.uint8], past: Sequence[NDArray[np.float32]], instruction: str, seed: int
    ) -> Rollout:
        spec, needs = self.world_model.spec, self.decoder.needs
        return self.world_model.rollout(
            RolloutRequest(
                context_BVTHWC=context,
                instructions=[instruction],
                seeds_BS=np.array([[seed]], np.int64),
                horizon=self.horizon,
                proprioception_BKA=lagged(past, spec),
                returns=frozenset({"frames"} | needs.returns),
                features=needs.features,
            )
        )
