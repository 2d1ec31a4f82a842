"""The training objective of one batch, eq. (13): flow matching plus the two physics losses. Used by training and evaluation."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..backbones.wan import WanDenoiser
from ..flow_matching import (
    FlowMatchingConfig,
    add_noise,
    flow_matching_loss,
    frame_timesteps,
    sample_train_sigma,
)
from ..physics.forcing import PhysisForcing
from ..physics.relation import token_order


def draw_noise(
    latents_BCFhw: Tensor, config: FlowMatchingConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The random numbers of one step: (noise like the latents, sigma [B], token order [B,F*h*w]), on the generator's device."""
    batch = latents_BCFhw.shape[0]
    noise = torch.randn(latents_BCFhw.shape, generator=generator, device=generator.device)
    sigma = sample_train_sigma(batch, config.train_shift, generator)
    return noise, sigma, token_order(batch, latents_BCFhw[0, 0].numel(), generator)


def without_text(
    text_BLD: Tensor,
    share: float,
    generator: torch.Generator,
    count: int | None = None,
    rows: slice = slice(None),
) -> Tensor:
    """Text tokens [B,L,D] with those of a random ``share`` of the samples set to zero, which is what padding is. ``text_BLD`` may be the
    ``rows`` of a batch of ``count`` samples, for which is drawn."""
    drawn = torch.rand(len(text_BLD) if count is None else count, generator=generator, device=generator.device)
    keep_B = drawn[rows] >= share
    return text_BLD * keep_B[:, None, None].to(text_BLD.dtype)


def objective(
    denoiser: WanDenoiser,
    forcing: PhysisForcing | None,
    batch: dict[str, Any],
    drawn: tuple[Tensor, Tensor, Tensor | None],
    flow: FlowMatchingConfig,
    precision: AbstractContextManager,
) -> dict[str, Tensor]:
    """Loss terms as device scalars: ``loss`` (for backward), ``fm`` and, with targets, ``pix``, ``sem`` and their metrics."""
    x0, (noise, sigma, order) = batch["latents_BCFhw"], drawn
    physics = forcing is not None and batch["targets"] is not None
    with precision:
        context = denoiser.context(batch["text_BLD"], batch["proprioception_BKA"])
        action = denoiser.action_embedding(batch.get("actions_BPA"), batch["proprioception_BKA"])
        velocity, tapped = denoiser(
            add_noise(x0, noise, sigma),
            frame_timesteps(sigma, x0.shape[2]),
            context,
            action_BFD=action,
            need_tap=physics,
        )
    fm = flow_matching_loss(velocity, x0, noise, flow)
    terms = {"loss": fm, "fm": fm.detach()}
    if physics:
        assert tapped is not None and forcing is not None
        forcing.watch(tapped)
        out = forcing(tapped, tuple(x0.shape[2:]), batch["targets"], order, sigma_B=sigma)
        terms["loss"] = fm + out.loss
        terms |= {"pix": out.pix, "sem": out.sem, **out.metrics}
    return terms
