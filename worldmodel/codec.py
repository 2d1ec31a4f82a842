"""Video codecs: pixels to normalised latents and back, behind one protocol.

Windows have ``4k + 1`` frames, stride (4, 8, 8): latent 0 = frame 0, latent k = frames 4k-3..4k, and latent k depends on
frames <= 4k only. Latents are normalised: ``(z - mean) / std`` per channel with stored statistics.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from physisforcing.core.errors import UserError

from .storage import load_diffusers

#: Frames a latent (after the first), pixel rows a latent row, pixel columns a latent column.
STRIDE = (4, 8, 8)


@runtime_checkable
class VideoCodec(Protocol):
    """Encodes windows of pictures to latents and decodes them; all tensors on the codec's device."""

    @property
    def latent_channels(self) -> int: ...

    def encode(self, frames_BTHWC: Tensor) -> Tensor:
        """[B,T,H,W,3], uint8 or float in [0,1], T = 4k+1 -> normalised latents float32 [B,C,1+k,H/8,W/8]."""
        ...

    def decode(self, latents_BCFhw: Tensor) -> Tensor:
        """Normalised latents [B,C,F,h,w] -> frames float32 in [0,1], [B,4(F-1)+1,8h,8w,3]."""
        ...


def latent_frames(frames: int) -> int:
    """Latent frames of a window of ``frames`` pictures. Raises ``UserError`` unless ``frames = 4k + 1``."""
    if frames < 1 or (frames - 1) % STRIDE[0]:
        below = max(1, (frames - 1) // STRIDE[0] * STRIDE[0] + 1)
        raise UserError("frames", got=frames, wanted="4k+1 frames", fix=f"use {below} or {below + STRIDE[0]}")
    return 1 + (frames - 1) // STRIDE[0]


def to_unit_range(frames_BTHWC: Tensor) -> Tensor:
    """uint8 or float [0,1] pictures -> float32 in [-1,1], channels first: [B,T,3,H,W]."""
    scale = 255.0 if frames_BTHWC.dtype == torch.uint8 else 1.0
    return frames_BTHWC.movedim(-1, 2).float() * (2.0 / scale) - 1.0


def to_uint8(frames: Tensor) -> Tensor:
    """float [0,1] -> uint8, rounded to nearest."""
    return (frames.clamp(0.0, 1.0) * 255.0).round_().to(torch.uint8)


class LatentScale:
    """Mean and deviation of the latents of diffusers' ``AutoencoderKLWan``, applied as its pipelines do it. ``UserError`` for a config
    without them."""

    def __init__(self, config: Any) -> None:
        shape = (1, int(config.z_dim), 1, 1, 1)
        for name in ("latents_mean", "latents_std"):
            values = getattr(config, name, None)
            if values is None or len(values) != config.z_dim:
                got, wanted = values if values is None else f"{len(values)} numbers", f"{config.z_dim}, one a channel"
                fix = "put those of its training into vae/config.json; physis convert knows the published ones"
                raise UserError(f"vae: {name}", got=got, wanted=wanted, fix=fix)
        self._mean = torch.tensor(config.latents_mean).view(shape)
        self._std = torch.tensor(config.latents_std).view(shape)

    def to(self, device: torch.device) -> None:
        """Keep them on ``device``, where they would otherwise be copied to at every call."""
        self._mean, self._std = self._mean.to(device), self._std.to(device)

    def normalised(self, raw_BCFhw: Tensor) -> Tensor:
        return (raw_BCFhw - self._mean.to(raw_BCFhw)) * (1.0 / self._std.to(raw_BCFhw))

    def raw(self, latents_BCFhw: Tensor) -> Tensor:
        return latents_BCFhw / (1.0 / self._std.to(latents_BCFhw)) + self._mean.to(latents_BCFhw)


class WanVaeCodec:
    """diffusers' ``AutoencoderKLWan`` behind the ``VideoCodec`` protocol (stride 4x8x8 configurations, e.g. Wan 2.1's)."""

    def __init__(self, vae: Any) -> None:
        if vae.config.scale_factor_spatial != STRIDE[1]:
            raise UserError(
                "vae.scale_factor_spatial",
                got=vae.config.scale_factor_spatial,
                wanted=str(STRIDE[1]),
                fix="use a Wan 2.1 style AutoencoderKLWan",
            )
        self.vae = vae.eval()
        self._scale = LatentScale(vae.config)

    @property
    def latent_channels(self) -> int:
        return int(self.vae.config.z_dim)

    @torch.no_grad()
    def encode(self, frames_BTHWC: Tensor) -> Tensor:
        latent_frames(frames_BTHWC.shape[1])
        pictures = to_unit_range(frames_BTHWC).transpose(1, 2).to(self.vae.dtype)
        return self._scale.normalised(self.vae.encode(pictures).latent_dist.mode().float())

    @torch.no_grad()
    def decode(self, latents_BCFhw: Tensor) -> Tensor:
        pictures = self.vae.decode(self._scale.raw(latents_BCFhw.float()).to(self.vae.dtype)).sample.float()
        return (pictures.movedim(1, -1) * 0.5 + 0.5).clamp(0.0, 1.0)


def load_codec(path: Path | str, device: str | torch.device = "cpu") -> VideoCodec:
    """The codec in a diffusers-style folder: ``config.json`` names ``CausalVideoAutoencoder`` or ``AutoencoderKLWan``.

    Raises ``UserError`` when the folder holds neither. Weights are loaded as float32.
    """
    import json

    folder = Path(path)
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(
            "codec", got=str(folder), wanted="a folder with config.json", fix="physis train vae, or its path"
        )
    kind = json.loads(config.read_text()).get("_class_name")
    if kind == "CausalVideoAutoencoder":
        from .autoencoder import CausalVideoAutoencoder

        return load_diffusers(CausalVideoAutoencoder, folder).eval().requires_grad_(False).to(device)
    if kind == "AutoencoderKLWan":
        from diffusers import AutoencoderKLWan

        return WanVaeCodec(load_diffusers(AutoencoderKLWan, folder).requires_grad_(False).to(device))
    raise UserError(
        "codec._class_name",
        got=kind,
        wanted="CausalVideoAutoencoder or AutoencoderKLWan",
        fix="point at the folder that physis train vae wrote",
    )
