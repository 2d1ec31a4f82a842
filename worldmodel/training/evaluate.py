"""Held-out values: fixed windows, fixed noise, fixed timesteps, so that two models are compared on equal terms."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.batches import WindowBank, step_generator
from ..data.latent_bank import LatentBank
from ..flow_matching import FlowMatchingConfig, motion_weights
from ..physics.forcing import PhysisForcing
from .denoiser import Denoiser
from .objective import draw_noise, objective

#: Seed of the fixed noise; unlike any training seed's stream because no training step has this number.
_EVALUATION_STEP = 2**40


#: Random numbers of windows; None where none are needed.
Drawn = tuple[Any, ...]
#: A term of a batch: name, value, weight in a mean over windows.
Measured = tuple[str, float, float]

#: Terms that are means over the points in the loss.
_OF_POINTS = ("pix", "epe_cells", "epe_px", "epe_uniform_px", "epe_still_px")
#: What the physics losses say their terms are means of; no terms themselves.
_COUNTS = ("pairs", "related")


@dataclass(slots=True, kw_only=True)
class HeldoutTerms:
    """Loss terms and metrics of K chunks of windows: ``values`` name -> [K], the counts of what each is a mean of in ``weights``."""

    rows_W: Tensor
    values: dict[str, Tensor]
    weights: dict[str, Tensor]

    def mean(self, chunks_K: Tensor | None = None) -> dict[str, float]:
        """Weighted means, over some of the chunks if they are named. What no window counts for is left out."""
        means = {}
        for name, value_K in self.values.items():
            weight_K = self.weights[name]
            if chunks_K is not None:
                value_K, weight_K = value_K[chunks_K], weight_K[chunks_K]
            if weight_K.sum() > 0:
                means[name] = float((value_K * weight_K).sum() / weight_K.sum())
        return means


def heldout_losses(
    denoiser: Denoiser,
    forcing: PhysisForcing | None,
    bank: WindowBank | LatentBank,
    flow: FlowMatchingConfig,
    *,
    windows: int = 64,
    chunk: int = 8,
    seed: int = 0,
) -> dict[str, float]:
    """Mean of every loss term and metric over up to ``windows`` windows of ``bank``, in float32 unless the caller casts.

    ``fm``, ``pix`` and ``sem`` are the three loss terms, ``loss`` their weighted sum; ``epe_px`` the end-point error of the
    soft-argmax beside ``epe_uniform_px`` (uniform map) and ``epe_still_px`` (points that stay). Trajectory terms are means over all
    valid points, ``sem`` over the windows that have relations: windows with none do not count, and ``chunk`` changes nothing.
    """
    means = heldout_terms(denoiser, forcing, bank, flow, windows=windows, chunk=chunk, seed=seed).mean()
    means["loss"] = means["fm"]
    if forcing is not None:
        physics = forcing.config
        # weights that are set from gradients are among the terms
        for name in ("pix", "sem"):
            weight = means.get(f"lambda_{name}", getattr(physics, f"lambda_{name}"))
            means["loss"] += weight * means.get(name, 0.0)
    return means


def heldout_terms(
    denoiser: Denoiser,
    forcing: PhysisForcing | None,
    bank: WindowBank | LatentBank,
    flow: FlowMatchingConfig,
    *,
    windows: int = 64,
    chunk: int = 1,
    seed: int = 0,
) -> HeldoutTerms:
    """The terms of ``heldout_losses`` chunk by chunk; where there are physics targets only windows that have them are chosen."""

    def terms(batch: dict[str, Any], drawn: Drawn) -> Iterator[Measured]:
        found = objective(denoiser, forcing, batch, drawn, flow, contextlib.nullcontext())
        del found["loss"]
        said = {name: float(found.pop(name)) for name in _COUNTS if name in found}
        counts = _counts(batch, flow, denoiser.first_predicted, said)
        for name, value in found.items():
            yield name, float(value), counts.get(name, float(len(batch["latents_BCFhw"])))

    return measure_windows(
        bank, lambda shape, generator: draw_noise(shape, flow, generator, denoiser.patch), terms,
        windows=windows, chunk=chunk, physics=forcing is not None, seed=seed,
    )  # fmt: skip


@torch.no_grad()
def measure_windows(
    bank: Any,
    draw: Callable[[tuple[int, ...], torch.Generator], Drawn],
    terms: Callable[[dict[str, Any], Drawn], Iterable[Measured]],
    *,
    windows: int,
    chunk: int,
    physics: bool,
    seed: int = 0,
) -> HeldoutTerms:
    """Terms of up to ``windows`` windows of ``bank`` (a ``WindowBank``, or one that has its methods), with ``physics`` of those that have
    targets. Windows are spread evenly. ``draw``: random numbers for latents of a shape, samples first; they belong to a window's place in this
    choice, not to the batch size. ``terms``: of a batch with its random numbers on the device."""
    candidates = bank.alike(physics=physics)
    assert len(candidates), "every episode has a window at its first step"
    rows = candidates[torch.linspace(0, len(candidates) - 1, min(windows, len(candidates))).long()]
    drawn = draw(bank.latent_shape(rows), step_generator(seed, _EVALUATION_STEP))
    values: dict[str, list[float]] = {}
    weights: dict[str, list[float]] = {}
    for part in torch.arange(len(rows)).split(chunk):
        some = tuple(value if value is None else value[part].to(bank.device) for value in drawn)
        for name, value, weight in terms(bank.batch(rows[part]), some):
            values.setdefault(name, []).append(value)
            weights.setdefault(name, []).append(weight)
    return HeldoutTerms(
        rows_W=rows,
        values={name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()},
        weights={name: torch.tensor(weight, dtype=torch.float64) for name, weight in weights.items()},
    )


def _counts(batch: dict[str, Any], flow: FlowMatchingConfig, first: int, said: dict[str, float]) -> dict[str, float]:
    """How much of what the terms of a batch are means of: weighted latent cells, points in the loss, samples with relations.
    Terms that are not here are means over samples."""
    cells = motion_weights(batch["latents_BCFhw"].float(), flow.motion_weight, flow.motion_cap)[:, :, first:]
    counts = {"fm": float(cells.sum())}
    if said:
        counts |= {**dict.fromkeys(_OF_POINTS, said["pairs"]), "sem": said["related"]}
    return counts
