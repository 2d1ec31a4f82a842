"""How points are found in the features of a denoiser, and how far off that is: used by ``probe.py`` and ``physics_choices.py``.

End-point errors, in cells of the token grid, are means over the points that a bank's targets select, in the latent frames in which
they are seen; targets lie in the hull of the cell centres, as in the loss. Noise levels are fixed, and the noise of a window is
the same for all networks. Nothing here depends on the choices that a network was trained with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from physisforcing.worldmodel.backbones.wan import WanDenoiser
from physisforcing.worldmodel.data.batches import WindowBank, WindowSampler, step_generator
from physisforcing.worldmodel.flow_matching import (
    FlowMatchingConfig,
    add_noise,
    flow_matching_loss,
    frame_timesteps,
    motion_weights,
)
from physisforcing.worldmodel.physics.config import PhysicsConfig
from physisforcing.worldmodel.physics.forcing import REPORT_SIZE, PhysisForcing
from physisforcing.worldmodel.physics.trajectory import (
    cell_centres,
    clamp_to_hull,
    end_point_error,
    match_logits,
    soft_argmax,
)
from physisforcing.worldmodel.training.config import RunConfig
from physisforcing.worldmodel.training.objective import draw_noise
from physisforcing.worldmodel.training.optim import OptimConfig, build_optimizer, learning_rate, set_learning_rate
from physisforcing.worldmodel.training.runtime import autocast

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
#: Unlike any training step's number: its random stream is the evaluation's own.
EVALUATION_STEP = 2**40 + 1
#: phi as the default has it, and a psi that costs nothing.
PROBE = PhysicsConfig(lambda_pix=1.0, lambda_sem=0.0, max_tokens=2)


@dataclass(slots=True, kw_only=True)
class ReadOut:
    """How points are found in the output of ``block``: features [...,D] -> [...,C], and as in ``match_logits``."""

    block: int
    features: Callable[[Tensor], Tensor]
    temperature: Tensor | float | None = None
    upsample: int = 1

    @classmethod
    def of_head(cls, block: int, head: PhysisForcing) -> ReadOut:
        upsample = head.config.upsample
        return cls(block=block, features=head.features, temperature=head.temperature(), upsample=upsample)

    @classmethod
    def raw(cls, block: int, temperature: float) -> ReadOut:
        return cls(block=block, features=lambda x: nnf.layer_norm(x, x.shape[-1:]), temperature=temperature)

    def find(self, hidden_BFhwD: Tensor, query_BN2: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B,F-1,N,2] of points of latent frame 0: the best cell of the token grid, and the soft-argmax."""
        features, grid, up = self.features(hidden_BFhwD), hidden_BFhwD.shape[2:4], self.upsample
        logits = match_logits(features, query_BN2, temperature=self.temperature)  # type: ignore[arg-type]
        best = cell_centres(tuple(grid), device=logits.device)[logits.argmax(-1)]
        if up > 1:
            logits = match_logits(features, query_BN2, upsample=up, temperature=self.temperature)  # type: ignore[arg-type]
        return best, soft_argmax(logits, (grid[0] * up, grid[1] * up))


@dataclass(slots=True, kw_only=True)
class Measured:
    """``errors``: (read-out, ``soft`` or ``argmax``, sigma) -> summed error of each window in cells [W]; ``still`` and ``uniform`` have
    sigma None. ``count_W``: points they are sums over. ``fm``: sigma -> flow-matching loss."""

    count_W: Tensor
    errors: dict[tuple[str, str, float | None], Tensor] = field(default_factory=dict)
    fm: dict[float, float] = field(default_factory=dict)

    def mean(self, name: str, kind: str, sigma: float | None, rows: Tensor | slice = slice(None)) -> float:
        return float(self.errors[name, kind, sigma][rows].sum() / self.count_W[rows].sum().clamp(min=1))

    def over_sigmas(self, name: str, kind: str = "soft") -> float:
        return float(np.mean([self.mean(name, kind, sigma) for sigma in self.fm]))


@contextmanager
def all_blocks(denoiser: WanDenoiser) -> Iterator[list[Tensor]]:
    """Collects the output of every block of a forward pass: what the first norm of the next one reads, at last the output norm."""
    model, outputs = denoiser.transformer, []
    readers = [block.norm1 for block in model.blocks[1:]] + [model.norm_out]
    hooks = [m.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0])) for m in readers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def block_outputs(
    denoiser: WanDenoiser, batch: dict[str, Any], noise: Tensor, sigma_B: Tensor
) -> tuple[Tensor, list[Tensor]]:
    x0 = batch["latents_BCFhw"]
    context = denoiser.context(batch["text_BLD"], batch["proprioception_BKA"])
    with all_blocks(denoiser) as outputs:
        velocity, _ = denoiser(add_noise(x0, noise, sigma_B), frame_timesteps(sigma_B, x0.shape[2]), context)
    return velocity, outputs


