"""Policies as users write them, ``module:factory``, for tests of ``physis eval policy``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.types import Observation


class Swaying:
    """Swings around where it stands; how, depends on the episode's seed and the number of the plan alone."""

    fingerprint = "swaying"

    def __init__(self, settings: dict[str, Any]) -> None:
        self.rows = int(settings["policy"]["execute"])

    def reset(self, *, task: str, seed: int, instruction: str) -> None:
        self._seed, self._plans = seed, 0
        self._sum = 0.0

    def act(self, observation: Observation) -> NDArray[np.float32]:
        assert observation.images["head"].any(), "every plan begins with a picture"
        generator = np.random.default_rng([self._seed, self._plans])
        self._plans += 1
        goal_A = observation.state_A + generator.normal(0, 0.02, len(observation.state_A))
        self._sum += float(goal_A.sum())
        share_P1 = (np.arange(1, self.rows + 1) / self.rows)[:, None]
        return (observation.state_A + share_P1 * (goal_A - observation.state_A)).astype(np.float32)

    def telemetry(self) -> dict[str, float]:
        return {"plans": float(self._plans), "sum": self._sum}


class Standing(Swaying):
    """Stands still."""

    fingerprint = "standing"

    def act(self, observation: Observation) -> NDArray[np.float32]:
        self._plans += 1
        return np.repeat(observation.state_A[None], self.rows, axis=0)


class Falling(Standing):
    """Fails in scenes with an odd seed; wants a wrist's picture as well, and counts how often it is closed."""

    fingerprint = "falling"
    cameras = ("head", "left_wrist")
    closed = 0

    def act(self, observation: Observation) -> NDArray[np.float32]:
        assert observation.images["left_wrist"].shape == observation.images["head"].shape
        if self._seed % 2:
            raise RuntimeError("it fell over")
        return super().act(observation)

    def close(self) -> None:
        type(self).closed += 1


swaying, standing, falling = Swaying, Standing, Falling


def nothing(settings: dict[str, Any]) -> object:
    """No policy at all."""
    return object()
