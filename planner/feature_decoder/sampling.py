"""Diffusion of joint targets: EDM noise levels and preconditioning (Karras et al. 2022), DDIM with exponential levels.

One convention: ``x = targets + sigma * noise``; ``denoise(x, sigma)`` gives the expected targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .config import SamplingConfig

#: Scale of the log-logistic density of training levels (its centre is ``sigma_data``).
LOGISTIC_SCALE = 0.5


def preconditioning(sigma_B: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """(c_skip, c_out, c_in): the denoised value is ``c_skip x + c_out network(c_in x)``, so that input and target of the network
    have unit deviation at every level if the data have deviation ``sigma_data``."""
    total = sigma_B.square() + sigma_data**2
    return sigma_data**2 / total, sigma_B * sigma_data / total.sqrt(), total.rsqrt()


def training_sigmas(count: int, config: SamplingConfig, generator: torch.Generator) -> Tensor:
    """Noise levels [count] float32 on the generator's device: log-logistic round ``sigma_data``, cut to [sigma_min, sigma_max]; a share
    ``coarse`` of them evenly in the logarithm from ``sigma_data`` to ``sigma_max`` instead."""
    centre = math.log(config.sigma_data)
    low, high = (
        1.0 / (1.0 + math.exp(-(math.log(level) - centre) / LOGISTIC_SCALE))
        for level in (config.sigma_min, config.sigma_max)
    )
    uniform = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
    place = low + (high - low) * uniform
    sigma = ((place / (1.0 - place)).log() * LOGISTIC_SCALE + centre).exp()
    if config.coarse > 0:
        chosen = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64) < config.coarse
        even = (config.sigma_data * (config.sigma_max / config.sigma_data) ** uniform).clamp(max=config.sigma_max)
        sigma = torch.where(chosen, even, sigma)
    return sigma.clamp(config.sigma_min, config.sigma_max).float()


def exponential_sigmas(steps: int, last: float, first: float) -> Tensor:
    """``steps`` levels from ``first`` down to ``last``, evenly spaced in their logarithm, then 0: [steps + 1] float64."""
    assert steps >= 1 and 0 < last < first
    levels = torch.linspace(math.log(first), math.log(last), steps, dtype=torch.float64).exp()
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


def ddim(denoise: Callable[[Tensor, Tensor], Tensor], noise_NRA: Tensor, sigmas: Tensor) -> Tensor:
    """From unit noise [N,R,A] to targets: at each level the sample moves along the straight line to what ``denoise(x_NRA, sigma_N)``
    says, as far as the next level is from 0. Returns float32."""
    x = noise_NRA.float() * float(sigmas[0])
    for now, after in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        level = torch.full((len(x),), now, dtype=torch.float32, device=x.device)
        denoised = denoise(x, level).float()
        x = denoised + (after / now) * (x - denoised)
    return x
