"""Other ways to compute a block of Wan, as ``paper_generate.py`` measures them: one that pays moves into the package.

They differ from ``worldmodel/backbones/wan.py`` as a test says: ``PairAttention`` alone gives the same bits in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

#: Attention kernels, the preferred one first; the others take shapes that it does not.
KERNELS = {
    "cudnn": (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
    "flash": (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
}


def attention_first(name: str | None) -> AbstractContextManager:
    """Forward passes inside, and what is compiled by them, use the kernel ``name`` of ``KERNELS`` where it takes the shapes; None: torch's
    own choice."""
    if name is None:
        return contextlib.nullcontext()
    return sdpa_kernel(list(KERNELS[name]), set_priority=True)


def rotate_pairs(x_BLHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions as one expression that reads every number twice; the stock code writes even and odd channels into a new tensor.

    ``cos``, ``sin`` [1,L,1,d] in float32, each number twice. Sums of the same two products: the same bits.
    """
    swapped = x_BLHd.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    pair = sin.unflatten(-1, (-1, 2))
    signed = torch.stack([-pair[..., 0], pair[..., 1]], dim=-1).flatten(-2)
    return (x_BLHd * cos + swapped * signed).type_as(x_BLHd)


class PairAttention(WanAttnProcessor):
    """Attention of a Wan block with ``rotate_pairs``; text may be given as its keys and values (``text_pair``).

    ``join``: queries, keys and values of self-attention by one product with the three weights put together at every call; layers and
    parameters stay three. Sums over more columns at a time may round differently.
    """

    def __init__(self, *, join: bool = False) -> None:
        super().__init__()
        self.join = join

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        assert attn.add_k_proj is None, "no branch for an image encoder"
        if isinstance(encoder_hidden_states, tuple):
            query, (key, value) = attn.to_q(hidden_states), encoder_hidden_states
        elif encoder_hidden_states is not None:
            query, (key, value) = attn.to_q(hidden_states), text_pair(attn, encoder_hidden_states)
        else:
            query, key, value = self._three(attn, hidden_states)
            key = attn.norm_k(key)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(query), key, value))
        if rotary_emb is not None:
            query, key = rotate_pairs(query, *rotary_emb), rotate_pairs(key, *rotary_emb)
        found = dispatch_attention_fn(query, key, value, attn_mask=attention_mask, backend=self._attention_backend)
        return attn.to_out[1](attn.to_out[0](found.flatten(2, 3).type_as(query)))

    def _three(self, attn: Any, x: Tensor) -> Sequence[Tensor]:
        layers = (attn.to_q, attn.to_k, attn.to_v)
        if not self.join:
            return [layer(x) for layer in layers]
        assert all(type(layer) is nn.Linear for layer in layers), "adapters are layers of their own"
        weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
        return functional.linear(x, weight, bias).chunk(3, dim=-1)


def text_pair(attn: Any, context_BLD: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the text for cross-attention: the same in every step of a generation."""
    return attn.norm_k(attn.to_k(context_BLD)), attn.to_v(context_BLD)


def use_attention(blocks: Sequence[Any], processor: WanAttnProcessor) -> None:
    """One processor for both attentions of every block. Compiled blocks have to be compiled again."""
    for block in blocks:
        block.attn1.set_processor(processor)
        block.attn2.set_processor(processor)


class TextCache:
    """``run(block, *inputs)`` of a backbone whose text stays the same: keys and values are made with the first call of each block."""

    def __init__(self) -> None:
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, block: Any, x: Tensor, context: Tensor, *others: Any) -> Tensor:
        if id(block) not in self.pairs:
            self.pairs[id(block)] = text_pair(block.attn2, context)
        return block(x, self.pairs[id(block)], *others)
