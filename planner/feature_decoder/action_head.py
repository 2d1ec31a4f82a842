"""The diffusion action head: noisy rows of joint targets, latents of the imagination and the instruction -> denoised rows.

An encoder reads instruction tokens and latents once; a decoder, which is called once a noise level, lets the rows read each other and
the encoder's output, and is modulated (FiLM with gates) by noise level and instruction. EDM preconditioning round it.

The published head has a second projection of the instruction that its code freezes and never calls, and gives its rows no positions
(only a causal mask tells them apart). Here that projection modulates the decoder, rows have learned positions, padding is masked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import ActionHeadConfig
from .layers import Attention, FeedForward, projection
from .sampling import preconditioning


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, pre-norm and residual."""

    def __init__(self, c: ActionHeadConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.attention = Attention(c.width, c.heads, c.width // c.heads, dropout=c.attention_dropout)
        self.feed_forward = FeedForward(c.width, c.hidden, dropout=c.feed_forward_dropout)
        self.drop = nn.Dropout(c.residual_dropout)

    def forward(self, x_BLD: Tensor, keep_BL: Tensor) -> Tensor:
        x = x_BLD + self.drop(self.attention(self.norm1(x_BLD), None, keep_BL))
        return x + self.feed_forward(self.norm2(x))


class FilmDecoderLayer(nn.Module):
    """Self-attention of the rows and feed-forward, both shifted, scaled and gated by a condition; cross-attention between them."""

    def __init__(self, c: ActionHeadConfig) -> None:
        super().__init__()
        self.norm1, self.norm3 = (nn.LayerNorm(c.width, elementwise_affine=False) for _ in range(2))
        self.norm2 = nn.LayerNorm(c.width)
        self.attention, self.cross = (
            Attention(c.width, c.heads, c.width // c.heads, dropout=c.attention_dropout) for _ in range(2)
        )
        self.feed_forward = FeedForward(c.width, c.hidden, dropout=c.feed_forward_dropout)
        self.drop = nn.Dropout(c.residual_dropout)
        film = nn.Linear(c.width, 6 * c.width)
        nn.init.zeros_(film.weight)
        nn.init.zeros_(film.bias)
        self.modulation = nn.Sequential(nn.SiLU(), film)

    def forward(self, x_BRD: Tensor, condition_BD: Tensor, memory_BLD: Tensor, keep_BL: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition_BD)[:, None].chunk(6, dim=-1)
        x = x_BRD + gate1 * self.drop(self.attention(self.norm1(x_BRD) * (1 + scale1) + shift1))
        x = x + self.drop(self.cross(self.norm2(x), memory_BLD, keep_BL))
        return x + gate2 * self.feed_forward(self.norm3(x) * (1 + scale2) + shift2)


@dataclass(slots=True, kw_only=True)
class Memory:
    """What the decoder reads at every noise level: the encoder's output, where it is no padding, the instruction's condition."""

    tokens_BLD: Tensor
    keep_BL: Tensor
    condition_BD: Tensor

    def repeat(self, times: int) -> Memory:
        """Each entry ``times`` times in a row, for several draws of it."""
        return Memory(
            tokens_BLD=self.tokens_BLD.repeat_interleave(times, dim=0),
            keep_BL=self.keep_BL.repeat_interleave(times, dim=0),
            condition_BD=self.condition_BD.repeat_interleave(times, dim=0),
        )


class ActionHead(nn.Module):
    """``encode`` once, ``denoise`` at every level. Rows are normalised targets [B,R,A]."""

    def __init__(
        self,
        config: ActionHeadConfig,
        *,
        rows: int,
        action_dim: int,
        goal_dim: int,
        goal_tokens: int,
        latents: int,
        sigma_data: float,
        proprioception: bool = False,
    ) -> None:
        super().__init__()
        width = config.width
        self.sigma_data = sigma_data
        self.read_latents = nn.Linear(width, width)
        self.goal_token, self.goal_condition = projection(goal_dim, width), projection(goal_dim, width)
        self.state_token = projection(action_dim, width) if proprioception else None
        self.goal_position = nn.Parameter(0.02 * torch.randn(goal_tokens, width))
        self.latent_position = nn.Parameter(0.02 * torch.randn(latents, width))
        self.row_position = nn.Parameter(0.02 * torch.randn(rows, width))
        self.encoder = nn.ModuleList([EncoderLayer(config) for _ in range(config.encoder_layers)])
        self.norm_memory = nn.LayerNorm(width)
        self.level = projection(width, width)
        self.read_rows = nn.Linear(action_dim, width)
        self.decoder = nn.ModuleList([FilmDecoderLayer(config) for _ in range(config.decoder_layers)])
        self.norm_rows = nn.LayerNorm(width)
        self.write_rows = nn.Linear(width, action_dim)
        nn.init.zeros_(self.write_rows.weight)
        nn.init.zeros_(self.write_rows.bias)

    def encode(
        self, latents_BQD: Tensor, goal_BLG: Tensor, goal_keep_BL: Tensor, state_BA: Tensor | None = None
    ) -> Memory:
        """Latents of the resampler, instruction tokens with their mask (False: padding), normalised drive targets now or None."""
        assert (state_BA is not None) == (self.state_token is not None)
        tokens = [self.goal_token(goal_BLG) + self.goal_position, self.read_latents(latents_BQD) + self.latent_position]
        if self.state_token is not None:
            tokens.append(self.state_token(state_BA)[:, None])
        x = torch.cat(tokens, dim=1)
        keep = torch.cat([goal_keep_BL, goal_keep_BL.new_ones(len(x), x.shape[1] - goal_keep_BL.shape[1])], dim=1)
        for layer in self.encoder:
            x = layer(x, keep)
        weights = goal_keep_BL.unsqueeze(-1).to(goal_BLG.dtype)
        mean = (goal_BLG * weights).sum(1) / weights.sum(1).clamp_min(1.0)
        return Memory(tokens_BLD=self.norm_memory(x), keep_BL=keep, condition_BD=self.goal_condition(mean))

    def network(self, rows_BRA: Tensor, sigma_B: Tensor, memory: Memory) -> Tensor:
        """The raw network on scaled rows: what preconditioning wraps."""
        condition = self.level(level_embedding(sigma_B, self.row_position.shape[1])) + memory.condition_BD
        x = self.read_rows(rows_BRA) + self.row_position
        for layer in self.decoder:
            x = layer(x, condition, memory.tokens_BLD, memory.keep_BL)
        return self.write_rows(self.norm_rows(x))

    def denoise(self, noisy_BRA: Tensor, sigma_B: Tensor, memory: Memory) -> Tensor:
        """Expected rows given noisy ones: ``c_skip x + c_out network(c_in x)``."""
        skip, out, scale = (c.view(-1, 1, 1) for c in preconditioning(sigma_B, self.sigma_data))
        return skip * noisy_BRA + out * self.network(scale * noisy_BRA, sigma_B, memory).float()

    def loss(self, rows_BRA: Tensor, sigma_B: Tensor, noise_BRA: Tensor, memory: Memory) -> Tensor:
        """EDM's score matching, a float32 scalar: squared error of the denoised rows, divided by ``c_out`` squared."""
        skip, out, scale = (c.view(-1, 1, 1) for c in preconditioning(sigma_B, self.sigma_data))
        noisy = rows_BRA + sigma_B.view(-1, 1, 1) * noise_BRA
        wanted = (rows_BRA - skip * noisy) / out
        return (self.network(scale * noisy, sigma_B, memory).float() - wanted).square().mean()


def level_embedding(sigma_B: Tensor, width: int) -> Tensor:
    """Sines and cosines of ``1000 * log(sigma) / 4``, [B,width]."""
    assert width % 2 == 0
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(width // 2, device=sigma_B.device) / (width // 2))
    angle = 250.0 * sigma_B.float().log()[:, None] * frequencies
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
