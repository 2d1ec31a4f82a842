"""The training objective of one batch, eq. (13): flow matching plus the two physics losses. Used by training and evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..flow_matching import FlowMatchingConfig, flow_matching_loss, motion_weights, sample_train_sigma
from ..physics.forcing import PhysisForcing
from ..physics.relation import token_order
from .denoiser import Denoiser


def draw_noise(
    shape: Sequence[int], config: FlowMatchingConfig, generator: torch.Generator, patch: Sequence[int] = (1, 1, 1)
) -> tuple[Tensor, Tensor, Tensor]:
    """The random numbers of one step for latents of this ``shape`` [B,C,F,h,w]: (noise, sigma [B], order of the tokens [B,L]), on the
    generator's device."""
    noise = torch.randn(tuple(shape), generator=generator, device=generator.device)
    sigma = sample_train_sigma(shape[0], config.train_shift, generator)
    return noise, sigma, token_order(shape[0], math.prod(token_grid(shape, patch)), generator)


def token_grid(shape: Sequence[int], patch: Sequence[int]) -> tuple[int, int, int]:
    """(F, h, w) tokens of latents of ``shape`` [B,C,F,h,w]. ``patch``: latent frames, rows and columns of a token."""
    frames, rows, columns = (side // part for side, part in zip(shape[2:], patch, strict=True))
    return frames, rows, columns


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


@torch.no_grad()
def part_counts(
    denoiser: Denoiser, forcing: PhysisForcing | None, batch: Mapping[str, Any], flow: FlowMatchingConfig, parts: int
) -> Tensor:
    """What the three losses are means of, [3]: weights of latent cells, of points, samples with relations. Over all processes, for each of the
    ``parts`` that each of them makes of its ``batch``, so that gradients summed over parts are those of one large batch."""
    x0 = batch["latents_BCFhw"].float()
    weights = motion_weights(x0, flow.motion_weight, flow.motion_cap)[:, :, denoiser.first_predicted :]
    points = x0.new_zeros(2)
    if forcing is not None and batch["targets"] is not None:
        points = forcing.counts(batch["targets"], token_grid(x0.shape, denoiser.patch))
    counts = torch.cat([weights.sum().view(1), points])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts)
    return counts / parts


def part_of(batch: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    """Some samples of a batch."""
    return {
        name: part_of(value, rows) if isinstance(value, dict) else value if value is None else value[rows]
        for name, value in batch.items()
    }


def objective(
    denoiser: Denoiser,
    forcing: PhysisForcing | None,
    batch: Mapping[str, Any],
    drawn: tuple[Tensor, Tensor, Tensor | None],
    flow: FlowMatchingConfig,
    precision: AbstractContextManager,
    counts_3: Tensor | None = None,
) -> dict[str, Tensor]:
    """Loss terms as device scalars: ``loss`` (for backward), ``fm`` and, with targets, ``pix``, ``sem`` and their metrics.

    ``counts_3``: of ``part_counts``, where ``batch`` is one of the parts of a larger one.
    """
    x0, (noise, sigma, order) = batch["latents_BCFhw"], drawn
    physics = forcing is not None and batch["targets"] is not None
    with precision:
        velocity, tapped = denoiser.predict(batch, noise, sigma, need_tap=physics)
    cells, points = (None, None) if counts_3 is None else (counts_3[0], counts_3[1:])
    fm = flow_matching_loss(velocity, x0, noise, flow, first=denoiser.first_predicted, count=cells)
    terms = {"loss": fm, "fm": fm.detach()}
    if physics:
        assert tapped is not None and forcing is not None
        forcing.watch(tapped)
        out = forcing(
            tapped, token_grid(x0.shape, denoiser.patch), batch["targets"], order, sigma_B=sigma, counts_2=points
        )
        terms["loss"] = fm + out.loss
        terms |= {"pix": out.pix, "sem": out.sem, **out.metrics}
    return terms
