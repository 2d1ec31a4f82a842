"""A model that keeps the world-model contract, to break in one way at a time, and the checks of a model by name."""

from __future__ import annotations

import hashlib
from typing import ClassVar

import numpy as np

from physisforcing.core.errors import MissingCapabilityError
from physisforcing.core.requests import check_request
from physisforcing.core.types import DT, ActionSpec, Rollout, RolloutRequest, ViewLayout, WorldModelSpec
from physisforcing.planner.check_worldmodel import check_world_model
from physisforcing.planner.contract_probe import CheckSettings

HORIZONS = (5, 9)


class Good:
    """Keeps the contract in all it has: a picture that shifts by what text, actions, goal and joints add up to, with noise by seed."""

    changes: ClassVar[dict] = {}

    def __init__(self) -> None:
        joints = ActionSpec(names=("a", "b"), low=(-1.0, 0.0), high=(1.0, 1.0))
        values = {
            "name": "good",
            "views": ViewLayout(names=("head", "wrist"), height=12, width=16),
            "context_frames": 2,
            "horizons": HORIZONS,
            "frame_dt": 2 * DT,
            "conditions": frozenset({"text", "actions", "goal", "proprioception"}),
            "returns": frozenset({"frames", "latents", "features"}),
            "proprioception_lags": (0, 8),
            "action_spec": joints,
            "max_batch": 4,
            "fingerprint": "g00d",
            "blocks": 3,
        }
        self.spec = WorldModelSpec(**(values | self.changes))

    def rollout(self, request: RolloutRequest) -> Rollout:
        self.refuse(request)
        batch, samples = request.seeds_BS.shape
        order = [(b, s) for b in range(batch) for s in range(samples)]
        frames = [self.video(request, b, s) for b, s in order]
        shape = (batch, samples)
        made = Rollout(times_T=self.times(request.horizon))
        if "frames" in request.returns:
            made.frames_BSVTHWC = np.stack(frames).reshape(*shape, *frames[0].shape)
        if "latents" in request.returns:
            latents = [f[0].mean(-1)[None].astype(np.float32) for f in frames]
            made.latents_BSCFhw = np.stack(latents).reshape(*shape, *latents[0].shape)
        if "features" in request.returns:
            assert request.features is not None
            maps = [np.stack([f[0].astype(np.float32) * tap for tap in request.features.taps]) for f in frames]
            made.features_BSKFhwD = np.stack(maps).reshape(*shape, *maps[0].shape)
        return made

    def refuse(self, request: RolloutRequest) -> None:
        check_request(request, self.spec)
        if request.features is not None and max(request.features.taps) > self.spec.blocks:
            raise MissingCapabilityError("taps", got=request.features.taps, wanted="1..3", fix="fewer")
        if request.seeds_BS.size > self.spec.max_batch:
            raise MissingCapabilityError("seeds_BS", got=request.seeds_BS.size, wanted="4 or fewer", fix="in parts")

    def times(self, horizon: int) -> np.ndarray:
        return np.arange(horizon) * self.spec.frame_dt

    def noise(self, request: RolloutRequest, b: int, s: int) -> np.random.Generator:
        return np.random.default_rng(int(request.seeds_BS[b, s]))

    def shift(self, request: RolloutRequest, b: int, s: int, t: int) -> int:
        """Pixels that the picture has moved in frame t; here from all conditions."""
        text = int(hashlib.sha256(request.instructions[b].encode()).hexdigest(), 16) % 7
        actions, state, goal = request.actions_BSPA, request.proprioception_BKA, request.goal_BVHWC
        driven = 0.0 if actions is None else 10 * float(actions[b, s, : 2 * t, 0].sum())
        driven += 0.0 if goal is None else float(goal[b].mean()) / 20
        driven += 0.0 if state is None else 10 * float(state[b, 0, 0])
        return round((1 + text + driven) * t)

    def video(self, request: RolloutRequest, b: int, s: int) -> np.ndarray:
        now, generator = request.context_BVTHWC[b, :, -1], self.noise(request, b, s)
        frames = [now]
        for t in range(1, request.horizon):
            moved = np.roll(now, self.shift(request, b, s, t), axis=2).astype(int)
            frames.append((moved + generator.integers(-3, 4, moved.shape)).clip(0, 255).astype(np.uint8))
        return np.stack(frames, axis=1)


def run(model, *only, **settings):
    """Results by name of the checks of a model (a class is made anew at every load)."""
    results = check_world_model(model, CheckSettings(**({"max_samples": 5} | settings)), only=only)
    return {result.name: result for result in results}


def failed(results) -> set[str]:
    """Names of the checks that failed."""
    return {name for name, result in results.items() if result.status == "fail"}


def variant(**members):
    """``Good`` with other members."""
    return type("Broken", (Good,), members)
