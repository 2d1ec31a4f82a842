"""Trajectory alignment, eq. (5)-(8): where the features say that each point of the first frame goes.

Coordinates are (x, y) in [0,1] per axis; the centre of token (i, j) of an h x w grid is ((j+.5)/w, (i+.5)/h). Shape
suffixes: B batch, T pixel frames, F latent frames, N points, C channels, h w token grid, L = h*w tokens of a latent
frame.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from .regions import latent_frame, pair, to_cells


def divisor(count: Tensor) -> Tensor:
    """A sum of weights to divide by (they may be shares, whose sum is below 1), or 1 where there is nothing to divide."""
    return torch.where(count > 0, count, torch.ones_like(count))


def cell_centres(grid: tuple[int, int], *, device: torch.device | str | None = None) -> Tensor:
    """Centres of the tokens in row order, float32 [L,2]."""
    height, width = grid
    y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
    x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
    return torch.stack([x[None].expand(height, width), y[:, None].expand(height, width)], -1).reshape(-1, 2)


def latent_targets(
    points_BTN2: Tensor, visible_BTN: Tensor, *, temporal_stride: int = 4, time: str = "mean", visibility: str = "any"
) -> tuple[Tensor, Tensor]:
    """Tracks at the times of the latent frames of a causal autoencoder: points [B,F,N,2], visible [B,F,N].

    Latent 0 is frame 0, always: it holds the queries. ``mean``: latent k is the mean over the visible ones of the frames 4k-3..4k
    (where none is visible the plain mean stands there); ``last``: frame 4k; ``uniform``: the clip resampled to F frames, whatever the
    autoencoder does. ``visibility``: ``any`` gives bool, whether a frame that the position is made of shows the point; ``share`` gives
    float, the share of those frames that do; ``off`` gives True everywhere.
    """
    frames = visible_BTN.shape[1]
    latents = (frames - 1) // temporal_stride + 1
    member_FT = _frames_of_latents(frames, latents, temporal_stride, time, points_BTN2)
    weight_BTN = visible_BTN.to(points_BTN2.dtype)
    seen = torch.einsum("ft,btn->bfn", member_FT, weight_BTN)
    if visibility == "share":
        visible = seen
    else:
        visible = seen > 0 if visibility == "any" else torch.ones_like(seen, dtype=torch.bool)
    everywhere = torch.einsum("ft,btnc->bfnc", member_FT, points_BTN2)
    if time != "mean":  # a position between two frames needs both
        return everywhere, visible
    mean_seen = torch.einsum("ft,btn,btnc->bfnc", member_FT, weight_BTN, points_BTN2)
    tiny = torch.finfo(points_BTN2.dtype).tiny
    return torch.where((seen > 0)[..., None], mean_seen / seen.clamp(min=tiny)[..., None], everywhere), visible


def _frames_of_latents(frames: int, latents: int, stride: int, time: str, like: Tensor) -> Tensor:
    """How much of each pixel frame is in a latent frame's position, [F,T] of the type of ``like``; rows sum to 1."""
    frame = torch.arange(frames, device=like.device, dtype=torch.float64)  # exact where a place is a frame
    latent = torch.arange(latents, device=like.device, dtype=torch.float64)[:, None]
    if time == "mean":
        member = (latent_frame(frames, temporal_stride=stride, device=like.device)[None] == latent).to(like.dtype)
        return member / member.sum(1, keepdim=True)
    if time == "last":
        return (frame[None] == stride * latent).to(like.dtype)
    assert time == "uniform", time
    place = ((latent + 0.5) * frames / latents - 0.5).clamp(0, frames - 1) * (latent > 0)
    return (1 - (place - frame[None]).abs()).clamp(min=0).to(like.dtype)


def clamp_to_hull(points: Tensor, grid: tuple[int, int]) -> Tensor:
    """An expectation over cell centres cannot leave their hull: move targets [...,2] outside it onto its border."""
    margin = pair(points, 0.5 / grid[1], 0.5 / grid[0])
    return torch.minimum(torch.maximum(points, margin), 1 - margin)


def in_hull(points: Tensor, grid: tuple[int, int]) -> Tensor:
    """Whether targets [...,2] lie inside the hull of cell centres: bool [...]."""
    return (clamp_to_hull(points, grid) == points).all(-1)


def bilinear_weights(points_BN2: Tensor, grid: tuple[int, int]) -> Tensor:
    """Weights [B,N,L] that sample an h x w map at normalised points, border values repeated outside the hull.

    A matrix product with these is ``grid_sample(align_corners=False, padding_mode="border")`` with a deterministic
    backward.
    """
    height, width = grid
    cell = to_cells(points_BN2, grid)
    x = cell[..., 0].clamp(0, width - 1)[..., None] - torch.arange(width, device=cell.device)
    y = cell[..., 1].clamp(0, height - 1)[..., None] - torch.arange(height, device=cell.device)
    hat_x, hat_y = (1 - x.abs()).clamp(min=0), (1 - y.abs()).clamp(min=0)
    return (hat_y[..., :, None] * hat_x[..., None, :]).flatten(-2)


