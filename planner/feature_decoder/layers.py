"""Attention and feed-forward layers of the feature decoder: pre-norm, fused attention, dropout where the published head has it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention of ``x_BLD`` over ``source_BMD`` (itself where None). ``keep_BM``: False where a source token is padding."""

    def __init__(self, width: int, heads: int, head_dim: int, *, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        inner = heads * head_dim
        self.query = nn.Linear(width, inner, bias=bias)
        self.key_value = nn.Linear(width, 2 * inner, bias=bias)
        self.out = nn.Linear(inner, width, bias=bias)

    def forward(self, x_BLD: Tensor, source_BMD: Tensor | None = None, keep_BM: Tensor | None = None) -> Tensor:
        source = x_BLD if source_BMD is None else source_BMD
        query = self.query(x_BLD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(source).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if keep_BM is None else keep_BM[:, None, None]
        dropped = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropped)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, factor: int, *, dropout: float = 0.0, bias: bool = True) -> None:
        inner = factor * width
        last = nn.Linear(inner, width, bias=bias)
        super().__init__(nn.Linear(width, inner, bias=bias), nn.GELU(), last, nn.Dropout(dropout))


def projection(inputs: int, width: int) -> nn.Sequential:
    """A small network from ``inputs`` to ``width`` with one hidden layer of twice the width."""
    return nn.Sequential(nn.Linear(inputs, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
