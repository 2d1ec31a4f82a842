"""Rectified-flow noising, its training loss and the Euler sampler.

One convention everywhere: ``x_t = (1 - s) x0 + s eps``, velocity ``v = eps - x0``, timestep ``t = 1000 s`` with ``s`` in (0, 1].
Latent frame 0 is the clean conditioning frame (TI2V-5B convention): it is pinned while sampling and carries no loss. Where the picture
comes in through channels of its own (A14B as released), nothing is pinned: ``first=0``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

#: Timesteps seen by the transformer are ``TIMESTEP_SCALE * sigma``.
TIMESTEP_SCALE = 1000.0


@dataclass(slots=True, kw_only=True)
class FlowMatchingConfig:
    """``train_shift`` and ``sample_shift`` move the noise levels towards 1 (``shift_sigma``).

    ``motion_weight`` m: latent cells are weighted ``1 + m * min(|x0 - x0[frame 0]|, motion_cap)``; 0 switches it off.
    """

    train_shift: float = 3.0
    sample_shift: float = 3.0
    motion_weight: float = 2.0
    motion_cap: float = 2.0


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """``shift * s / (1 + (shift - 1) s)``: leaves 0 and 1 where they are and moves the rest towards 1 for shift > 1."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def sample_train_sigma(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """Noise levels of a training batch, [count] float32 on the generator's device: uniform in (0, 1), then shifted."""
    uniform = torch.rand(count, generator=generator, device=generator.device)
    return shift_sigma(uniform.clamp_(1e-4, 1.0), shift)


def sampling_sigmas(steps: int, shift: float) -> Tensor:
    """Noise levels of a sampler, [steps + 1] float64, from 1 down to 0.

    ``linspace(1, 1/steps, steps)`` shifted once, then 0: Wan's own schedule (diffusers' ``set_timesteps(steps)`` would shift twice).
    """
    assert steps >= 1
    levels = shift_sigma(torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64), shift)
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


def add_noise(x0_BCFhw: Tensor, noise_BCFhw: Tensor, sigma_B: Tensor, *, first: int = 1) -> Tensor:
    """Noisy latents at ``sigma_B`` with the latent frames before ``first`` clean. Same shape as ``x0_BCFhw``, float32."""
    sigma = sigma_B.view(-1, 1, 1, 1, 1)
    noisy = (1.0 - sigma) * x0_BCFhw + sigma * noise_BCFhw
    return torch.cat([x0_BCFhw[:, :, :first], noisy[:, :, first:]], dim=2)


def frame_timesteps(sigma_B: Tensor, frames: int) -> Tensor:
    """Timesteps per latent frame, [B,F] float32: 0 for the clean frame 0, ``1000 sigma`` for the others."""
    timesteps = (TIMESTEP_SCALE * sigma_B.float()).view(-1, 1).repeat(1, frames)
    timesteps[:, 0] = 0.0
    return timesteps


def motion_weights(x0_BCFhw: Tensor, weight: float, cap: float) -> Tensor:
    """Loss weights >= 1 that grow where a latent differs from the first latent frame. Shape of ``x0_BCFhw``."""
    difference = (x0_BCFhw - x0_BCFhw[:, :, :1]).abs()
    return 1.0 + weight * difference.clamp(max=cap)


def flow_matching_loss(
    velocity_BCFhw: Tensor,
    x0_BCFhw: Tensor,
    noise_BCFhw: Tensor,
    config: FlowMatchingConfig,
    *,
    first: int = 1,
    count: Tensor | None = None,
) -> Tensor:
    """Weighted mean squared velocity error over the latent frames from ``first`` on, a float32 scalar.

    The weights are normalised to mean 1 over the batch, so that the value stays comparable between weightings. With several processes
    (``torch.distributed``) over the batch of all of them: the mean of what they get is the loss of the whole batch. ``count``: the sum of
    the weights, where this is a part of a larger batch: of all of it, over all processes, for each part that a process makes of it.
    """
    error = (velocity_BCFhw.float() - (noise_BCFhw.float() - x0_BCFhw.float()))[:, :, first:].square()
    if config.motion_weight == 0.0:
        return error.mean()
    weights = motion_weights(x0_BCFhw.float(), config.motion_weight, config.motion_cap)[:, :, first:]
    total = (error * weights).sum()
    many = dist.is_available() and dist.is_initialized()
    if count is None:
        count = weights.sum()
        if many:
            dist.all_reduce(count)
    return (total * dist.get_world_size() if many else total) / count


def euler_sample(
    velocity: Callable[[Tensor, Tensor], Tensor],
    first_BC1hw: Tensor,
    noise_BCFhw: Tensor,
    *,
    steps: int,
    shift: float,
) -> Tensor:
    """Integrate ``velocity(x_BCFhw, timesteps_BF) -> v_BCFhw`` from noise to latents with the Euler rule.

    ``first_BC1hw``: the clean latent frame 0, pinned before every call and in the result. Returns float32 [B,C,F,h,w].
    """
    sigmas = sampling_sigmas(steps, shift)
    x = torch.cat([first_BC1hw, noise_BCFhw[:, :, 1:]], dim=2).float()
    for now, after in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        level = torch.full((x.shape[0],), now, dtype=torch.float32, device=x.device)
        v = velocity(x, frame_timesteps(level, x.shape[2])).float()
        x = torch.cat([first_BC1hw.float(), (x + (after - now) * v)[:, :, 1:]], dim=2)
    return x