def match_logits(
    features_BFhwC: Tensor,
    query_BN2: Tensor,
    *,
    query_frame: int = 0,
    upsample: int = 1,
    temperature: Tensor | None = None,
) -> Tensor:
    """Eq. (5), (6): ``Q(p_i)^T K_t(x) / sqrt(C)`` for every latent frame after 0 and every token: [B,F-1,N,L].

    Q is latent frame ``query_frame`` sampled bilinearly at the query points, K_t the latent frames 1..F-1. Under first-frame
    conditioning Q of frame 0 comes from clean tokens (timestep 0) and K_t from noisy ones. ``upsample``: the logits are
    enlarged bilinearly by this factor, L = upsample^2 h w (enlarging the keys would give the same at more cost).
    ``temperature`` (scalar) replaces 1/sqrt(C): features of root mean square 1 make Q^T K / C a cosine, which is divided by it.
    """
    batch, frames, height, width, channels = features_BFhwC.shape
    tokens_BFLC = features_BFhwC.reshape(batch, frames, height * width, channels)
    query_BNC = bilinear_weights(query_BN2, (height, width)) @ tokens_BFLC[:, query_frame]
    scale = channels**-0.5 if temperature is None else 1 / (channels * temperature)
    logits = torch.einsum("bnc,bflc->bfnl", query_BNC * scale, tokens_BFLC[:, 1:])
    if upsample == 1:
        return logits
    fine = cell_centres((height * upsample, width * upsample), device=logits.device).to(logits)
    return logits @ bilinear_weights(fine[None], (height, width))[0].T


def soft_argmax(logits_BFNL: Tensor, grid: tuple[int, int]) -> Tensor:
    """Eq. (7): expected coordinate under the softmax over the token grid, [B,F,N,2] in [0,1] per axis."""
    # Centred values: the weights sum to one only up to rounding, and the error is relative to the size of the values.
    return logits_BFNL.softmax(-1) @ (cell_centres(grid, device=logits_BFNL.device).to(logits_BFNL) - 0.5) + 0.5


def trajectory_loss(
    logits_BFNL: Tensor,
    target_BFN2: Tensor,
    weight_BFN: Tensor,
    grid: tuple[int, int],
    *,
    kind: str = "mse",
    huber_delta: float = 0.05,
    gauss_sigma: float = 0.7,
) -> tuple[Tensor, Tensor]:
    """Eq. (8): mean over the weighted points of the squared distance between expected and true coordinate.

    ``target_BFN2``: latent frames 1.., inside the hull of cell centres. ``weight_BFN``: m_i * v_{i,t}; where it is
    all zero the loss is exactly 0 with zero gradients. Returns (scalar loss, prediction [B,F,N,2]). A uniform map
    scores 1/6 on targets spread evenly.
    """
    error, prediction = trajectory_errors(
        logits_BFNL, target_BFN2, grid, kind=kind, huber_delta=huber_delta, gauss_sigma=gauss_sigma
    )
    return (weight_BFN * error).sum() / divisor(weight_BFN.sum()), prediction


def trajectory_errors(
    logits_BFNL: Tensor,
    target_BFN2: Tensor,
    grid: tuple[int, int],
    *,
    kind: str = "mse",
    huber_delta: float = 0.05,
    gauss_sigma: float = 0.7,
) -> tuple[Tensor, Tensor]:
    """The error of each point in each latent frame, [B,F,N], and the prediction [B,F,N,2]. ``grid``: that of the logits.

    ``huber`` is quadratic below ``huber_delta`` (same curvature as the MSE), linear above.
    """
    prediction = soft_argmax(logits_BFNL, grid)
    if kind == "ce_gauss":
        offset = to_cells(target_BFN2, grid)[..., None, :] - to_cells(
            cell_centres(grid, device=target_BFN2.device), grid
        )
        soft_target = (offset.square().sum(-1) / (-2 * gauss_sigma**2)).softmax(-1)
        error = -(soft_target * nnf.log_softmax(logits_BFNL, -1)).sum(-1)
    else:
        squared = (prediction - target_BFN2).square().sum(-1)
        if kind == "huber":
            distance = squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt()
            squared = torch.where(distance <= huber_delta, squared, huber_delta * (2 * distance - huber_delta))
        else:
            assert kind == "mse", kind
        error = squared
    return error, prediction


def end_point_error(
    prediction_BFN2: Tensor, target_BFN2: Tensor, weight_BFN: Tensor, grid: tuple[int, int], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Mean distance between predicted and true coordinate, in cells of ``grid`` and in pixels of ``size`` (H, W)."""
    offset, total = prediction_BFN2 - target_BFN2, divisor(weight_BFN.sum())
    in_units = [torch.linalg.vector_norm(offset * pair(offset, s[1], s[0]), dim=-1) for s in (grid, size)]
    return (weight_BFN * in_units[0]).sum() / total, (weight_BFN * in_units[1]).sum() / total
