"""The drive targets of an episode so far, for models that read those of earlier control steps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def lagged(rows_RA: NDArray[np.float32], lags: tuple[int, ...]) -> NDArray[np.float32]:
    """[K,A] the rows ``lags`` before the last one, clamped at the first."""
    last = len(rows_RA) - 1
    return np.stack([rows_RA[max(0, last - lag)] for lag in lags])


class StateHistory:
    """Drive targets of the episode so far, to give a model those of earlier control steps.

    A planner or policy is only called when its rows are used up; what happened in between is what it commanded itself.
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
        return lagged(self.rows_RA, lags)

    @property
    def rows_RA(self) -> NDArray[np.float32]:
        """Drive targets of all control steps so far, the last row is now."""
        return np.stack(self._rows)
