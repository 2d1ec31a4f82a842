"""A light causal video autoencoder: 120x160 windows of 4k+1 frames <-> latents [16, 1+k, 15, 20].

Pictures are pixel-unshuffled by 4 before the first convolution (no full-resolution block), encoded one by one to 1/8 size, and
grouped causally: group 0 is frame 0, group k the frames 4k-3..4k together with the previous group's features. The decoder sees
latent k, latent k-1 and latent 0 (the static background is read from the first latent). Everything runs in parallel over time.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn

from .codec import STRIDE, latent_frames, to_unit_range


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each position, in the input's precision. [N,C,h,w] -> [N,C,h,w].

    It mixes neither positions nor frames, and is one fused kernel on channels-last pictures.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            normed = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight.to(x.dtype), None, 1e-5)
        return normed.permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """Pre-norm residual block of two 3x3 convolutions; the second starts at zero. [N,C,h,w] -> [N,C,h,w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = ChannelNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


def _blocks(channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*[ResidualBlock(channels) for _ in range(count)])


def _previous(groups_BKChw: Tensor) -> Tensor:
    """Group k-1 at place k; group 0 stands for its own predecessor."""
    return torch.cat([groups_BKChw[:, :1], groups_BKChw[:, :-1]], dim=1)


class CausalVideoAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """See the module's docstring. Implements ``VideoCodec``; ``posterior`` and ``reconstruct`` are its training interface.

    ``fine_channels`` live at 1/4 size, ``coarse_channels`` at 1/8 size per frame, ``group_channels`` at 1/8 size per latent.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        fine_channels: int = 64,
        decoder_fine_channels: int = 80,
        coarse_channels: int = 128,
        group_channels: int = 160,
        fine_blocks: int = 2,
        decoder_fine_blocks: int = 3,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ) -> None:
        super().__init__()
        fine, coarse, group = fine_channels, coarse_channels, group_channels
        self.encode_in = nn.Conv2d(48, fine, 3, padding=1)
        self.encode_fine = _blocks(fine, fine_blocks)
        self.encode_down = nn.Conv2d(fine, coarse, 3, stride=2, padding=1)
        self.encode_coarse = _blocks(coarse, 2)
        self.encode_group = nn.Conv2d(STRIDE[0] * coarse, group, 1)
        self.encode_context = nn.Conv2d(2 * group, group, 1)
        self.encode_latent = _blocks(group, 1)
        self.encode_out = nn.Conv2d(group, 2 * latent_channels, 3, padding=1)

        self.decode_in = nn.Conv2d(3 * latent_channels, group, 3, padding=1)
        self.decode_latent = _blocks(group, 1)
        self.decode_ungroup = nn.Conv2d(group, STRIDE[0] * coarse, 1)
        self.decode_coarse = _blocks(coarse, 1)
        self.decode_up = nn.Conv2d(coarse, 4 * decoder_fine_channels, 1)
        self.decode_fine = _blocks(decoder_fine_channels, decoder_fine_blocks)
        self.decode_out = nn.Conv2d(decoder_fine_channels, 48, 3, padding=1)
        self.to(memory_format=torch.channels_last)

    @property
    def latent_channels(self) -> int:
        return int(self.config["latent_channels"])

    def posterior(self, pictures_BTCHW: Tensor) -> tuple[Tensor, Tensor]:
        """[B,4k+1,3,H,W] in [-1,1] -> (mean, log variance) of unnormalised latents, each [B,C,1+k,H/8,W/8] float32."""
        batch, frames = pictures_BTCHW.shape[:2]
        latents = latent_frames(frames)
        x = F.pixel_unshuffle(pictures_BTCHW.flatten(0, 1), 4)
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.encode_down(self.encode_fine(self.encode_in(x)))
        x = self.encode_coarse(x).unflatten(0, (batch, frames))
        # Frame 0 fills its whole group, so that every group has four frames.
        x = torch.cat([x[:, :1].expand(-1, STRIDE[0] - 1, -1, -1, -1), x], dim=1)
        x = self.encode_group(rearrange(x, "b (k s) c h w -> (b k) (s c) h w", s=STRIDE[0]))
        groups = x.unflatten(0, (batch, latents))
        x = self.encode_context(torch.cat([groups, _previous(groups)], dim=2).flatten(0, 1))
        x = self.encode_out(F.silu(self.encode_latent(x))).float()
        mean, log_variance = rearrange(x, "(b k) c h w -> b c k h w", b=batch).chunk(2, dim=1)
        return mean, log_variance.clamp(-20.0, 10.0)

    def reconstruct(self, z_BCFhw: Tensor) -> Tensor:
        """Unnormalised latents [B,C,F,h,w] -> pictures [B,4(F-1)+1,3,8h,8w], about [-1,1], float32."""
        batch, _, latents = z_BCFhw.shape[:3]
        z = z_BCFhw.transpose(1, 2)
        context = torch.cat([z, _previous(z), z[:, :1].expand_as(z)], dim=2).flatten(0, 1)
        context = context.contiguous(memory_format=torch.channels_last)
        x = self.decode_ungroup(self.decode_latent(self.decode_in(context)))
        x = rearrange(x, "(b k) (s c) h w -> b (k s) c h w", b=batch, s=STRIDE[0])
        x = x[:, STRIDE[0] - 1 :].flatten(0, 1)  # latent 0 stands for one frame: the last of its group
        x = F.pixel_shuffle(self.decode_up(self.decode_coarse(x)), 2)
        x = self.decode_out(F.silu(self.decode_fine(x)))
        pictures = F.pixel_shuffle(x.float(), 4)
        return pictures.unflatten(0, (batch, STRIDE[0] * (latents - 1) + 1))

    def set_statistics(self, mean_C: Tensor, std_C: Tensor) -> None:
        """Store the per-channel mean and standard deviation of unnormalised latents in the config."""
        assert mean_C.shape == std_C.shape == (self.latent_channels,) and bool((std_C > 0).all())
        self.register_to_config(latents_mean=mean_C.tolist(), latents_std=std_C.tolist())

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        stored = self.config["latents_mean"], self.config["latents_std"]
        if None in stored:
            raise RuntimeError(
                "this autoencoder has no latent statistics: finish physis train vae, or call set_statistics"
            )
        mean, std = (_on_device(tuple(values), like.device) for values in stored)
        return mean, std

    @torch.no_grad()
    def encode(self, frames_BTHWC: Tensor) -> Tensor:
        """``VideoCodec.encode``: the posterior's mean, normalised."""
        z, _ = self.posterior(to_unit_range(frames_BTHWC).to(self.dtype))
        mean, std = self._statistics(z)
        return (z - mean) / std

    @torch.no_grad()
    def decode(self, latents_BCFhw: Tensor) -> Tensor:
        """``VideoCodec.decode``."""
        mean, std = self._statistics(latents_BCFhw)
        pictures = self.reconstruct((latents_BCFhw.float() * std + mean).to(self.dtype))
        return (pictures.movedim(2, -1) * 0.5 + 0.5).clamp(0.0, 1.0)


@functools.lru_cache(maxsize=16)
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[1,C,1,1,1], copied once: a CUDA graph cannot be captured over a copy from pageable memory."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
