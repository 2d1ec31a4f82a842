"""Instruction tokens as a decoder reads them: cut and padded by one function, in training and in use.

WorldArena's released code cuts and pads to 30 tokens in training and to nothing in use, and its constant sentence in front of every
instruction is about as long as that, so that in training most of the instruction itself is cut away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class TextEncoder(Protocol):
    """Embeds sentences; ``worldmodel.text.TextEmbedder`` is one."""

    def batch(self, sentences: Sequence[str], /) -> tuple[Tensor, Tensor]:
        """-> (token embeddings [B,L,D], mask [B,L], True on real tokens)."""
        ...


def fit_goal(tokens_BLD: Tensor, mask_BL: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Exactly ``count`` tokens an entry: later ones are cut, missing ones are zeros with mask False."""
    tokens, mask = tokens_BLD[:, :count].float(), mask_BL[:, :count].bool()
    missing = count - tokens.shape[1]
    if missing > 0:
        tokens = torch.cat([tokens, tokens.new_zeros(len(tokens), missing, tokens.shape[2])], dim=1)
        mask = torch.cat([mask, mask.new_zeros(len(mask), missing)], dim=1)
    return tokens * mask.unsqueeze(-1), mask


def embed_goals(text: TextEncoder, instructions: Sequence[str], prompt: str, count: int) -> tuple[Tensor, Tensor]:
    """Embeddings [B,count,D] and mask [B,count] of instructions put into the template ``prompt``."""
    tokens, mask = text.batch([prompt.replace("{instruction}", instruction) for instruction in instructions])
    return fit_goal(tokens, mask, count)
