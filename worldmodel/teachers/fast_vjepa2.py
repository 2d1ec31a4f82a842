"""V-JEPA 2 arranged for a GPU: the same weights and the same features up to rounding.

``speed_up`` compiles attention and MLP of every layer (one graph each for all layers): rotary positions, which transformers computes
anew in every layer in some fifty small steps, become part of the kernels around them. The patch embedding, a convolution whose
windows do not overlap, becomes one matrix product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .vjepa2 import VJepa2


def speed_up(teacher: VJepa2, *, compiled: bool | None = None, backend: str = "inductor") -> VJepa2:
    """Changes ``teacher`` and gives it back. ``compiled``: None compiles on a GPU; every size of video is compiled once."""
    encoder = teacher.model.encoder
    embeddings = encoder.embeddings.patch_embeddings
    if isinstance(embeddings.proj, nn.Conv3d):
        embeddings.proj = PatchProduct(embeddings.proj)
    if encoder.layernorm.weight.is_cuda if compiled is None else compiled:
        for layer in encoder.layer:
            # Not the layer itself: transformers hangs hooks onto modules, which would break its graph.
            for part in (layer.attention, layer.mlp):
                part.forward = torch.compile(part.forward, dynamic=False, backend=backend)
    return teacher


class PatchProduct(nn.Module):
    """A convolution of non-overlapping windows as a matrix product: [B,C,T,H,W] -> [B,D,T/t,H/h,W/w]."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        assert tuple(stock.stride) == tuple(stock.kernel_size) and not any(stock.padding)
        self.window = tuple(stock.kernel_size)
        self.weight, self.bias = stock.weight, stock.bias

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        (t, h, w), channels = self.window, x_BCTHW.shape[1]
        frames, rows, columns = (side // part for side, part in zip(x_BCTHW.shape[2:], self.window))
        windows = x_BCTHW[:, :, : frames * t, : rows * h, : columns * w]
        windows = windows.reshape(-1, channels, frames, t, rows, h, columns, w).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return nn.functional.linear(windows.flatten(4), self.weight.flatten(1), self.bias).permute(0, 4, 1, 2, 3)
