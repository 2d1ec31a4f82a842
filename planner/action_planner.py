"""Planning with a world model: imagine, read joint targets out of the imagination, execute a chunk, imagine again."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.protocols import InverseDynamics, VideoRecorderHook, WorldModel
from physisforcing.core.results import config_hash
from physisforcing.core.types import DT, ActionChunk, ActionSpec, Observation, RolloutRequest

from .frame_store import resize_to


@dataclass(slots=True, kw_only=True)
class ActionPlannerConfig:
    """``execute_horizon``: rows of the chunk that are executed before the next plan. ``min_motion``: a chunk whose targets all
    stay within this distance of the drive targets (radians; gripper opening) would not move the robot and is imagined again with
    the next noise seed, at most ``max_resamples`` times. ``horizon``: imagined frames, the current one included."""

    execute_horizon: int = 32
    horizon: int = 17
    min_motion: float = 0.02
    max_resamples: int = 3


def noise_seed(episode_seed: int, replan: int, candidate: int) -> int:
    """Seed of one rollout's noise, from what it is for and nothing else: 63 bits of a hash."""
    digest = hashlib.sha256(f"rollout:{episode_seed}:{replan}:{candidate}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class StateHistory:
    """Drive targets of the episode so far, to give the world model those of earlier control steps.

    The planner is only called when its rows are used up; what happened in between is what it commanded itself.
    """

    def __init__(self) -> None:
        self._rows: list[NDArray[np.float32]] = []

    def observe(self, step: int, state_A: NDArray[np.float32], executed_PA: NDArray[np.float32] | None) -> None:
        """The drive targets at ``step``; ``executed_PA`` are the rows handed out at the last call (None at the first)."""
        if executed_PA is not None:
            self._rows.extend(executed_PA[: step - len(self._rows)])
        del self._rows[step:]
        assert len(self._rows) == step, f"{len(self._rows)} rows known before step {step}"
        self._rows.append(np.array(state_A, np.float32))

    def lagged(self, lags: tuple[int, ...]) -> NDArray[np.float32]:
        """[K,A] drive targets ``lags`` control steps ago, clamped at the episode's start."""
        last = len(self._rows) - 1
        return np.stack([self._rows[max(0, last - lag)] for lag in lags])


class ActionPlanner:
    """World model and inverse dynamics as a ``core.protocols.Policy``.

    Context is the head picture now, resized by area to the world model's view. Noise depends on (episode seed, number of the
    plan, candidate). ``recorder`` receives the imagined video of every executed plan. ``action_spec``: limits that chunks are
    clipped to, as the environment would do, so that the history holds what is executed; clipped rows are counted.
    """

    def __init__(
        self,
        world_model: WorldModel,
        inverse_dynamics: InverseDynamics,
        config: ActionPlannerConfig | None = None,
        recorder: VideoRecorderHook | None = None,
        action_spec: ActionSpec | None = None,
    ) -> None:
        self.world_model, self.inverse_dynamics, self.recorder = world_model, inverse_dynamics, recorder
        self.config = config or ActionPlannerConfig()
        self._limits = None if action_spec is None else np.array([action_spec.low, action_spec.high], np.float32)
        self._check()
        self.reset(task="", seed=0, instruction="")

    @property
    def fingerprint(self) -> str:
        parts = {"world_model": self.world_model.spec.fingerprint, "decoder": self.inverse_dynamics.fingerprint}
        parts |= asdict(self.config)
        return f"{self.world_model.spec.name}-{config_hash(parts)}"

    def reset(self, *, task: str, seed: int, instruction: str) -> None:
        self._seed, self._instruction = seed, instruction
        self._history = StateHistory()
        self._executed: NDArray[np.float32] | None = None
        self._counts = {
            "plans": 0.0,
            "resampled": 0.0,
            "still": 0.0,
            "clipped": 0.0,
            "imagination_s": 0.0,
            "decoding_s": 0.0,
            "spread": 0.0,
        }

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """Joint targets [execute_horizon, A] from now."""
        self._history.observe(observation.step, observation.state_A, self._executed)
        for candidate in range(self.config.max_resamples + 1):
            frames, chunk = self._imagine(observation, candidate)
            targets_PA = chunk.actions_PA if self._limits is None else chunk.actions_PA.clip(*self._limits)
            still = float(np.abs(targets_PA - observation.state_A).max()) < self.config.min_motion
            if not still:
                break
            if candidate < self.config.max_resamples:
                self._counts["resampled"] += 1
        self._counts["still"] += still
        self._counts["plans"] += 1
        if chunk.spread_P is not None:
            self._counts["spread"] += float(chunk.spread_P.mean())
        if self.recorder is not None:
            self.recorder.imagined(observation.step, frames)
        rows = np.ascontiguousarray(targets_PA[: self.config.execute_horizon], np.float32)
        self._counts["clipped"] += float((rows != chunk.actions_PA[: len(rows)]).any(axis=1).sum())
        self._executed = rows
        return rows

    def telemetry(self) -> dict[str, float]:
        """Plans, resampled plans, plans that stayed still after all resamples, rows clipped to the joint limits, seconds, mean
        spread (radians)."""
        plans = max(1.0, self._counts["plans"])
        return self._counts | {"spread": self._counts["spread"] / plans}

    def _imagine(self, observation: Observation, candidate: int) -> tuple[NDArray[np.uint8], ActionChunk]:
        spec = self.world_model.spec
        pictures = [observation.images[name] for name in spec.views.names]
        context = np.stack([resize_to(p[None], spec.views.height, spec.views.width) for p in pictures])
        request = RolloutRequest(
            context_BVTHWC=context[None],
            instructions=[self._instruction or observation.instruction],
            seeds_BS=np.array([[noise_seed(self._seed, int(self._counts["plans"]), candidate)]], np.int64),
            horizon=self.config.horizon,
            proprioception_BKA=self._history.lagged(spec.proprioception_lags)[None]
            if spec.proprioception_lags
            else None,
        )
        began = time.perf_counter()
        rollout = self.world_model.rollout(request)
        self._counts["imagination_s"] += time.perf_counter() - began
        assert rollout.frames_BSVTHWC is not None
        frames = rollout.frames_BSVTHWC[0, 0, 0]
        began = time.perf_counter()
        chunk = self.inverse_dynamics.decode(rollout, observation.state_A[None], request.instructions)[0][0]
        self._counts["decoding_s"] += time.perf_counter() - began
        return frames, chunk

    def _check(self) -> None:
        spec, config = self.world_model.spec, self.config
        if spec.context_frames != 1 or "frames" not in spec.returns:
            raise MissingCapabilityError(
                "world_model",
                got=f"{spec.context_frames} context frames, returns {sorted(spec.returns)}",
                wanted="1 context frame, returns frames",
                fix="plan with an image-to-video model",
            )
        if config.horizon not in spec.horizons:
            raise MissingCapabilityError(
                "planner.horizon",
                got=config.horizon,
                wanted=f"one of {spec.horizons}",
                fix="choose a horizon of the model",
            )
        rows = round((config.horizon - 1) * spec.frame_dt / DT)
        if not 1 <= config.execute_horizon <= rows:
            raise UserError(
                "planner.execute_horizon",
                got=config.execute_horizon,
                wanted=f"1..{rows}",
                fix="16, 24 and 32 are usual",
            )
