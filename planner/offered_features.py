"""Features for training a decoder from any world model that offers them, through the contract alone: ``rollout`` with ``features``."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from physisforcing.core.errors import MissingCapabilityError
from physisforcing.core.protocols import WorldModel
from physisforcing.core.requests import rollout_in_parts
from physisforcing.core.types import FeatureRequest, RolloutRequest

from .decoder_windows import DecoderWindows, check_window, check_windows
from .feature_decoder.goal import TextEncoder


class OfferedFeatures:
    """What ``decoder_windows.FrozenWorldModel`` is to the feature decoder's training, for somebody else's model.

    The model sees of a window what a planner would show it: the first picture, the instruction, the drive targets at its lags, and one
    noise seed a window. ``MissingCapabilityError`` for a model without features, with actions, several views or context frames, or
    without rollouts of the windows' length; ``UserError`` for another rate.
    """

    def __init__(self, model: WorldModel, windows: DecoderWindows, text: TextEncoder) -> None:
        spec, wanted = model.spec, "features from one picture of one view, without actions"
        views = 1 if spec.views.tiles else len(spec.views.names)
        if "features" not in spec.returns or "actions" in spec.conditions or (spec.context_frames, views) != (1, 1):
            got = f"{spec.name}: returns {sorted(spec.returns)}, conditions {sorted(spec.conditions)}, {views} views"
            fix = "give a model whose rollout answers returns={'features'}: docs/bring_your_world_model.md"
            raise MissingCapabilityError("world_model", got=got, wanted=wanted, fix=fix)
        check_windows(windows, spec)
        self.model, self.windows, self.text = model, windows, text

    def feature_shape(self, request: FeatureRequest) -> tuple[int, int, int, int]:
        """(F, h, w, D) of one tap, measured on the first window."""
        zero = torch.zeros(1, dtype=torch.int64, device=self.windows.store.first_E.device)
        generator = torch.Generator(zero.device).manual_seed(0)
        found = self.features(zero, zero, request, generator)
        if found.ndim != 6 or found.shape[1] != len(request.taps):
            got, wanted = list(found.shape), f"[B,{len(request.taps)},F,h,w,D]"
            fix = "return one row of features a tap: physis check worldmodel"
            raise MissingCapabilityError("features_BSKFhwD", got=got, wanted=wanted, fix=fix)
        frames, height, width, dim = found.shape[2:]
        return frames, height, width, dim

    def check_window(self, frames: int, steps_per_frame: int, *, field: str) -> None:
        """See ``decoder_windows.check_window``."""
        check_window(self.windows, frames, steps_per_frame, field=field)

    @torch.no_grad()
    def features(
        self, episode_B: Tensor, start_B: Tensor, request: FeatureRequest, generator: torch.Generator
    ) -> Tensor:
        """Features [B,K,F,h,w,D] float32 of the first picture of each window, with seeds drawn from ``generator``."""
        spec, windows = self.model.spec, self.windows
        lags, device = spec.proprioception_lags, windows.store.first_E.device
        seeds = torch.randint(2**62, (len(episode_B), 1), generator=generator, device=generator.device)
        state = windows.proprioception(episode_B, start_B, lags).cpu().numpy() if lags else None
        rollout = rollout_in_parts(
            self.model,
            RolloutRequest(
                context_BVTHWC=windows.first_pictures(episode_B, start_B).cpu().numpy()[:, None],
                instructions=[windows.store.instructions_E[episode] for episode in episode_B.tolist()],
                seeds_BS=seeds.cpu().numpy(),
                horizon=windows.frames,
                proprioception_BKA=state,
                returns=frozenset({"features"}),
                features=request,
            ),
            spec.max_batch,
        )
        assert rollout.features_BSKFhwD is not None, f"{spec.name} gave no features"
        return torch.from_numpy(np.array(rollout.features_BSKFhwD[:, 0], np.float32)).to(device)
