"""From the tokens of a partial denoiser pass to a few latents: a spatio-temporal Perceiver resampler.

Each latent frame has queries of its own. A layer lets them read that frame's tokens (and each other), then lets the queries at the
same place of all latent frames read each other, then a feed-forward layer. The tokens get a learned time and a learned row and column.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from .config import ResamplerConfig
from .layers import Attention, FeedForward, projection


class ResamplerLayer(nn.Module):
    """Cross-attention within a latent frame, self-attention over latent frames, feed-forward; all residual."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        c = config
        self.norm_tokens, self.norm_queries = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.read = Attention(c.width, c.heads, c.head_dim, bias=False)
        self.norm_time = nn.LayerNorm(c.width)
        self.over_time = Attention(c.width, c.heads, c.width // c.heads)
        self.norm_hidden = nn.LayerNorm(c.width)
        self.feed_forward = FeedForward(c.width, c.hidden, bias=False)

    def forward(self, queries_BFQD: Tensor, tokens_NLD: Tensor) -> Tensor:
        """``tokens_NLD``: tokens of all frames of all samples, N = B * F."""
        batch, frames = queries_BFQD.shape[:2]
        x = queries_BFQD.flatten(0, 1)
        normed = self.norm_queries(x)
        x = x + self.read(normed, torch.cat([self.norm_tokens(tokens_NLD), normed], dim=1))
        x = rearrange(x, "(B F) Q D -> (B Q) F D", B=batch)
        x = x + self.over_time(self.norm_time(x))
        x = rearrange(x, "(B Q) F D -> B F Q D", B=batch, F=frames)
        return x + self.feed_forward(self.norm_hidden(x))


class Resampler(nn.Module):
    """Features [B,K,F,h,w,D] -> latents [B,F*Q,width]. The K taps of a token stand side by side in the input projection."""

    def __init__(
        self, config: ResamplerConfig, *, taps: int, feature_dim: int, frames: int, grid: tuple[int, int]
    ) -> None:
        super().__init__()
        width = config.width
        self.project = projection(taps * feature_dim, width)
        self.queries = nn.Parameter(torch.randn(frames, config.latents_per_frame, width))
        self.time = nn.Parameter(0.02 * torch.randn(frames, 1, 1, width))
        self.row = nn.Parameter(0.02 * torch.randn(grid[0], 1, width))
        self.column = nn.Parameter(0.02 * torch.randn(1, grid[1], width))
        self.layers = nn.ModuleList([ResamplerLayer(config) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(width)

    def forward(self, features_BKFhwD: Tensor) -> Tensor:
        batch = len(features_BKFhwD)
        tokens = self.project(rearrange(features_BKFhwD, "B K F h w D -> B F h w (K D)"))
        tokens = rearrange(tokens + self.time + self.row + self.column, "B F h w D -> (B F) (h w) D")
        queries = self.queries.expand(batch, -1, -1, -1)
        for layer in self.layers:
            queries = layer(queries, tokens)
        return self.norm(queries).flatten(1, 2)
