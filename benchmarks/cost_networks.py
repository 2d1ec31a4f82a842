"""Networks of ``physics_cost.py``: the transformer at 5B and at rehearsal size, its tapped blocks, and small teachers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: Pixels a token, in height and width: the autoencoder's 16 times patches of 2.
PIXELS = 32


@dataclass(slots=True, kw_only=True)
class Size:
    """``transformer``: arguments of WanTransformer3DModel. ``grid``: tokens (F, h, w). ``tap``: block, counted from 1."""

    transformer: dict[str, Any]
    grid: tuple[int, int, int]
    tap: int
    text: int
    queries: tuple[int, int]
    hidden: int
    teacher_dim: int
    working: tuple[int, int] | None = None

    @property
    def width(self) -> int:
        return self.transformer["num_attention_heads"] * self.transformer["attention_head_dim"]


FULL = Size(
    transformer={
        "patch_size": (1, 2, 2),
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "num_layers": 30,
        "in_channels": 48,
        "out_channels": 48,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 14336,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "rope_max_seq_len": 1024,
    },
    grid=(21, 15, 20),
    tap=15,
    text=512,
    queries=(25, 25),
    hidden=2048,
    teacher_dim=1024,
)
TINY = Size(
    transformer=FULL.transformer
    | {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "num_layers": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 64,
    },
    grid=(2, 3, 4),
    tap=2,
    text=8,
    queries=(3, 4),
    hidden=32,
    teacher_dim=48,
    working=(64, 96),
)


def random_video(size: Size, generator: torch.Generator) -> Tensor:
    frames, height, width = size.grid
    shape = (1, 1 + 4 * (frames - 1), PIXELS * height, PIXELS * width, 3)
    return torch.randint(0, 256, shape, generator=generator, device=generator.device, dtype=torch.uint8)


class Switch:
    """State that all blocks share: whether they run compiled, and what the tapped one gave in this step."""

    def __init__(self) -> None:
        self.compiled = False
        self.wanted = False
        self.tapped: Tensor | None = None


class Block(nn.Module):
    """A stock block, plain or compiled, whose output is kept if it is the tapped one.

    The keeping stands outside of the compiled region, and only the first output of a step counts: under activation checkpointing
    the block runs again in the backward pass, where its output is another tensor.
    """

    def __init__(self, block: nn.Module, compiled: Callable[..., Tensor], switch: Switch, *, tapped: bool) -> None:
        super().__init__()
        self.block, self.compiled, self.switch, self.tapped = block, compiled, switch, tapped

    def forward(self, *inputs: Any) -> Tensor:
        out = self.compiled(self.block, *inputs) if self.switch.compiled else self.block(*inputs)
        if self.tapped and self.switch.wanted:
            self.switch.wanted, self.switch.tapped = False, out
        return out


def call_block(block: nn.Module, *inputs: Any) -> Tensor:
    return block(*inputs)


def in_bfloat16(model: Any) -> Any:
    """A model of diffusers as ``from_pretrained(dtype=torch.bfloat16)`` leaves it: what its class keeps in float32 stays so."""
    exact = set(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if not exact & set(name.split(".")):
            parameter.data = parameter.data.bfloat16()
    return model


def build_transformer(size: Size, device: torch.device, backend: str) -> tuple[Any, Switch]:
    from diffusers import WanTransformer3DModel

    with device:
        model = in_bfloat16(WanTransformer3DModel(**size.transformer))
    switch, compiled = Switch(), torch.compile(call_block, dynamic=False, backend=backend)
    for number, block in enumerate(model.blocks, start=1):
        model.blocks[number - 1] = Block(block, compiled, switch, tapped=number == size.tap)
    return model.train(), switch


def tiny_encoder() -> Any:
    from transformers import VJEPA2Config

    predictor = {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
    shape = {"hidden_size": TINY.teacher_dim, "num_hidden_layers": 2, "num_attention_heads": 4}
    return VJEPA2Config(**shape, **predictor, crop_size=64, frames_per_clip=8)


def tiny_depth() -> Any:
    from transformers import DepthAnythingConfig, Dinov2Config

    shape = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 70}
    backbone = Dinov2Config(**shape, out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
    neck = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "head_hidden_size": 4}
    return DepthAnythingConfig(backbone_config=backbone, reassemble_hidden_size=24, **neck)
