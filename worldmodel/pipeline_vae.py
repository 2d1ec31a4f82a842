"""The autoencoder of a Wan or Cosmos3 pipeline folder, computed as diffusers' pipelines compute it: pictures in, latents out, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from physisforcing.core.errors import UserError

from .backbones.protocol import VideoBackbone
from .codec import LatentScale, to_uint8


class PipelineVae:
    """diffusers' ``AutoencoderKLWan`` (Wan2.1 and Wan2.2). Latents are normalised; every call is deterministic."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae.eval().requires_grad_(False)
        config = vae.config
        side = int(config.scale_factor_spatial)
        self.stride = (int(config.scale_factor_temporal), side, side)
        self.scale = LatentScale(config)

    def to(self, device: torch.device) -> PipelineVae:
        """Itself, with the statistics of its latents, on ``device``."""
        self.vae.to(device)
        self.scale.to(device)
        return self

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """[C,F,h,w] of the latents of so many pictures of this size."""
        time, side, _ = self.stride
        return int(self.vae.config.z_dim), 1 + (frames - 1) // time, height // side, width // side

    @torch.no_grad()
    def encode(self, video_B3THW: Tensor) -> Tensor:
        """Pictures in [-1,1] -> normalised latents float32 [B,C,F,h,w]; the mode of the encoder's distribution.

        ``UserError`` for numbers of frames, rows or columns that are no whole latents: the encoder would leave the rest out.
        """
        self.check_size(*video_B3THW.shape[2:])
        made = self.vae.encode(video_B3THW.to(self.vae.device, self.vae.dtype)).latent_dist.mode().float()
        return self.scale.normalised(made)

    def check_size(self, frames: int, height: int, width: int) -> None:
        """``UserError`` unless so many pictures of this size are whole latents."""
        time, side, _ = self.stride
        if frames < 1 or (frames - 1) % time:
            fix = f"give {max(1, (frames - 1) // time * time + 1)}"
            raise UserError("frames", got=frames, wanted=f"{time}k+1", fix=fix)
        for name, value in (("height", height), ("width", width)):
            if value < side or value % side:
                fix = f"resize the pictures to a {name} of {max(side, value // side * side)}"
                raise UserError(name, got=value, wanted=f"a multiple of {side}", fix=fix)

    def encode_first(self, backbone: VideoBackbone, picture_B3HW: Tensor, frames: int) -> dict[str, Tensor]:
        """What ``backbone.conditions`` needs of the first picture of a video of ``frames`` pictures: its keyword arguments.

        Without conditioning channels, the picture alone is encoded: the encoder is causal. With them, the picture and grey behind it.
        """
        if not getattr(backbone, "conditioned", False):
            return {"first_BC1hw": self.encode(picture_B3HW.unsqueeze(2))}
        latents = self.encode_grey(picture_B3HW, frames)
        return {"first_BC1hw": latents[:, :, :1], "condition_BCFhw": latents}

    def encode_grey(self, picture_B3HW: Tensor, frames: int) -> Tensor:
        """Latents [B,C,F,h,w] of a picture and grey behind it, ``frames`` pictures in all."""
        grey = picture_B3HW.new_zeros(len(picture_B3HW), 3, frames - 1, *picture_B3HW.shape[2:])
        return self.encode(torch.cat([picture_B3HW.unsqueeze(2), grey], dim=2))

    @torch.no_grad()
    def decode(self, latents_BCFhw: Tensor) -> Tensor:
        """Normalised latents -> pictures float32 in [0,1], [B,T,H,W,3]."""
        latents = latents_BCFhw.to(self.vae.device, self.vae.dtype)
        pictures = self.vae.decode(self.scale.raw(latents), return_dict=False)[0].float()
        return (pictures.movedim(1, -1) * 0.5 + 0.5).clamp(0.0, 1.0)

    def frames(self, latents_1CFhw: Tensor) -> NDArray[np.uint8]:
        """One video, uint8 [T,H,W,3]."""
        return to_uint8(self.decode(latents_1CFhw)[0]).cpu().numpy()


def load_vae(folder: Path | str, dtype: torch.dtype = torch.float32) -> PipelineVae:
    """The autoencoder in a folder of diffusers, on the CPU. ``UserError`` for another class and for weights that do not fit."""
    from diffusers import AutoencoderKLWan

    from .backbones.loading import load_transformer

    path = Path(folder)
    if not (path / "config.json").is_file():
        fix = "codec=<folder of its AutoencoderKLWan>, or the whole pipeline folder"
        raise UserError("codec", got=str(path), wanted="a folder with config.json", fix=fix)
    from .storage import read_json

    kind = read_json(path / "config.json").get("_class_name")
    if kind != "AutoencoderKLWan":
        raise UserError(
            "codec._class_name", got=kind, wanted="AutoencoderKLWan", fix="use the pipeline's own vae folder"
        )
    return PipelineVae(load_transformer(path, AutoencoderKLWan, dtype=dtype).eval())


def picture_tensor(picture_HWC: NDArray[np.uint8], height: int, width: int, *, crop: bool) -> Tensor:
    """A picture as the pipelines show it to their autoencoder: [1,3,H,W] in [-1,1].

    ``crop=False``: stretched to the size (Wan). ``crop=True``: scaled to cover it and cut in the middle (Cosmos3).
    """
    from PIL import Image

    if crop:
        from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import _preprocess_conditioning_image

        return _preprocess_conditioning_image(Image.fromarray(picture_HWC), height=height, width=width)
    from diffusers.video_processor import VideoProcessor

    return (
        VideoProcessor(vae_scale_factor=1).preprocess(Image.fromarray(picture_HWC), height=height, width=width).float()
    )
