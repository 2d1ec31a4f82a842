"""Whole episodes that only happened in a world model, with the drive targets at each picture."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import MissingCapabilityError
from physisforcing.core.protocols import InverseDynamics, WorldModel
from physisforcing.core.types import DT, WorldModelSpec

from .action_planner import noise_seed
from .decoder_checks import check_source
from .frame_store import resize_to
from .imagination import Imaginer


@dataclass(slots=True, kw_only=True)
class ImaginedEpisode:
    """What was imagined.

    ``frames_THWC`` uint8, frame 0 shows the picture it started from, as the model gives it back. ``steps_T``: control step of each
    frame, from 0. ``joints_NA``: drive targets u[0..N-1] at every control step, row 0 the real ones, float32. ``rollouts``: how many
    were chained, each from the last picture of the one before. ``seconds``: of both models.
    """

    frames_THWC: NDArray[np.uint8]
    steps_T: NDArray[np.int64]
    joints_NA: NDArray[np.float32]
    rollouts: int
    seconds: float = 0.0

    def joints_at_frames(self) -> NDArray[np.float32]:
        """[T,A] drive targets at the pictures."""
        return self.joints_NA[self.steps_T]


def frame_steps(spec: WorldModelSpec, frames: int) -> NDArray[np.int64]:
    """Control step of each of ``frames`` pictures. ``MissingCapabilityError`` for a model whose pictures fall between control steps."""
    steps = np.arange(frames) * spec.frame_dt / DT
    whole = np.rint(steps).astype(np.int64)
    if not np.allclose(steps, whole, atol=1e-3):
        wanted = f"frames at multiples of {DT} s"
        raise MissingCapabilityError("frame_dt", got=spec.frame_dt, wanted=wanted, fix="use a model of another rate")
    return whole


def head_context(picture_HWC: NDArray[np.uint8], spec: WorldModelSpec) -> NDArray[np.uint8]:
    """A head picture as the context of a model with one view and one context frame, uint8 [1,1,H,W,C]."""
    if spec.context_frames != 1 or len(spec.views.names) != 1 or spec.views.tiles or "frames" not in spec.returns:
        got = f"{spec.context_frames} context frames, views {spec.views.names}, returns {sorted(spec.returns)}"
        wanted = "one context frame of one view, and frames"
        fix = "use an image-to-video model of the head view"
        raise MissingCapabilityError("world_model", got=got, wanted=wanted, fix=fix)
    return resize_to(picture_HWC[None], spec.views.height, spec.views.width)[None]


class EpisodeImaginer:
    """A world model and a decoder that go on imagining from what they imagined (text-conditioned models)."""

    def __init__(self, world_model: WorldModel, decoder: InverseDynamics) -> None:
        spec = world_model.spec
        check_source(spec, decoder.needs)
        known = [horizon for horizon in decoder.needs.horizons or spec.horizons if horizon in spec.horizons]
        self.horizon = known[0] if known else spec.horizons[0]
        self.spec, self.decoder = spec, decoder
        self.rows = int(frame_steps(spec, self.horizon)[-1])
        self._imaginer = Imaginer(
            world_model, decoder, horizon=self.horizon, limits_2A=None, returns=frozenset({"frames"})
        )

    def imagine(
        self,
        picture_HWC: NDArray[np.uint8],
        history_RA: NDArray[np.float32],
        instruction: str,
        *,
        seed: int,
        min_rows: int = 1,
        about: tuple[str, int, int] = ("", 0, 0),
    ) -> ImaginedEpisode:
        """At least ``min_rows`` drive targets after the real ones.

        ``history_RA``: drive targets up to now, its last row those at the picture. Noise depends on (``seed``, number of the rollout).
        ``about``: (task, episode seed, number of the plan), for models that look their answer up.
        """
        chunks = math.ceil(min_rows / self.rows)
        seeds_K1 = np.array([[noise_seed(seed, 0, 0, chunk)] for chunk in range(chunks)], np.int64)
        rows_RA = np.asarray(history_RA, np.float32)
        context = head_context(picture_HWC, self.spec)
        made = self._imaginer.imagine(context, instruction, rows_RA, seeds_K1, about=about)
        assert made.frames_STHWC is not None
        frames = made.frames_STHWC[0]
        return ImaginedEpisode(
            frames_THWC=frames,
            steps_T=frame_steps(self.spec, len(frames)),
            joints_NA=np.concatenate([rows_RA[-1:], made.actions_SPA[0]]),
            rollouts=chunks,
            seconds=made.imagination_s + made.decoding_s,
        )
