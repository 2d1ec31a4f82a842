"""Depth-Anything as depth teacher, through transformers' ``DepthAnythingForDepthEstimation``.

Version 2 of it (ViT-L, relative) gives the depth of eq. (2). The relative models answer in disparity up to scale and shift, larger
is nearer: the sign that eq. (2) does not mean, which is why ``kind`` says it.

Pictures are resized as the published code does it: the factor that brings the shorter side to 518, each side to the nearest
multiple of 14, bicubic, ImageNet mean and standard deviation. (The image processor of transformers instead takes
the factor nearer to 1, which gives 392x518 instead of 518x686 for a 240x320 picture.) The answer is resized back bilinearly.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as nnf
from torch import Tensor

from .preprocess import (
    check_frames,
    load_pretrained,
    normalised,
    random_weights,
    read_config,
    remember_positions,
    version_of,
)
from .protocols import TeacherInfo

if TYPE_CHECKING:
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation

#: The shorter side of what the network sees, in pixels; both sides are multiples of ``PATCH``.
SHORTER_SIDE = 518
PATCH = 14
#: Width of the backbone -> name and licence of the published version 2 weights.
_SIZES = {
    384: ("vits", "Apache-2.0"),
    768: ("vitb", "CC-BY-NC-4.0"),
    1024: ("vitl", "CC-BY-NC-4.0"),
    1536: ("vitg", "CC-BY-NC-4.0"),
}
_PREPROCESSING = f"shorter{SHORTER_SIDE}-bicubic"


def network_size(height: int, width: int) -> tuple[int, int]:
    """Size (H, W) that a picture of this size is resized to.

    >>> network_size(480, 640), network_size(240, 320), network_size(480, 832)
    ((518, 686), (518, 686), (518, 896))
    """
    scale = SHORTER_SIDE / min(height, width)
    return round(scale * height / PATCH) * PATCH, round(scale * width / PATCH) * PATCH


def licence_of(config: DepthAnythingConfig) -> str:
    """Licence (SPDX) of the published version 2 weights with this config's backbone width.

    ViT-S is Apache-2.0; all others, and any width that is not known, are CC-BY-NC-4.0. The config does not tell whose weights these
    are: for others (version 1 is Apache-2.0 in all sizes, or your own) say ``licence=``.
    """
    return _SIZES.get(config.backbone_config.hidden_size, ("", "CC-BY-NC-4.0"))[1]


def licence_in(path: str | Path | None) -> str:
    """``licence_of`` the config in a folder, without reading its weights. Raises ``UserError`` for another model's folder."""
    from transformers import DepthAnythingConfig

    return licence_of(DepthAnythingConfig.from_dict(read_config(path, ("depth_anything",))))


class DepthAnything:
    """A frozen Depth-Anything. Satisfies ``DepthEstimator``."""

    def __init__(self, model: DepthAnythingForDepthEstimation, info: TeacherInfo, *, batch: int = 8) -> None:
        """``model`` in evaluation mode; ``batch``: pictures a forward. Users call ``from_folder``."""
        self.model, self.batch = model, batch
        self._info = info
        remember_positions(model.backbone.embeddings)

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        checksum: str | None = None,
        licence: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch: int = 8,
    ) -> DepthAnything:
        """From a folder with config.json and safetensors.

        ``checksum``: SHA-256 that the weights must have (``weights_sha256``); ``licence``: SPDX name, by default ``licence_of`` the
        config. Raises ``UserError`` for a folder of another model, another checksum or weights that do not fit.
        """
        from transformers import DepthAnythingForDepthEstimation

        read_config(path, ("depth_anything",))
        # The mask token of DINOv2 is for its training only.
        model, digest = load_pretrained(
            DepthAnythingForDepthEstimation, path, checksum=checksum, device=device, dtype=dtype, unused=("mask_token",)
        )
        return cls(model, _info(model.config, dtype, licence=licence, checksum=digest), batch=batch)

    @classmethod
    def from_config(
        cls,
        config: DepthAnythingConfig | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch: int = 8,
    ) -> DepthAnything:
        """Random weights, for tests and timing; ``config``: ViT-L's (``vitl_config``)."""
        from transformers import DepthAnythingForDepthEstimation

        config = config or vitl_config()
        model = random_weights(DepthAnythingForDepthEstimation, config, seed=seed, device=device, dtype=dtype)
        return cls(model, _info(config, dtype, suffix=f"/random{seed}"), batch=batch)

    @property
    def info(self) -> TeacherInfo:
        return self._info

    @property
    def kind(self) -> str:
        """``disparity`` (relative models) or ``metric`` (metres)."""
        return "metric" if self.model.config.depth_estimation_type == "metric" else "disparity"

    @torch.no_grad()
    def depth(self, frames_BHWC: Tensor) -> Tensor:
        """uint8 [B,H,W,3] -> float32 [B,H,W], 0 or more, on the network's device. Raises ``UserError`` for other frames."""
        check_frames(frames_BHWC)
        return torch.cat([self._depth(frames) for frames in frames_BHWC.split(self.batch)])

    def _depth(self, frames_BHWC: Tensor) -> Tensor:
        size = (frames_BHWC.shape[1], frames_BHWC.shape[2])
        device = self.model.device
        with torch.autocast(device.type, enabled=False):
            pictures = normalised(frames_BHWC, network_size(*size), "bicubic", device).to(self.model.dtype)
            found_BHW = self.model(pixel_values=pictures).predicted_depth.float()
            return nnf.interpolate(found_BHW[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def _info(
    config: DepthAnythingConfig, dtype: torch.dtype, *, licence: str | None = None, checksum: str = "", suffix: str = ""
) -> TeacherInfo:
    width = config.backbone_config.hidden_size
    name = f"depth-anything-{_SIZES.get(width, (f'width{width}', ''))[0]}"
    return TeacherInfo(
        name=f"{name}-metric" if config.depth_estimation_type == "metric" else name,
        version=version_of(_PREPROCESSING, dtype) + suffix,
        licence=licence or licence_of(config),
        checksum=checksum,
    )


def vitl_config() -> DepthAnythingConfig:
    """Config of Depth-Anything-V2 ViT-L, relative: 335 M parameters."""
    from transformers import DepthAnythingConfig, Dinov2Config

    backbone = Dinov2Config(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=518,
        patch_size=PATCH,
        out_indices=[5, 12, 18, 24],
        apply_layernorm=True,
        reshape_hidden_states=False,
    )
    return DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=1024,
        neck_hidden_sizes=[256, 512, 1024, 1024],
        fusion_hidden_size=256,
    )
