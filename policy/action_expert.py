"""The action expert: a narrow transformer whose attention has the video backbone's heads, so that both share every self-attention.

Names and layers are those of diffusers' Wan transformer (``WanAttention``, ``FeedForward``, ``WanTimeTextImageEmbedding``), which is why its
weights can be resized from the video's (``initial.py``). ``WanTransformerBlock`` itself cannot hold it: there head width times heads is
the residual width.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .config import PolicyModelConfig

#: Eps of every norm in a Wan transformer.
EPS = 1e-6


@functools.cache
def action_block() -> type[nn.Module]:
    """``ActionBlock(width, ffn_dim, heads, head_dim)``: the sub-modules of a ``WanTransformerBlock`` at another residual width. It has no
    forward: ``mixture`` drives it beside the video's block."""
    from diffusers.models.attention import FeedForward
    from diffusers.models.normalization import FP32LayerNorm
    from diffusers.models.transformers.transformer_wan import WanAttention

    class ActionBlock(nn.Module):
        def __init__(self, width: int, ffn_dim: int, heads: int, head_dim: int) -> None:
            super().__init__()
            self.norm1 = FP32LayerNorm(width, EPS, elementwise_affine=False)
            self.attn1 = WanAttention(width, heads, head_dim, eps=EPS)
            self.attn2 = WanAttention(width, heads, head_dim, eps=EPS, cross_attention_dim_head=head_dim)
            self.norm2 = FP32LayerNorm(width, EPS, elementwise_affine=True)
            self.ffn = FeedForward(width, inner_dim=ffn_dim, activation_fn="gelu-approximate")
            self.norm3 = FP32LayerNorm(width, EPS, elementwise_affine=False)
            self.scale_shift_table = nn.Parameter(torch.randn(1, 6, width) / width**0.5)

    return ActionBlock


class ActionExpert(nn.Module):
    """What lies before and behind the blocks: embeddings of actions, time and text, and the head. The blocks lie in the video's blocks."""

    def __init__(self, config: PolicyModelConfig, *, text_dim: int, freq_dim: int) -> None:
        from diffusers.models.normalization import FP32LayerNorm
        from diffusers.models.transformers.transformer_wan import WanTimeTextImageEmbedding

        super().__init__()
        self.modulated = config.head == "modulated"
        self.action_in = nn.Linear(config.action_dim, config.width)
        self.condition_embedder = WanTimeTextImageEmbedding(
            dim=config.width, time_freq_dim=freq_dim, time_proj_dim=6 * config.width, text_embed_dim=text_dim
        )
        self.proj_out = nn.Linear(config.width, config.action_dim)
        if self.modulated:
            self.norm_out = FP32LayerNorm(config.width, EPS, elementwise_affine=False)
            self.scale_shift_table = nn.Parameter(torch.randn(1, 2, config.width) / config.width**0.5)
            nn.init.zeros_(self.proj_out.weight)
            nn.init.zeros_(self.proj_out.bias)

    def embed(self, actions_BPA: Tensor) -> Tensor:
        """Action tokens [B,P,width] in float32: neither the actions nor their first layer are rounded."""
        with torch.autocast(actions_BPA.device.type, enabled=False):
            return self.action_in(actions_BPA.float())

    def velocity(self, x_BPD: Tensor, temb_BD: Tensor) -> Tensor:
        """Velocity [B,P,A] float32 of the residual stream behind the last block."""
        with torch.autocast(x_BPD.device.type, enabled=False):
            x = x_BPD.float()
            if self.modulated:
                shift, scale = (self.scale_shift_table + temb_BD.float().unsqueeze(1)).unbind(1)
                x = self.norm_out(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
            return self.proj_out(x)


def build_expert(config: PolicyModelConfig, transformer: Any) -> tuple[ActionExpert, list[nn.Module]]:
    """A drawn expert and its blocks for a ``WanTransformer3DModel``; draws from torch's global generator."""
    video = transformer.config
    expert = ActionExpert(config, text_dim=video.text_dim, freq_dim=video.freq_dim)
    sizes = config.width, config.ffn_dim, video.num_attention_heads, video.attention_head_dim
    return expert, [action_block()(*sizes) for _ in transformer.blocks]
