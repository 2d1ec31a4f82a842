"""The seams between rooms: anyone's model that satisfies these plugs in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .types import ActionChunk, DecoderNeeds, Observation, Rollout, RolloutRequest, WorldModelSpec


@runtime_checkable
class WorldModel(Protocol):
    """Imagines what happens next."""

    @property
    def spec(self) -> WorldModelSpec: ...

    def rollout(self, request: RolloutRequest) -> Rollout:
        """Raise ``MissingCapabilityError`` for anything the spec does not offer."""
        ...


@runtime_checkable
class InverseDynamics(Protocol):
    """Reads joint targets out of a rollout."""

    @property
    def needs(self) -> DecoderNeeds:
        """What the rollout must hold; the planner asks the world model for it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identifies weights and settings in results."""
        ...

    def decode(
        self, rollout: Rollout, state_BA: NDArray[np.float32], instructions: Sequence[str]
    ) -> list[list[ActionChunk]]:
        """A rollout of B contexts with S candidates each, the drive targets now and B instructions -> chunks ``[b][s]``.

        A chunk has ``round(rollout.times_T[-1] / DT)`` targets, one a control step from now. Raises ``MissingCapabilityError`` for a
        rollout without what ``needs`` names.
        """
        ...


@runtime_checkable
class Policy(Protocol):
    """Anything that acts in a closed loop: planners, policies, baselines."""

    @property
    def fingerprint(self) -> str:
        """Identifies weights and settings in results."""
        ...

    def reset(self, *, task: str, seed: int, instruction: str) -> None:
        """A new episode starts; ``seed`` is the episode's and feeds the noise of this episode."""
        ...

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """Joint targets [P,A] to execute from now, at least one row. Called again when they are used up."""
        ...

    def telemetry(self) -> dict[str, float]:
        """Counts and seconds of the episode so far (plans, resampled plans, imagination seconds)."""
        ...


@runtime_checkable
class VideoRecorderHook(Protocol):
    """Receives each imagined video of an episode, for reports."""

    def imagined(self, step: int, frames_THWC: NDArray[np.uint8]) -> None: ...
