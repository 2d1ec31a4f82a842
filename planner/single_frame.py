"""A decoder that reads the robot's pose from each picture alone: how much of decoding is plain pose reading.

It sees no motion, no present joints and no instruction. Targets of control steps between two pictures are interpolated. A reference
row beside the pixel decoder, not something to plan with.
"""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from .decoder_files import config_of, load_weights, read_config, save_decoder
from .inverse_dynamics import STATISTICS, FrameEncoder, InverseDynamicsConfig, PictureDecoder


class SingleFrameInverseDynamics(PictureDecoder):
    """The pixel decoder's picture encoder, without differences to the picture before, and one linear layer to a pose."""

    def __init__(self, config: InverseDynamicsConfig | None = None) -> None:
        super().__init__(config or InverseDynamicsConfig())
        self.encoder = FrameEncoder(self.config)
        self.pose = nn.Linear(self.config.dim, 2 * self.config.action_dim)
        nn.init.trunc_normal_(self.pose.weight, std=0.02)
        nn.init.zeros_(self.pose.bias)

    def poses(self, frames_BTHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures uint8 -> (drive targets at each picture's time [B,T,A], log variance in ``delta_std_A`` [B,T,A])."""
        pictures = rearrange(frames_BTHWC, "B T H W C -> (B T) C H W").to(self.pose.weight.dtype) / 127.5 - 1.0
        x = torch.cat([pictures, torch.zeros_like(pictures)], dim=1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, enabled=False):
            out = self.pose(self.encoder(x).float())
        mean, log_variance = rearrange(out, "(B T) (Q A) -> Q B T A", B=len(frames_BTHWC), Q=2)
        return self.state_mean_A + mean * self.state_std_A, log_variance.clamp(-12.0, 4.0)

    def forward(self, frames_BTHWC: Tensor, state_BA: Tensor) -> tuple[Tensor, Tensor]:
        """``state_BA`` is not read."""
        c = self.config
        assert frames_BTHWC.dtype == torch.uint8 and frames_BTHWC.shape[1:] == (c.frames, c.height, c.width, 3)
        mean, log_variance = self.poses(frames_BTHWC)
        return between(mean, c.steps_per_frame), between(log_variance, c.steps_per_frame)


def between(values_BTA: Tensor, steps: int) -> Tensor:
    """Values at pictures ``steps`` control steps apart -> at every control step after the first, linear in between: [B,(T-1)*steps,A]."""
    share = torch.arange(1, steps + 1, device=values_BTA.device, dtype=values_BTA.dtype).view(-1, 1) / steps
    before, after = values_BTA[:, :-1, None], values_BTA[:, 1:, None]
    return (before + share * (after - before)).flatten(1, 2)


def save_single_frame_decoder(
    model: SingleFrameInverseDynamics, folder: str | Path, *, card: str | None = None
) -> Path:
    """Network float16, statistics float32, configuration and card."""
    return save_decoder(model, folder, kind="single_frame", exact=STATISTICS, card=card)


def load_single_frame_decoder(folder: str | Path, device: str = "cpu") -> SingleFrameInverseDynamics:
    """What ``save_single_frame_decoder`` wrote."""
    model = SingleFrameInverseDynamics(config_of(InverseDynamicsConfig, read_config(folder), "single_frame"))
    model.fingerprint = load_weights(model, folder, device)
    return model
