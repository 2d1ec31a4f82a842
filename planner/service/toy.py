"""Small deterministic world models without weights: to try a client, and for tests. They imagine a picture that slides and sparkles."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.requests import check_request
from physisforcing.core.types import DT, ActionSpec, Rollout, RolloutRequest, ViewLayout, WorldModelSpec

#: Raised when the same request gives another video.
VERSION = 2


@dataclass(slots=True, kw_only=True)
class ToyWorldModel:
    """Frame t is the context, rolled sideways by what the actions add up to and a little further every frame by the instruction, with
    16 pixels of noise.

    A sample depends on its own context, instruction, actions, proprioception and seed alone. ``seconds``: what one rollout
    takes, besides the computing. ``rollouts`` counts calls, ``largest`` is the largest batch so far.
    """

    conditions: frozenset[str] = frozenset({"text", "actions", "proprioception"})
    height: int = 24
    width: int = 32
    horizon: int = 5
    rows_per_frame: int = 2
    seconds: float = 0.0
    rollouts: int = 0
    largest: int = 0

    @property
    def spec(self) -> WorldModelSpec:
        joints = ActionSpec(names=tuple(f"joint{i}" for i in range(14)), low=(-3.2,) * 14, high=(3.2,) * 14)
        return WorldModelSpec(
            name="toy",
            views=ViewLayout(height=self.height, width=self.width),
            context_frames=1,
            horizons=(self.horizon,),
            frame_dt=self.rows_per_frame * DT,
            conditions=self.conditions,
            returns=frozenset({"frames"}),
            proprioception_lags=(0, 8) if "proprioception" in self.conditions else (),
            action_spec=joints if "actions" in self.conditions else None,
            fingerprint=hashlib.sha256(repr((sorted(self.conditions), self.horizon, VERSION)).encode()).hexdigest()[
                :12
            ],
        )

    def rollout(self, request: RolloutRequest) -> Rollout:
        """See core's ``WorldModel``."""
        begun = time.perf_counter()
        check_request(request, self.spec)
        batch, samples = request.seeds_BS.shape
        self.rollouts, self.largest = self.rollouts + 1, max(self.largest, batch * samples)
        time.sleep(self.seconds)
        frames = np.stack([np.stack([self._one(request, b, s) for s in range(samples)]) for b in range(batch)])
        times = np.arange(request.horizon, dtype=np.float64) * self.spec.frame_dt
        return Rollout(times_T=times, frames_BSVTHWC=frames, cost={"seconds": time.perf_counter() - begun})

    def _one(self, request: RolloutRequest, b: int, s: int) -> NDArray[np.uint8]:
        """[1,T,H,W,3]"""
        picture = request.context_BVTHWC[b, 0, -1]
        shifts = np.zeros(request.horizon, np.int64)
        if "text" in self.conditions:
            digest = hashlib.sha256(request.instructions[b].encode()).digest()
            shifts += np.arange(request.horizon) * (1 + digest[0] % 7)
        if request.actions_BSPA is not None:
            rows = request.actions_BSPA[b, s].reshape(request.horizon - 1, -1)
            shifts[1:] += np.rint(10 * rows.sum(axis=1)).astype(np.int64)
        if request.proprioception_BKA is not None:
            shifts = shifts + round(float(request.proprioception_BKA[b].sum()))
        frames = np.stack([np.roll(picture, int(shift) % self.width, axis=1) for shift in shifts])
        random = np.random.default_rng(int(request.seeds_BS[b, s]))
        rows, columns = random.integers(0, [[self.height], [self.width]], (2, 16))
        frames[1:, rows, columns] = random.integers(0, 256, (len(frames) - 1, 16, 3))
        return frames[None]


def text() -> ToyWorldModel:
    """``physis serve worldmodel model=physisforcing.planner.service.toy:text``"""
    return ToyWorldModel(conditions=frozenset({"text", "proprioception"}))


def actions() -> ToyWorldModel:
    """``physis serve worldmodel model=physisforcing.planner.service.toy:actions``"""
    return ToyWorldModel()


def slow() -> ToyWorldModel:
    """Thirty seconds a rollout: ``physis serve worldmodel model=physisforcing.planner.service.toy:slow``"""
    return ToyWorldModel(seconds=30.0)
