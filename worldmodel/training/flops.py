"""Floating-point operations of a training step, and what share of a GPU's peak they are (MFU).

Counted: the forward pass, gradients of activations, and gradients of weights where these are trained; a multiplication and an addition are
two operations. Not counted: recomputation, the optimiser, and everything that is no matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: Dense bfloat16 peak in FLOP/s by a part of the device's name, the first that is found in it.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12,
    "RTX 4090": 165e12,
}  # fmt: skip
#: Parts of the names of Wan's linear layers that act on text tokens.
_WAN_TEXT = ("attn2.to_k", "attn2.to_v", "text_embedder")
#: Parts of the names of Cosmos3's linear layers that act on picture tokens.
_COSMOS_PICTURES = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "_moe_gen", "proj_in", "proj_out")
#: What makes the pictures' tokens and their modulations, and the layers that read them first.
_PICTURES = ("patch_embedding", "proj_in", "condition_embedder.time", "time_embedder")
_FIRST = (*(f"blocks.0.attn1.to_{part}" for part in "qkv"), *(f"layers.0.self_attn.add_{part}_proj" for part in "qkv"))
#: Layers that a pass over pictures and a sentence never calls.
_UNUSED = ("lm_head", "audio", "action", "sound")


def peak_flops(device: torch.device) -> float | None:
    """Of a known GPU; None for others."""
    if device.type != "cuda":
        return None
    return named_peak(torch.cuda.get_device_name(device))


def named_peak(name: str) -> float | None:
    """``peak_flops`` by the name that CUDA gives a device."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def forward_flops(denoiser: Any, shape: Sequence[int], text: int) -> float:
    """Operations of one sample's forward pass, whatever is trained; ``shape`` and ``text`` as in ``step_flops``."""
    return _flops(denoiser, shape, text, backward=False)


def step_flops(denoiser: Any, shape: Sequence[int], text: int) -> float:
    """Operations of one sample's forward and backward pass through a ``Denoiser`` (or any ``VideoBackbone``).

    ``shape``: [B,C,F,h,w] of its latents, of which B is not read; ``text``: tokens of its sentence as the network reads them. Every linear
    layer, and attention within the pictures and from them to the text. Nothing has a gradient for pictures and sentences themselves.
    """
    return _flops(denoiser, shape, text, backward=True)


def _flops(denoiser: Any, shape: Sequence[int], text: int, *, backward: bool) -> float:
    grid = [side // part for side, part in zip(shape[2:], denoiser.patch, strict=True)]
    transformer, tokens = denoiser.transformer, math.prod(grid)
    cosmos = type(transformer).__name__ == "Cosmos3OmniTransformer"
    embedder = [p for name, p in transformer.named_parameters() if "text_embedder" in name or "embed_tokens" in name]
    text_learns = any(p.requires_grad for p in embedder) or (cosmos and any(_learns_text(transformer)))
    pictures_learn = any(p.requires_grad for n, p in transformer.named_parameters() if n.startswith(_PICTURES))
    head = transformer.config.head_dim if cosmos else transformer.config.attention_head_dim
    width, total = transformer.config.num_attention_heads * head, 0.0
    for name, weight in _linear(transformer):
        if any(part in name for part in _UNUSED):
            continue
        timed = "time" in name
        on_text = _on_text(name, cosmos) and not timed
        rows = (1 if cosmos else grid[0]) if timed else text if on_text else tokens
        # data has no gradient
        first = any(stem in name for stem in ("patch_embedding", "text_embedder.linear_1")) or name == "proj_in"
        first = first or (not pictures_learn and name.startswith(_FIRST))
        to_inputs = 0 if first else 2 * (text_learns if on_text else True)
        total += (2.0 + backward * (to_inputs + 2.0 * weight.requires_grad)) * rows * weight.numel()
    for _ in denoiser.blocks:
        total += (3.0 if backward else 1.0) * 4.0 * tokens * (tokens + text) * width
        if cosmos:  # text reads itself, causally
            total += (3.0 if backward and text_learns else 1.0) * 2.0 * text * text * width
    return total


def _on_text(name: str, cosmos: bool) -> bool:
    if cosmos:
        return not any(part in name for part in _COSMOS_PICTURES)
    return any(part in name for part in _WAN_TEXT)


def _learns_text(transformer: nn.Module) -> Iterator[bool]:
    """Whether layers of Cosmos3's text stream are trained."""
    for name, weight in _linear(transformer):
        if _on_text(name, True) and "time" not in name and not any(part in name for part in _UNUSED):
            yield weight.requires_grad


def _linear(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and weight of the linear layers inside; a convolution over patches is one."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv3d):
            yield name, layer.weight
