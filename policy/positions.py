"""Rotary positions of action tokens beside the video's (diffusers' layout: cosines and sines of interleaved pairs)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: (cosines, sines), each [1,L,1,head width].
Rotary = tuple[Tensor, Tensor]


def axis(positions_L: Tensor, width: int) -> Rotary:
    """RoPE of one axis at any positions, also fractional ones: (cos, sin) [L,width] float32, computed in float64."""
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    return get_1d_rotary_pos_embed(width, positions_L.double(), use_real=True, freqs_dtype=torch.float64)  # type: ignore[arg-type]


def action_times(chunk: int, steps_per_latent: float) -> Tensor:
    """Latent time of each action: that of the picture which follows it, ``(i + 1) / steps_per_latent``, float64 [P].

    Latent frame k shows the pixel frames up to control step ``k steps_per_latent``; action i brings about the state of step i + 1.
    """
    return (torch.arange(chunk, dtype=torch.float64) + 1.0) / steps_per_latent


def action_rotary(rope: Any, kind: str, chunk: int, steps_per_latent: float) -> Rotary:
    """(cos, sin) [1,P,1,head width] of an action chunk. ``rope``: the video transformer's ``WanRotaryPosEmbed``.

    ``shared``: the time axis of the video at ``action_times``, rows and columns 0. ``separate``: positions 0..P-1 over the whole head.
    """
    if kind == "separate":
        cos, sin = axis(torch.arange(chunk, dtype=torch.float64), rope.attention_head_dim)
    else:
        still = torch.zeros(chunk, dtype=torch.float64)
        parts = [
            axis(action_times(chunk, steps_per_latent), rope.t_dim),
            axis(still, rope.h_dim),
            axis(still, rope.w_dim),
        ]
        cos, sin = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return cos[None, :, None], sin[None, :, None]


def rotate(x_BLHD: Tensor, rotary: Rotary) -> Tensor:
    """Queries or keys [B,L,H,D] at their positions, as diffusers' attention rotates them."""
    cos, sin = rotary
    even, odd = x_BLHD.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x_BLHD)
