"""One sample in several processes: each takes a part of the tokens of every latent frame through all blocks, and around self-attention tokens are
exchanged for heads (Ulysses, arXiv:2309.14509). For clips whose activations do not fit one GPU, and for batches smaller than the GPUs.

Everything but self-attention treats a token by itself, or by its frame, so that modulations once a latent frame stay as they are. Inputs, noise and
what comes out are the same in all processes of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSplit:
    """The ``count`` processes of a sample, which ``group`` names; this one is number ``place`` of them."""

    group: Any
    place: int
    count: int

    def share(self, x_BLD: Tensor, frames: int) -> Tensor:
        """What of all tokens [B,L,...] is taken here, [B,L/count,...]; ``count`` divides those of a frame."""
        rows = x_BLD.unflatten(1, (frames, -1))
        assert rows.shape[2] % self.count == 0, "equal parts of each frame"
        part = rows.shape[2] // self.count
        return rows[:, :, self.place * part : (self.place + 1) * part].flatten(1, 2)

    def whole(self, x_BLD: Tensor, frames: int) -> Tensor:
        """All tokens [B,L,...] of what each process has, in the order of ``share``.

        Gradients that come back are the same in every process, and each sends its own part on ``count`` times as large: the mean over processes,
        which exchanges gradients, is then the sum over the parts of a sample.
        """
        return _Whole.apply(x_BLD.unflatten(1, (frames, -1)), self).flatten(1, 2)

    def to_heads(self, x_NBLHD: Tensor) -> Tensor:
        """N tensors of some tokens and all heads -> [N,B,L*count,H/count,D], all tokens and some heads. Tokens change places, alike in all N."""
        parts = x_NBLHD.unflatten(3, (self.count, -1)).movedim(3, 0)  # [count,N,B,L,H/count,D]
        return self._exchange(parts).movedim(0, 2).flatten(2, 3)

    def to_tokens(self, x_BLHD: Tensor) -> Tensor:
        """The way back of one tensor, [B,L/count,H*count,D]."""
        parts = x_BLHD.unflatten(1, (self.count, -1)).movedim(1, 0)  # [count,B,L/count,H,D]
        return self._exchange(parts).movedim(0, 2).flatten(2, 3)

    def _exchange(self, parts: Tensor) -> Tensor:
        """The i-th part to the i-th process; what they sent, in their order."""
        from torch.distributed._functional_collectives import all_to_all_single_autograd

        one = [1] * self.count
        return all_to_all_single_autograd(parts.contiguous(), one, one, self.group)


class _Whole(torch.autograd.Function):
    """See ``SequenceSplit.whole``; [B,F,l,...] -> [B,F,l*count,...]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, split: SequenceSplit) -> Tensor:
        ctx.split = split
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(split.count)]
        dist.all_gather(parts, x.contiguous(), group=split.group)
        return torch.cat(parts, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        split = ctx.split
        return gradients[0].chunk(split.count, 2)[split.place] * split.count, None


class SplitAttention:
    """A processor for the self-attention of a stock ``WanAttention`` whose tokens are a ``split``'s."""

    def __init__(self, split: SequenceSplit) -> None:
        self.split = split

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        assert encoder_hidden_states is None and attention_mask is None and rotary_emb is not None, "self-attention"
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        parts = [part.unflatten(2, (attn.heads, -1)) for part in (query, key, attn.to_v(hidden_states))]
        turned = [_rotate(part, *rotary_emb) for part in parts[:2]]
        query, key, value = (x.transpose(1, 2) for x in self.split.to_heads(torch.stack([*turned, parts[2]])).unbind(0))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        made = self.split.to_tokens(attended).flatten(2).type_as(hidden_states)
        return attn.to_out[1](attn.to_out[0](made))


def _rotate(x_BLHD: Tensor, cos_1L1D: Tensor, sin_1L1D: Tensor) -> Tensor:
    """Neighbouring numbers are the two parts of a complex one; cosines and sines are given twice each."""
    real, imaginary = x_BLHD.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_1L1D[..., ::2], sin_1L1D[..., ::2]
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(-2).type_as(x_BLHD)
