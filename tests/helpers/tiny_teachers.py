"""Tiny teachers with drawn weights, their configs as transformers has them, and pictures of noise."""

from __future__ import annotations

import torch
from transformers import DepthAnythingConfig, Dinov2Config, DINOv3ViTConfig, VJEPA2Config

from physisforcing.worldmodel.teachers.dino import Dino
from physisforcing.worldmodel.teachers.vjepa2 import VJepa2


def vjepa2_config(**changes) -> VJEPA2Config:
    # Wide initial weights: with narrow ones, attention is uniform and positions hardly matter.
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "crop_size": 64, "frames_per_clip": 8}
    predictor = {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
    return VJEPA2Config(**{**small, **predictor, "initializer_range": 0.3, **changes})


def depth_config(width: int = 24, **changes) -> DepthAnythingConfig:
    backbone = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=70,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
        initializer_range=0.2,
    )
    sizes = {
        "neck_hidden_sizes": [8, 8, 8, 8],
        "fusion_hidden_size": 8,
        "head_hidden_size": 4,
        "initializer_range": 0.2,
    }
    return DepthAnythingConfig(backbone_config=backbone, reassemble_hidden_size=width, **{**sizes, **changes})


def dino_config(version: int) -> Dinov2Config | DINOv3ViTConfig:
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
    if version == 2:
        return Dinov2Config(**small, image_size=56)
    return DINOv3ViTConfig(**small, intermediate_size=96, num_register_tokens=4)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


#: Frames, rows and columns of tokens.
GRID = (3, 2, 5)
ENCODERS = {
    "vjepa2": lambda **k: VJepa2.from_config(vjepa2_config(), **k),
    "vjepa2_resize": lambda **k: VJepa2.from_config(vjepa2_config(), mode="resize", **k),
    "dinov2": lambda **k: Dino.from_config(dino_config(2), **k),
    "dinov3": lambda **k: Dino.from_config(dino_config(3), **k),
}
