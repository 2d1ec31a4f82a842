"""Planning with the perfect model and the perfect decoder: the expert, replanned, its own drive targets executed, exactly or with errors."""

from __future__ import annotations

import time
import zlib

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


#: Control steps over which errors are correlated: standard deviation of the smoothing kernel.
SMOOTH = 2.0


class SmoothErrors:
    """A ``core.protocols.Policy``: the perfect planner's targets with the errors that a decoder makes, normal with a standard deviation of
    ``degrees`` and correlated over about five control steps; on grippers the same number in percent of their opening.

    The expert acts from where the errors led, so that episodes hold what demonstrations lack: states beside the path, and the way back
    from them (noise in the demonstrator's place: DART, Laskey et al. 2017). ``vary``: each episode has its own deviation, uniform up to
    ``degrees``, and its own errors, by task and seed; without it errors depend on the seed alone. Errors of different plans are
    independent, as a decoder's are, so that targets jump where a new plan begins.
    """

    def __init__(self, planner: PerfectPlanner, degrees: float, *, vary: bool = False) -> None:
        self.planner, self.degrees, self.vary = planner, degrees, vary
        self.fingerprint = f"{planner.fingerprint}-{'up-to-' if vary else ''}{degrees:g}deg"
        spec = planner.model.spec.action_spec
        assert spec is not None, "a bound model has one"
        self._grips = [name.endswith("gripper") for name in spec.names]
        self.error_deg = degrees

    def reset(self, *, task: str, seed: int, instruction: str) -> None:
        own = [zlib.crc32(task.encode())] if self.vary else []
        self._generator = np.random.default_rng([seed, 17, *own])
        self.error_deg = self.degrees * (np.random.default_rng([seed, 18, *own]).random() if self.vary else 1.0)
        self.planner.reset(task=task, seed=seed, instruction=instruction)

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """Joint targets [execute_horizon, A] from now."""
        actions_PA = self.planner.act(observation)
        kernel = np.exp(-0.5 * (np.arange(-6, 7) / SMOOTH) ** 2)
        kernel /= np.sqrt((kernel**2).sum())
        white = self._generator.normal(size=(len(actions_PA) + len(kernel) - 1, actions_PA.shape[1]))
        smooth = np.stack([np.convolve(column, kernel, mode="valid") for column in white.T], axis=1)
        scale_A = np.where(self._grips, self.error_deg / 100, np.deg2rad(self.error_deg))
        return (actions_PA + scale_A * smooth).astype(np.float32)

    def telemetry(self) -> dict[str, float]:
        """The planner's, and the deviation of this episode's errors in degrees."""
        return self.planner.telemetry() | {"error_deg": float(self.error_deg)}
