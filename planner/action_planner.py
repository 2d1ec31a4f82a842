"""Planning with a world model: imagine, read joint targets out of the imagination, execute a chunk, imagine again."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.history import StateHistory
from physisforcing.core.protocols import InverseDynamics, VideoRecorderHook, WorldModel
from physisforcing.core.results import config_hash
from physisforcing.core.types import DT, ActionSpec, Observation

from .imagination import Imagination, Imaginer, context_pictures
from .plannable import check_conditions, check_plannable
from .verifiers import Verifier, VerifierInput, make_verifier


@dataclass(slots=True, kw_only=True)
class ActionPlannerConfig:
    """``execute_horizon``: rows of the chunk that are executed before the next plan. ``min_motion``: a chunk whose targets all
    stay within this distance of the drive targets (radians; gripper opening) would not move the robot; where no candidate
    moves, all are imagined again with the next noise seeds, at most ``max_resamples`` times. ``horizon``: imagined frames, the
    current one included. ``candidates``: futures imagined for a plan, of which ``verifier`` (``verifiers.make_verifier``)
    chooses one. ``rollout_chunks``: a plan is so many rollouts long, each going on from the last picture of the one before."""

    execute_horizon: int = 32
    horizon: int = 17
    min_motion: float = 0.02
    max_resamples: int = 3
    candidates: int = 1
    verifier: str = ""
    rollout_chunks: int = 1


def noise_seed(episode_seed: int, replan: int, candidate: int, chunk: int = 0) -> int:
    """Seed of one rollout's noise, from what it is for and nothing else: 63 bits of a hash."""
    later = f":{chunk}" if chunk else ""
    digest = hashlib.sha256(f"rollout:{episode_seed}:{replan}:{candidate}{later}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class ActionPlanner:
    """World model and inverse dynamics as a ``core.protocols.Policy``.

    Context are the pictures now, resized by area to the world model's views. The candidates of a plan are one batched rollout;
    noise depends on (episode seed, number of the plan, candidate, chunk). ``recorder`` receives the imagined video of every
    executed plan, where the decoder reads pictures or ``show`` asks for them anyway. ``action_spec``: limits that chunks are clipped to, as the environment
    would do, so that the history holds what is executed; clipped rows are counted. ``verifier``: instead of the one that the
    settings name, for instance with a trained classifier.

    Raises ``MissingCapabilityError`` for a model that cannot be planned with (``plannable``), such as one that must be given actions.
    """

    def __init__(
        self,
        world_model: WorldModel,
        inverse_dynamics: InverseDynamics,
        config: ActionPlannerConfig | None = None,
        recorder: VideoRecorderHook | None = None,
        action_spec: ActionSpec | None = None,
        verifier: Verifier | None = None,
        show: bool = False,
    ) -> None:
        check_conditions(world_model.spec)
        self.world_model, self.inverse_dynamics, self.recorder = world_model, inverse_dynamics, recorder
        self.config = config or ActionPlannerConfig()
        self.action_spec, self.show = action_spec, show
        self.verifier = self._chosen(verifier)
        self._check()
        pictures = (
            show or self.config.rollout_chunks > 1 or (self.verifier is not None and "frames" in self.verifier.needs)
        )
        self._imaginer = Imaginer(
            world_model,
            inverse_dynamics,
            horizon=self.config.horizon,
            limits_2A=None if action_spec is None else np.array([action_spec.low, action_spec.high], np.float32),
            returns=frozenset({"frames"}) if pictures else frozenset(),
        )
        self.reset(task="", seed=0, instruction="")

    @property
    def fingerprint(self) -> str:
        """Weights and settings; what does not change the result is left out."""
        parts: dict[str, Any] = {
            "world_model": self.world_model.spec.fingerprint,
            "decoder": self.inverse_dynamics.fingerprint,
        }
        parts |= asdict(self.config)
        del parts["verifier"]
        if self.verifier is None:
            del parts["candidates"]
        else:
            parts["verifier"] = self.verifier.fingerprint
        if self.config.rollout_chunks == 1:
            del parts["rollout_chunks"]
        return f"{self.world_model.spec.name}-{config_hash(parts)}"

    def reset(self, *, task: str, seed: int, instruction: str) -> None:
        self._task, self._seed, self._instruction = task, seed, instruction
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
        if self.verifier is not None:
            self._counts |= dict.fromkeys(("candidates", "verifying_s", "verifier_chosen", "verifier_mean"), 0.0)

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """Joint targets [execute_horizon, A] from now."""
        self._history.observe(observation.step, observation.state_A, self._executed)
        for attempt in range(self.config.max_resamples + 1):
            imagined = self._imagine(observation, attempt)
            motion_S = np.abs(imagined.actions_SPA - observation.state_A).max(axis=(1, 2)).astype(np.float64)
            moves_S = motion_S >= self.config.min_motion
            if moves_S.any():
                break
            if attempt < self.config.max_resamples:
                self._counts["resampled"] += 1
        best = self._best(imagined, moves_S, observation)
        self._counts["still"] += not moves_S.any()
        self._counts["plans"] += 1
        if imagined.spread_SP is not None:
            self._counts["spread"] += float(imagined.spread_SP[best].mean())
        if self.recorder is not None and imagined.frames_STHWC is not None:
            self.recorder.imagined(observation.step, imagined.frames_STHWC[best])
        rows = np.ascontiguousarray(imagined.actions_SPA[best, : self.config.execute_horizon], np.float32)
        self._counts["clipped"] += float((rows != imagined.decoded_SPA[best, : len(rows)]).any(axis=1).sum())
        self._executed = rows
        return rows

    def telemetry(self) -> dict[str, float]:
        """Plans, resampled plans, plans that stayed still after all resamples, rows clipped to the joint limits, seconds, mean
        spread (radians). With several candidates also how many were imagined, and the mean over plans of the verifier's score of
        the chosen one and of all of them."""
        plans = max(1.0, self._counts["plans"])
        means = ("spread", "verifier_chosen", "verifier_mean")
        return self._counts | {name: self._counts[name] / plans for name in means if name in self._counts}

    def _imagine(self, observation: Observation, attempt: int) -> Imagination:
        """All candidates of the ``attempt``-th try of this plan."""
        plan, count = int(self._counts["plans"]), self.config.candidates
        candidates = range(attempt * count, (attempt + 1) * count)
        chunks = range(self.config.rollout_chunks)
        seeds_KS = [[noise_seed(self._seed, plan, candidate, chunk) for candidate in candidates] for chunk in chunks]
        imagined = self._imaginer.imagine(
            context_pictures(observation, self.world_model.spec),
            self._instruction or observation.instruction,
            self._history.rows_RA,
            np.array(seeds_KS, np.int64),
            about=(self._task, self._seed, plan),
        )
        self._counts["imagination_s"] += imagined.imagination_s
        self._counts["decoding_s"] += imagined.decoding_s
        if self.verifier is not None:
            self._counts["candidates"] += count
        return imagined

    def _best(self, imagined: Imagination, moves_S: NDArray[np.bool_], observation: Observation) -> int:
        """The candidate to execute: the best one that moves, the first of equals."""
        if self.verifier is None:
            return 0
        began = time.perf_counter()
        scores_S = self.verifier.score(
            VerifierInput(
                actions_SPA=imagined.actions_SPA,
                decoded_SPA=imagined.decoded_SPA,
                state_A=observation.state_A,
                execute=self.config.execute_horizon,
                seeds_S=imagined.seeds_S,
                task=self._task,
                instruction=self._instruction or observation.instruction,
                frames_STHWC=imagined.frames_STHWC,
                spread_SP=imagined.spread_SP,
                action_spec=self.action_spec,
            )
        )
        assert scores_S.shape == moves_S.shape and np.isfinite(scores_S).all(), scores_S
        best = int(np.where(moves_S, scores_S, -np.inf).argmax()) if moves_S.any() else int(scores_S.argmax())
        self._counts["verifying_s"] += time.perf_counter() - began
        self._counts["verifier_chosen"] += float(scores_S[best])
        self._counts["verifier_mean"] += float(scores_S.mean())
        return best

    def _chosen(self, verifier: Verifier | None) -> Verifier | None:
        """The verifier to use; None where there is nothing to choose from."""
        config = self.config
        for name in ("candidates", "rollout_chunks"):
            if getattr(config, name) < 1:
                raise UserError(f"planner.{name}", got=getattr(config, name), wanted="at least 1", fix=f"{name}=1")
        if config.candidates == 1:
            return None
        if verifier is None and not config.verifier:
            fix = "planner.verifier=spread, or planner.candidates=1"
            raise UserError("planner.verifier", got="", wanted="a way to choose among candidates", fix=fix)
        chosen = make_verifier(config.verifier) if verifier is None else verifier
        if "action_spec" in chosen.needs and self.action_spec is None:
            fix = "give the planner the environment's action_spec, or use planner.verifier=spread"
            raise MissingCapabilityError("planner.verifier", got="no limits", wanted="an ActionSpec", fix=fix)
        return chosen

    def _check(self) -> None:
        spec, config = self.world_model.spec, self.config
        also = {"frames"} if config.rollout_chunks > 1 or self.show else set()
        also |= (self.verifier.needs & {"frames"}) if self.verifier is not None else set()
        check_plannable(spec, self.inverse_dynamics.needs, horizon=config.horizon, also=frozenset(also))
        rows = round((config.horizon - 1) * spec.frame_dt / DT) * config.rollout_chunks
        if not 1 <= config.execute_horizon <= rows:
            raise UserError(
                "planner.execute_horizon",
                got=config.execute_horizon,
                wanted=f"1..{rows}",
                fix="16, 24 and 32 are usual",
            )
