"""Candidates imagined together: one batched rollout, decoded, and continued from its own last picture for long plans."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.history import lagged
from physisforcing.core.protocols import InverseDynamics, WorldModel
from physisforcing.core.types import Observation, Rollout, RolloutRequest, WorldModelSpec

from .frame_store import resize_to
from .requests import rollout_in_parts


@dataclass(slots=True, kw_only=True)
class Imagination:
    """S candidate plans of P control steps.

    ``decoded_SPA``: targets as the decoder gave them, ``actions_SPA``: clipped to the limits. ``frames_STHWC``: the first view,
    uint8, None where the decoder did not need pictures. ``seeds_S``: noise seeds of the first chunk. Seconds of both models.
    """

    decoded_SPA: NDArray[np.float32]
    actions_SPA: NDArray[np.float32]
    seeds_S: NDArray[np.int64]
    spread_SP: NDArray[np.float32] | None = None
    frames_STHWC: NDArray[np.uint8] | None = None
    imagination_s: float = 0.0
    decoding_s: float = 0.0


class Imaginer:
    """World model and decoder as one thing. ``limits_2A``: lowest and highest targets, None for none; ``returns``: what is asked of
    the world model besides what the decoder needs."""

    def __init__(
        self,
        world_model: WorldModel,
        inverse_dynamics: InverseDynamics,
        *,
        horizon: int,
        limits_2A: NDArray[np.float32] | None,
        returns: frozenset[str],
    ) -> None:
        self.world_model, self.inverse_dynamics = world_model, inverse_dynamics
        self.horizon, self.limits_2A, self.returns = horizon, limits_2A, returns

    def imagine(
        self,
        context_VTHWC: NDArray[np.uint8],
        instruction: str,
        rows_RA: NDArray[np.float32],
        seeds_KS: NDArray[np.int64],
        about: tuple[str, int, int],
    ) -> Imagination:
        """S candidates of K chunks. ``rows_RA``: drive targets of the episode so far, the last row is now. ``seeds_KS``: noise seeds.
        ``about``: (task, episode seed, number of the plan), for models that look their answer up.

        The first chunk is one rollout of one context with S candidates; every further one continues each candidate from its last
        picture and its last targets, as S contexts with one candidate each.
        """
        lags = self.world_model.spec.proprioception_lags
        pasts = [rows_RA]  # one a context
        context_BVTHWC, instructions = context_VTHWC[None], [instruction]
        parts: list[Imagination] = []
        begins = 0  # control steps into the plan
        for chunk, seeds_S in enumerate(seeds_KS):
            request = RolloutRequest(
                context_BVTHWC=context_BVTHWC,
                instructions=instructions,
                seeds_BS=seeds_S[:, None] if chunk else seeds_S[None],
                horizon=self.horizon,
                proprioception_BKA=np.stack([lagged(past, lags) for past in pasts]) if lags else None,
                returns=self.inverse_dynamics.needs.returns | self.returns,
                features=self.inverse_dynamics.needs.features,
                ids=[about] * len(instructions),
                plan_steps=[begins] * len(instructions),
            )
            part, frames_SVTHWC = self._chunk(request, np.stack([past[-1] for past in pasts]))
            parts.append(part)
            begins += part.actions_SPA.shape[1]
            if chunk + 1 < len(seeds_KS):
                assert frames_SVTHWC is not None, "the planner asks for pictures where it continues them"
                context_BVTHWC, instructions = frames_SVTHWC[:, :, -1:], [instruction] * len(seeds_S)
                # The models only see the states at the lags, so what lies further back need not travel.
                pasts = [
                    np.concatenate([pasts[s if chunk else 0], rows])[-1 - max(lags, default=0) :]
                    for s, rows in enumerate(part.actions_SPA)
                ]
        return _joined(parts)

    def _chunk(
        self, request: RolloutRequest, state_BA: NDArray[np.float32]
    ) -> tuple[Imagination, NDArray[np.uint8] | None]:
        """-> (one chunk of every candidate, pictures of all views [S,V,T,H,W,3])."""
        began = time.perf_counter()
        rollout = rollout_in_parts(self.world_model, request, self.world_model.spec.max_batch)
        imagined = time.perf_counter()
        chunks = [c for row in self.inverse_dynamics.decode(rollout, state_BA, request.instructions) for c in row]
        decoded_SPA = np.stack([chunk.actions_PA for chunk in chunks])
        spreads = [chunk.spread_P for chunk in chunks if chunk.spread_P is not None]
        frames = _flat(rollout)
        part = Imagination(
            decoded_SPA=decoded_SPA,
            actions_SPA=decoded_SPA if self.limits_2A is None else decoded_SPA.clip(*self.limits_2A),
            seeds_S=request.seeds_BS.ravel(),
            spread_SP=np.stack(spreads) if len(spreads) == len(chunks) else None,
            frames_STHWC=None if frames is None else frames[:, 0],
            imagination_s=imagined - began,
            decoding_s=time.perf_counter() - imagined,
        )
        return part, frames


def context_pictures(observation: Observation, spec: WorldModelSpec) -> NDArray[np.uint8]:
    """The observation's pictures as the world model takes them, [V,1,H,W,3]: streams, or a canvas where its views are tiles."""
    views = spec.views
    if views.tiles:
        sizes = {name: tile[2:] for name, tile in zip(views.names, views.tiles, strict=True)}
        parts = {name: resize_to(observation.images[name][None], *size) for name, size in sizes.items()}
        return views.compose(parts)[None]
    pictures = [observation.images[name] for name in views.names]
    return np.stack([resize_to(picture[None], views.height, views.width) for picture in pictures])


def _flat(rollout: Rollout) -> NDArray[np.uint8] | None:
    frames = rollout.frames_BSVTHWC
    return None if frames is None else frames.reshape(-1, *frames.shape[2:])


def _joined(parts: list[Imagination]) -> Imagination:
    """Chunks one after the other; the first picture of a later chunk is the last one of the chunk before."""
    if len(parts) == 1:
        return parts[0]
    spreads = [part.spread_SP for part in parts if part.spread_SP is not None]
    pictures = [
        part.frames_STHWC if i == 0 else part.frames_STHWC[:, 1:]
        for i, part in enumerate(parts)
        if part.frames_STHWC is not None
    ]
    return Imagination(
        decoded_SPA=np.concatenate([part.decoded_SPA for part in parts], axis=1),
        actions_SPA=np.concatenate([part.actions_SPA for part in parts], axis=1),
        seeds_S=parts[0].seeds_S,
        spread_SP=np.concatenate(spreads, axis=1) if len(spreads) == len(parts) else None,
        frames_STHWC=np.concatenate(pictures, axis=1),
        imagination_s=sum(part.imagination_s for part in parts),
        decoding_s=sum(part.decoding_s for part in parts),
    )
