"""Teachers of the paper's size with random weights: what they answer at 480x640 and 81 frames, and bfloat16 against float32.

The same functions run here on a CPU with tiny networks and pictures, so that on a GPU only the size is new.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DepthAnythingConfig, Dinov2Config, DINOv3ViTConfig, VJEPA2Config

from physisforcing.worldmodel.teachers.depth_anything import DepthAnything, vitl_config
from physisforcing.worldmodel.teachers.dino import Dino, dinov2_large_config, dinov3_large_config
from physisforcing.worldmodel.teachers.vjepa2 import VJepa2

GPU = pytest.mark.gpu
#: Name -> (class, config of full size, tiny config, further arguments).
ENCODERS: dict[str, tuple[Any, Callable[[], Any], Callable[[], Any], dict[str, str]]] = {
    "vjepa2": (VJepa2, VJEPA2Config, lambda: _tiny_vjepa2(), {}),
    "vjepa2_resize": (VJepa2, VJEPA2Config, lambda: _tiny_vjepa2(), {"mode": "resize"}),
    "dinov2": (Dino, dinov2_large_config, lambda: Dinov2Config(**_TINY), {}),
    "dinov3": (Dino, dinov3_large_config, lambda: DINOv3ViTConfig(**_TINY, intermediate_size=96), {}),
}
_TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def _tiny_vjepa2() -> VJEPA2Config:
    predictor = {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
    return VJEPA2Config(**_TINY, **predictor, crop_size=64, frames_per_clip=8)


def _tiny_depth() -> DepthAnythingConfig:
    backbone = Dinov2Config(
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=70,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    return DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=24,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=4,
    )


def video(frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, frames, height, width, 3), generator=generator, dtype=torch.uint8)


def check_encoder(
    name: str, config: Any, device: str, size: tuple[int, int], grid: tuple[int, int, int], channels: int
) -> None:
    kind, *_, options = ENCODERS[name]
    pictures = video(1 + 4 * (grid[0] - 1), *size)
    exact = kind.from_config(config, device=device, **options).encode(pictures, grid)
    fast = kind.from_config(config, device=device, dtype=torch.bfloat16, **options).encode(pictures, grid)
    for found in (exact, fast):
        assert found.shape == (1, *grid, channels) and found.dtype == torch.float32 and found.device.type == device
        assert found.isfinite().all()
    assert torch.nn.functional.cosine_similarity(exact, fast, dim=-1).mean() > 0.99


def check_depth(config: DepthAnythingConfig, device: str, frames_BHWC: torch.Tensor) -> None:
    exact, fast = (
        DepthAnything.from_config(config, device=device, dtype=dtype, batch=2)
        for dtype in (torch.float32, torch.bfloat16)
    )
    for teacher in (exact, fast):
        # Random weights may end below the last ReLU everywhere, where nothing could be compared.
        teacher.model.head.conv3.bias.fill_(1.0)
    depth, rounded = exact.depth(frames_BHWC), fast.depth(frames_BHWC)
    for found in (depth, rounded):
        assert found.shape == frames_BHWC.shape[:3] and found.dtype == torch.float32 and found.device.type == device
        assert found.isfinite().all() and found.min() >= 0
    assert (depth - rounded).abs().max() < 0.05 * depth.max()


@GPU
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_of_full_size(name: str) -> None:
    check_encoder(name, ENCODERS[name][1](), "cuda", (480, 640), (21, 15, 20), 1024)


@GPU
def test_depth_anything_vitl() -> None:
    check_depth(vitl_config(), "cuda", video(3, 480, 640)[0])


@pytest.mark.parametrize("name", ENCODERS)
def test_the_same_with_a_tiny_encoder(name: str) -> None:
    check_encoder(name, ENCODERS[name][2](), "cpu", (48, 64), (3, 3, 4), 48)


def test_the_same_with_a_tiny_depth_estimator() -> None:
    check_depth(_tiny_depth(), "cpu", video(3, 48, 64)[0])
