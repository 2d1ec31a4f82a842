"""A world model whose pictures show what it was commanded."""

from __future__ import annotations

import numpy as np

from physisforcing.core.types import DT, ActionSpec, Rollout, RolloutRequest, ViewLayout, WorldModelSpec

NAMES = tuple(f"joint{k}" for k in range(14))


class Meter:
    """An action-conditioned world model whose pictures show joint 0: every pixel has grey level 100 * u_0, at every second step."""

    def __init__(
        self, horizons: tuple[int, ...] = (5,), stride: int = 1, text: bool = False, lags: tuple[int, ...] = ()
    ) -> None:
        self.requests: list[RolloutRequest] = []
        spec = ActionSpec(names=NAMES, low=(-3.0,) * 14, high=(3.0,) * 14, dt=stride * DT)
        self.spec = WorldModelSpec(
            name="meter",
            views=ViewLayout(height=12, width=16),
            context_frames=1,
            horizons=horizons,
            frame_dt=2 * DT,
            conditions=frozenset({"text", "proprioception"} if text else {"actions"}),
            returns=frozenset({"frames"}),
            proprioception_lags=lags,
            action_spec=None if text else spec,
            fingerprint="meter-1",
        )
        self.stride = stride

    def rollout(self, request: RolloutRequest) -> Rollout:
        self.requests.append(request)
        context = request.context_BVTHWC[0, 0, 0]
        if request.actions_BSPA is None:
            assert request.proprioception_BKA is not None
            levels = np.full(request.horizon - 1, request.proprioception_BKA[0, 0, 0])
        else:
            levels = request.actions_BSPA[0, 0, :, 0].repeat(self.stride)[1::2]
            assert len(levels) == request.horizon - 1
        later = [np.full_like(context, round(100 * float(level))) for level in levels]
        frames = np.stack([context, *later])
        return Rollout(
            times_T=np.arange(len(frames)) * self.spec.frame_dt,
            frames_BSVTHWC=frames[None, None, None],
            cost={"seconds": 2.0},
        )
