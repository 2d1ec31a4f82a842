"""Planning with the perfect model and the perfect decoder: the expert, replanned, its own drive targets executed."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError
from physisforcing.core.pictures import shrink_area
from physisforcing.core.types import Observation, RolloutRequest

from .simulator_world_model import SimulatorWorldModel


class PerfectPlanner:
    """A ``core.protocols.Policy``: at each plan the expert's future from the state as it is, and of it the first ``execute_horizon`` targets.

    What a decoder that makes no error would reach under the same planner: the ceiling for every world model and decoder. ``model``: bound
    to the live environment, in text mode.
    """

    def __init__(self, model: SimulatorWorldModel, *, execute_horizon: int = 32) -> None:
        self.model, self.execute_horizon = model, execute_horizon
        spec = model.spec
        self._horizon = max(spec.horizons)
        rows = (self._horizon - 1) * model.config.stride
        if not 1 <= execute_horizon <= rows:
            fix = "16, 24 and 32 are usual"
            raise UserError("execute_horizon", got=execute_horizon, wanted=f"1..{rows}", fix=fix)
        self.fingerprint = f"perfect-{execute_horizon}-{spec.fingerprint}"
        self._counts: dict[str, float] = {}

    def reset(self, *, task: str, seed: int, instruction: str) -> None:
        self._counts = {"plans": 0.0, "expert_failed": 0.0, "imagination_s": 0.0}

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """Joint targets [execute_horizon, A] from now."""
        spec = self.model.spec
        pictures = np.stack([observation.images[name] for name in spec.views.names])
        request = RolloutRequest(
            context_BVTHWC=shrink_area(pictures, self.model.config.shrink)[None, :, None],
            instructions=[observation.instruction],
            seeds_BS=np.zeros((1, 1), np.int64),
            horizon=self._horizon,
        )
        began = time.perf_counter()
        found = self.model.imagine(request)[0][0]
        self._counts["imagination_s"] += time.perf_counter() - began
        self._counts["plans"] += 1
        self._counts["expert_failed"] += bool(found.failure)
        return found.actions_PA[: self.execute_horizon]

    def telemetry(self) -> dict[str, float]:
        """Plans, plans in which the expert found no way, seconds."""
        return dict(self._counts)
