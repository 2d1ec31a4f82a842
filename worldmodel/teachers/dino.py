"""DINOv2 and DINOv3 ViT as relation teachers of single frames, through transformers' models.

Latent frame k gets the features of frame 4k, the last of its group. Pictures are resized to one patch a token (14 pixels for
DINOv2, 16 for DINOv3), so that the patch grid is the token grid; the class token and register tokens are dropped. Resampling as in
the published processors: bicubic for DINOv2, bilinear for DINOv3, antialiased.

Licences of the weights: DINOv2 Apache-2.0; DINOv3 has its own, which asks for acceptance and restricts uses.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .preprocess import (
    check_video,
    last_frames,
    load_pretrained,
    normalised,
    random_weights,
    read_config,
    remember_positions,
    version_of,
)
from .protocols import TeacherInfo

if TYPE_CHECKING:
    from transformers import Dinov2Config, DINOv3ViTConfig

#: ``model_type`` -> transformers' class, licence of the weights (SPDX), resampling.
FAMILIES = {
    "dinov2": ("Dinov2Model", "Apache-2.0", "bicubic"),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "Apache-2.0", "bicubic"),
    "dinov3_vit": ("DINOv3ViTModel", "LicenseRef-DINOv3", "bilinear"),
}


class Dino:
    """A frozen DINO vision transformer. Satisfies ``VideoEncoder``."""

    def __init__(self, model: Any, info: TeacherInfo, *, batch: int = 32) -> None:
        """``model``: one of ``FAMILIES`` in evaluation mode; ``batch``: pictures a forward. Users call ``from_folder``."""
        self.model, self.batch = model, batch
        self._info = info
        if model.config.model_type != "dinov3_vit":  # DINOv3's are rotary
            remember_positions(model.embeddings)

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        families: tuple[str, ...] = tuple(FAMILIES),
        checksum: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch: int = 32,
    ) -> Dino:
        """From a folder with config.json and safetensors of one of ``families``.

        ``checksum``: SHA-256 that the weights must have (``weights_sha256``). Raises ``UserError`` for a folder of another model,
        another checksum or weights that do not fit.
        """
        kind = _class_of(read_config(path, families)["model_type"])
        # The mask token is for training only.
        model, digest = load_pretrained(
            kind,
            path,
            checksum=checksum,
            device=device,
            dtype=dtype,
            unused=("mask_token",),
            attn_implementation="sdpa",
        )
        return cls(model, _info(model.config, dtype, checksum=digest), batch=batch)

    @classmethod
    def from_config(
        cls,
        config: Dinov2Config | DINOv3ViTConfig,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch: int = 32,
    ) -> Dino:
        """Random weights, for tests and timing (``dinov2_large_config``, ``dinov3_large_config``)."""
        model = random_weights(_class_of(config.model_type), config, seed=seed, device=device, dtype=dtype)
        return cls(model, _info(config, dtype, suffix=f"/random{seed}"), batch=batch)

    @property
    def info(self) -> TeacherInfo:
        return self._info

    @property
    def channels(self) -> int:
        return self.model.config.hidden_size

    @property
    def per_frame(self) -> bool:
        return True

    @torch.no_grad()
    def encode(self, video_BTHWC: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """uint8 [B,T,H,W,3] with T = 1 + 4 (F - 1) -> float32 [B,F,h,w,C] for ``grid`` (F, h, w), on the network's device.

        Features are those after the final norm. Raises ``UserError`` for any other video.
        """
        check_video(video_BTHWC, grid)
        frames = last_frames(video_BTHWC).split(self.batch)
        found = torch.cat([self._encode(part, grid[1:]) for part in frames])
        return found.unflatten(0, (len(video_BTHWC), grid[0]))

    def _encode(self, frames_BHWC: Tensor, grid: tuple[int, int]) -> Tensor:
        config, device = self.model.config, self.model.device
        size = (grid[0] * config.patch_size, grid[1] * config.patch_size)
        resampling = FAMILIES[config.model_type][2]
        with torch.autocast(device.type, enabled=False):
            pictures = normalised(frames_BHWC, size, resampling, device).to(self.model.dtype)
            found_BLC = self.model(pixel_values=pictures).last_hidden_state
        before = 1 + getattr(config, "num_register_tokens", 0)
        assert found_BLC.shape[1] == before + grid[0] * grid[1]
        return found_BLC[:, before:].float().unflatten(1, grid)


def _class_of(model_type: str) -> Any:
    import transformers

    return getattr(transformers, FAMILIES[model_type][0])


def _info(config: Any, dtype: torch.dtype, *, checksum: str = "", suffix: str = "") -> TeacherInfo:
    _, licence, resampling = FAMILIES[config.model_type]
    return TeacherInfo(
        name=f"{config.model_type}-width{config.hidden_size}",
        version=version_of(resampling, dtype) + suffix,
        licence=licence,
        checksum=checksum,
    )


def dinov2_large_config() -> Dinov2Config:
    """Config of DINOv2 ViT-L/14."""
    from transformers import Dinov2Config

    return Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518)


def dinov3_large_config() -> DINOv3ViTConfig:
    """Config of DINOv3 ViT-L/16."""
    from transformers import DINOv3ViTConfig

    return DINOv3ViTConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_register_tokens=4,
    )
