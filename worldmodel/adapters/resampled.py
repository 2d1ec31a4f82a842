"""A world model at another rate: frames at the times that a decoder reads, chosen by ``core.resampling`` from those the model imagines."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import MissingCapabilityError
from physisforcing.core.protocols import WorldModel
from physisforcing.core.requests import check_request
from physisforcing.core.resampling import SAME_TIME, nearest_rows
from physisforcing.core.results import config_hash
from physisforcing.core.types import DecoderNeeds, Rollout, RolloutRequest, WorldModelSpec


def for_decoder(world_model: WorldModel, needs: DecoderNeeds) -> WorldModel:
    """``world_model`` as it is where a decoder with these ``needs`` can read it, or where frames cannot help; else at the decoder's rate.

    Raises ``MissingCapabilityError`` for a model whose rollouts end before the decoder's last frame.
    """
    spec = world_model.spec
    same_rate = needs.frame_dt is None or abs(needs.frame_dt - spec.frame_dt) <= SAME_TIME
    same_length = not needs.horizons or any(frames in spec.horizons for frames in needs.horizons)
    if (same_rate and same_length) or needs.returns != {"frames"} or "frames" not in spec.returns:
        return world_model
    frame_dt = spec.frame_dt if needs.frame_dt is None else needs.frame_dt
    lengths = needs.horizons or tuple(frames_within((h - 1) * spec.frame_dt, frame_dt) for h in spec.horizons)
    return ResampledWorldModel(world_model, frames=min(lengths), frame_dt=frame_dt)


def frames_within(seconds: float, frame_dt: float) -> int:
    """How many frames fit into so many seconds, one at either end."""
    return math.floor((seconds + SAME_TIME) / frame_dt) + 1


class ResampledWorldModel:
    """``frames`` frames, one every ``frame_dt`` seconds, each the nearest in time of what ``world_model`` imagines.

    The shortest of its rollouts that lasts long enough is asked for. Actions are passed on; where that rollout lasts longer than they do,
    the last one is held. Latents and features are not offered: they have no rate of their own to choose from.
    """

    def __init__(self, world_model: WorldModel, *, frames: int, frame_dt: float) -> None:
        spec = world_model.spec
        lasts = (frames - 1) * frame_dt
        enough = [h for h in spec.horizons if (h - 1) * spec.frame_dt >= lasts - SAME_TIME]
        if not enough or "frames" not in spec.returns:
            got = f"{max(spec.horizons)} frames every {spec.frame_dt:.4g} s, returns {sorted(spec.returns)}"
            fix = "more frames or fewer a second in its settings"
            raise MissingCapabilityError("world_model", got=got, wanted=f"frames for {lasts:.4g} s", fix=fix)
        self.world_model, self.inner_horizon = world_model, min(enough)
        self.wanted_T = np.arange(frames) * frame_dt
        parts = {"world_model": spec.fingerprint, "frames": frames, "frame_dt": frame_dt}
        self._spec = dataclasses.replace(
            spec,
            horizons=(frames,),
            frame_dt=frame_dt,
            returns=frozenset({"frames"}),
            fingerprint=config_hash(parts),
            blocks=0,
        )

    @property
    def spec(self) -> WorldModelSpec:
        return self._spec

    def rollout(self, request: RolloutRequest) -> Rollout:
        """See core's ``WorldModel``."""
        check_request(request, self._spec)
        inner = dataclasses.replace(request, horizon=self.inner_horizon, actions_BSPA=self._actions(request))
        made = self.world_model.rollout(inner)
        assert made.frames_BSVTHWC is not None
        rows = nearest_rows(made.times_T, self.wanted_T)
        return Rollout(times_T=self.wanted_T.copy(), frames_BSVTHWC=made.frames_BSVTHWC[:, :, :, rows], cost=made.cost)

    def close(self) -> None:
        """Close the model, where it has something to close."""
        close = getattr(self.world_model, "close", None)
        if close is not None:
            close()

    def _actions(self, request: RolloutRequest) -> NDArray[np.float32] | None:
        actions, spec = request.actions_BSPA, self.world_model.spec
        if actions is None or spec.action_spec is None:
            return actions
        rows = round((self.inner_horizon - 1) * spec.frame_dt / spec.action_spec.dt)
        pad: Any = [(0, 0), (0, 0), (0, max(0, rows - actions.shape[2])), (0, 0)]
        return np.pad(actions, pad, mode="edge")
