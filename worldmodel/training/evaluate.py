"""Held-out values: fixed windows, fixed noise, fixed timesteps, so that two models are compared on equal terms."""

from __future__ import annotations

import contextlib

import torch

from ..backbones.wan import WanDenoiser
from ..data.batches import WindowBank, step_generator
from ..flow_matching import FlowMatchingConfig
from ..physics.forcing import PhysisForcing
from .objective import draw_noise, objective

#: Seed of the fixed noise; unlike any training seed's stream because no training step has this number.
_EVALUATION_STEP = 2**40


@torch.no_grad()
def heldout_losses(
    denoiser: WanDenoiser,
    forcing: PhysisForcing | None,
    bank: WindowBank,
    flow: FlowMatchingConfig,
    *,
    windows: int = 64,
    chunk: int = 8,
    seed: int = 0,
) -> dict[str, float]:
    """Mean of every loss term and metric over up to ``windows`` windows of ``bank``, in float32.

    ``fm``, ``pix`` and ``sem`` are the three loss terms; ``epe_px`` the end-point error of the soft-argmax beside
    ``epe_uniform_px`` (uniform map) and ``epe_still_px`` (points that stay). Windows are spread evenly; where there are physics
    targets only windows that have them count. The noise belongs to a window's place in this choice, not to the batch size.
    """
    device = bank.latents_WCFhw.device
    candidates = (
        bank.physics_rows() if forcing is not None and bank.targets is not None else torch.arange(len(bank.table))
    )
    rows = candidates[torch.linspace(0, len(candidates) - 1, min(windows, len(candidates))).long()]
    batch = bank.batch(rows.to(device))
    noise, sigma, order = draw_noise(batch["latents_BCFhw"].cpu(), flow, step_generator(seed, _EVALUATION_STEP))
    sums: dict[str, float] = {}
    for part in torch.arange(len(rows)).split(chunk):
        drawn = noise[part].to(device), sigma[part].to(device), order[part].to(device)
        terms = objective(denoiser, forcing, bank.batch(rows[part].to(device)), drawn, flow, contextlib.nullcontext())
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(part)
    return {name: total / len(rows) for name, total in sums.items()}