@torch.no_grad()
def measure(
    denoiser: WanDenoiser,
    readouts: dict[str, ReadOut],
    bank: WindowBank,
    sigmas: Sequence[float] = SIGMAS,
    *,
    chunk: int = 32,
    flow: FlowMatchingConfig | None = None,
) -> Measured:
    """Errors of the read-outs on all windows of ``bank``, whose targets say which points count and where they are. In float32; the
    noise of a window depends on its place in the bank alone."""
    flow, device = flow or FlowMatchingConfig(), bank.latents_WCFhw.device
    noise = draw_noise(bank.latents_WCFhw.shape, flow, step_generator(0, EVALUATION_STEP))[0]
    sums: dict[tuple[str, str, float | None], list[Tensor]] = {}
    counts, losses, cells = [], dict.fromkeys(sigmas, 0.0), 0.0
    for part in torch.arange(len(bank.table)).split(chunk):
        batch, drawn = bank.batch(part.to(device)), noise[part].to(device)
        x0, targets = batch["latents_BCFhw"], batch["targets"]
        grid, points = (x0.shape[3], x0.shape[4]), targets["points_BFN2"]
        target_BFN2 = clamp_to_hull(points[:, 1:], grid)
        weight_BFN = targets["select_BN"][:, None].float() * targets["visible_BFN"][:, 1:].float()
        counts.append(weight_BFN.sum((1, 2)))
        stay = clamp_to_hull(points[:, :1], grid).expand_as(target_BFN2)
        guesses = {("still", "soft", None): stay, ("uniform", "soft", None): torch.full_like(target_BFN2, 0.5)}
        share = float(motion_weights(x0, flow.motion_weight, flow.motion_cap)[:, :, 1:].sum())
        cells += share
        for sigma in sigmas:
            velocity, outputs = block_outputs(denoiser, batch, drawn, x0.new_full((len(x0),), sigma))
            losses[sigma] += share * float(flow_matching_loss(velocity, x0, drawn, flow))
            for name, readout in readouts.items():
                hidden = outputs[readout.block - 1].float().unflatten(1, (x0.shape[2], *grid))
                best, soft = readout.find(hidden, points[:, 0])
                guesses |= {(name, "argmax", sigma): best, (name, "soft", sigma): soft}
        for key, guess in guesses.items():
            sums.setdefault(key, []).append(window_sums(guess, target_BFN2, weight_BFN, grid))
    return Measured(
        count_W=torch.cat(counts).double().cpu(),
        errors={key: torch.cat(value).double().cpu() for key, value in sums.items()},
        fm={sigma: loss / cells for sigma, loss in losses.items()},
    )


def window_sums(guess_BFN2: Tensor, target_BFN2: Tensor, weight_BFN: Tensor, grid: tuple[int, int]) -> Tensor:
    """Summed error of the points of each window, in cells, [B]."""

    def one(guess: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return end_point_error(guess, target, weight, grid, REPORT_SIZE)[0] * weight.sum()

    return torch.vmap(one)(guess_BFN2, target_BFN2, weight_BFN)


def train_probes(
    denoiser: WanDenoiser, blocks: Sequence[int], bank: WindowBank, *, steps: int, batch: int, seed: int = 0
) -> dict[int, PhysisForcing]:
    """A fresh phi for each of the blocks, trained on the frozen network with the default trajectory loss, noise levels even in (0, 1).
    The heads share batches and nothing else."""
    device, flow = bank.latents_WCFhw.device, FlowMatchingConfig(train_shift=1.0)
    grid = tuple(bank.latents_WCFhw.shape[2:])
    torch.manual_seed(seed)
    width = denoiser.transformer.blocks[0].scale_shift_table.shape[-1]
    heads = nn.ModuleList([PhysisForcing(PROBE, width=width, teacher_dim=1) for _ in blocks]).to(device)
    optim = OptimConfig(warmup=max(1, steps // 10))
    optimizer, sampler = build_optimizer(heads.parameters(), optim), WindowSampler.build(bank.table, 0.0)
    for step in range(steps):
        data = bank.batch(sampler.draw(batch, step_generator(seed, step)).to(device))
        noise, sigma, order = draw_noise(data["latents_BCFhw"].shape, flow, step_generator(seed + 1, step, device))
        with torch.no_grad(), autocast(RunConfig(), device):
            outputs = block_outputs(denoiser, data, noise, sigma)[1]
        set_learning_rate(optimizer, learning_rate(optim, step, steps))
        losses = [h(outputs[b - 1], grid, data["targets"], order).loss for b, h in zip(blocks, heads, strict=True)]
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return dict(zip(blocks, heads.requires_grad_(False), strict=True))  # type: ignore[arg-type]
