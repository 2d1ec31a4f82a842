"""Joint targets of a whole recorded video, and policies that execute them open loop.

The oracle check: the decoder reads the video that a perfect world model would imagine. If this fails, the decoder is the
limit; if it succeeds where planning fails, the imagination is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.protocols import InverseDynamics
from physisforcing.core.types import DT, Observation, Rollout

from .frame_store import resize_to

#: Window of the decoder: pictures, control steps between two of them.
WINDOW_FRAMES, STRIDE = 17, 2


def decode_video(
    inverse_dynamics: InverseDynamics,
    frames_THWC: NDArray[np.uint8],
    state_A: NDArray[np.float32],
    *,
    height: int = 120,
    width: int = 160,
    prepare: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] | None = None,
) -> NDArray[np.float32]:
    """Joint targets [T-1, A] of a video at the control rate, from its pictures and the first frame's drive targets alone.

    Windows of 17 frames at stride 2 follow each other; each starts from the previous window's last prediction. Past the end
    the last picture repeats; the targets read there are dropped. ``prepare`` sees every window [17,H,W,3] first (e.g. a codec's
    round trip).
    """
    count = len(frames_THWC)
    times = np.arange(WINDOW_FRAMES, dtype=np.float64) * STRIDE * DT
    step = (WINDOW_FRAMES - 1) * STRIDE
    state, chunks = np.asarray(state_A, np.float32), []
    for start in range(0, max(1, count - 1), step):
        rows = np.minimum(start + STRIDE * np.arange(WINDOW_FRAMES), count - 1)
        window = resize_to(frames_THWC[rows], height, width)
        if prepare is not None:
            window = prepare(window)
        rollout = Rollout(times_T=times, frames_BSVTHWC=window[None, None, None])
        chunk = inverse_dynamics.decode(rollout, state[None], [""])[0][0].actions_PA
        chunks.append(chunk)
        state = chunk[-1]
    return np.concatenate(chunks)[: max(1, count - 1)]


class OpenLoopPolicy:
    """Executes given joint targets whatever happens, then holds the last one (``core.protocols.Policy``).

    Hands out one row a call, so that ``on_step(step)`` can read the simulator before every control step.
    """

    def __init__(
        self, name: str, targets_PA: NDArray[np.float32], on_step: Callable[[int], None] | None = None
    ) -> None:
        assert targets_PA.ndim == 2 and len(targets_PA)
        self._name, self._targets, self._on_step = name, np.asarray(targets_PA, np.float32), on_step

    @property
    def fingerprint(self) -> str:
        return self._name

    def reset(self, *, task: str, seed: int, instruction: str) -> None:
        pass

    def act(self, observation: Observation) -> NDArray[np.float32]:
        if self._on_step is not None:
            self._on_step(observation.step)
        return self._targets[min(observation.step, len(self._targets) - 1)][None]

    def telemetry(self) -> dict[str, float]:
        return {}


class RetrievedVideo:
    """The retrieval baseline's second half: the video of the nearest training demonstration, decoded instead of imagined.

    ``retrieval``: the first half (``envs.baselines.Retrieval``), which finds the demonstration; ``core.protocols.Policy``.
    """

    def __init__(self, retrieval: Any, decoder: InverseDynamics) -> None:
        self._retrieval, self._decoder = retrieval, decoder
        self._found: dict[str, float] = {}
        self._targets: NDArray[np.float32] | None = None

    @property
    def fingerprint(self) -> str:
        return f"{self._retrieval.fingerprint}-video-{self._decoder.fingerprint}"

    def reset(self, *, task: str, seed: int, instruction: str) -> None:
        self._task, self._targets, self._found = task, None, {}

    def act(self, observation: Observation) -> NDArray[np.float32]:
        if self._targets is None:
            episode, distance = self._retrieval.nearest(observation.images["head"], observation.state_A, self._task)
            self._found = {"retrieved_episode": float(episode), "retrieved_distance": distance}
            frames = self._retrieval.dataset.frames(episode)
            self._targets = decode_video(self._decoder, frames, observation.state_A)
            return self._targets
        return np.repeat(self._targets[-1:], WINDOW_FRAMES, axis=0)

    def telemetry(self) -> dict[str, float]:
        return dict(self._found)
