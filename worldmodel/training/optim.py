"""Optimiser, learning-rate schedule and weight averaging."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from physisforcing.core.errors import UserError, check_at_least, unknown_name

KINDS = ("adamw", "adamw8bit")
#: Of 8-bit moments: numbers that share a scale, and the processes that may share a weight at most.
BLOCK, MOST_PARTS = 256, 64


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and a cosine to ``final_lr * lr``. ``kind``: ``adamw``, or ``adamw8bit``, whose moments are 8-bit numbers with a
    scale for each 256 of them (TorchAO, after arXiv:2110.02861): a quarter of their memory; of matrices alone (``in_eight_bits``). ``ema``: decay of the averaged weights that are exported; 0 exports
    the weights as they are and keeps no average. ``heads``: learning rate of the physics heads, as a multiple of ``lr``."""

    lr: float = 1e-3
    final_lr: float = 0.02
    warmup: int = 300
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    ema: float = 0.999
    heads: float = 1.0
    kind: str = "adamw"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_name("optim.kind", self.kind, KINDS, see="docs/training.md")
        check_at_least(self, "optim.", lr=0, final_lr=0, warmup=0, weight_decay=0, beta1=0, beta2=0, ema=0, heads=0)
        for name in ("beta1", "beta2", "ema"):
            if (value := getattr(self, name)) >= 1:
                raise UserError(f"optim.{name}", got=value, wanted="below 1: a decay", fix=f"write optim.{name}=0.99")
        if self.clip <= 0:  # the gradients' norm would become 0, and nothing would be trained
            raise UserError("optim.clip", got=self.clip, wanted="a norm above 0", fix="optim.clip=1, or 1e9 for none")


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of update ``step`` (counted from 0) of ``steps``."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    config: OptimConfig,
    rates: Iterable[tuple[float, Iterable[nn.Parameter]]] = (),
    undecayed: Iterable[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """Weight decay on what has two axes or more and is not ``undecayed``; the fused kernel on a GPU. Sharded parameters are groups of their
    own: one call of a kernel takes either kind. ``rates``: those of the parameters that learn at a multiple of ``config.lr``, and that multiple.
    ``UserError`` for ``adamw8bit`` without TorchAO, and over processes that do not get equal parts."""
    scales = {id(parameter): scale for scale, some in rates for parameter in some if scale != 1.0}
    kept = {id(parameter) for parameter in undecayed}
    known: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for parameter in parameters:
        kind = parameter.ndim < 2 or id(parameter) in kept, is_sharded(parameter), scales.get(id(parameter), 1.0)
        known.setdefault(kind, []).append(parameter)
    groups = [
        {"params": found, "weight_decay": 0.0 if other else config.weight_decay, "scale": scale}
        for (other, _, scale), found in sorted(
            known.items(), key=lambda item: (*item[0][:2], item[0][2] != 1.0, item[0][2])
        )
    ]
    if config.kind == "adamw8bit":
        return _in_eight_bits(groups, config)
    fused = any(parameter.is_cuda for found in known.values() for parameter in found)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=fused)


def _in_eight_bits(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    for parameter in (one for group in groups for one in group["params"] if in_eight_bits(one)):
        if is_sharded(parameter) and (rows := parameter.shape[0]) % (parts := parameter.device_mesh.size()):
            got = f"adamw8bit, and a weight of {rows} rows over {parts} processes"
            fix = "a number of processes that divides them, or optim.kind=adamw"
            raise UserError("optim.kind", got=got, wanted="equal parts, which share their scales with nobody", fix=fix)
    return _eight_bit_adamw()(groups, lr=config.lr, betas=(config.beta1, config.beta2), block_size=BLOCK)


def in_eight_bits(parameter: Tensor) -> bool:
    """Whether the moments of this parameter are 8-bit numbers: matrices whose parts are whole blocks in as many as ``MOST_PARTS`` processes. It must
    not depend on how many there are, or a checkpoint would not fit another number."""
    return parameter.ndim > 1 and not (parameter.shape[0] % MOST_PARTS or parameter.numel() % (MOST_PARTS * BLOCK))


@functools.cache
def _eight_bit_adamw() -> type[torch.optim.Optimizer]:
    """TorchAO's, whose choice of what is in 8 bits depends on what lies in a process. ``UserError`` without TorchAO."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        fix = "pip install 'physisforcing[fp8]', or optim.kind=adamw"
        raise UserError("optim.kind", got="adamw8bit without TorchAO", wanted="the package torchao", fix=fix) from error

    class EightBitAdamW(AdamW8bit):
        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            if not in_eight_bits(p):
                return torch.zeros_like(p)
            made = self._subclass_zeros(local(p), signed, self.block_size)
            if not is_sharded(p):
                return made
            from torch.distributed.tensor import DTensor

            mesh, places = p.device_mesh, p.placements  # type: ignore[attr-defined]
            return DTensor.from_local(made, mesh, places, run_check=False, shape=p.shape, stride=p.stride())

    return EightBitAdamW


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """``value`` for every group, times its ``scale``."""
    for group in optimizer.param_groups:
        rate = value * group.get("scale", 1.0)
        if isinstance(group["lr"], Tensor):  # compiled into the step
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def is_sharded(value: Tensor) -> bool:
    """Whether a tensor is a DTensor, told without importing what makes them."""
    return hasattr(value, "full_tensor")


def local(value: Tensor) -> Tensor:
    """The part of a sharded tensor that lies in this process; another tensor as it is. Shares memory with it."""
    return value.to_local() if is_sharded(value) else value  # type: ignore[attr-defined]


class WeightAverage:
    """Exponential moving average of a module's trainable parameters, with ``min(decay, (1 + n) / (10 + n))`` after n updates. Of sharded
    parameters every process averages its own part. A ``decay`` of 0 keeps no average: the live weights are it."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad and decay > 0}
        self.names = list(trained)
        self.shadow = [parameter.detach().clone() for parameter in trained.values()]
        self._trained = list(trained.values())

    @torch.no_grad()
    def update(self, step: int) -> None:
        if not self.names:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([local(value) for value in self.shadow], [local(p) for p in self._trained], 1.0 - decay)

    def tensors(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.shadow, strict=True))

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, value in zip(self.names, self.shadow, strict=True):
            value.copy_(tensors[name])

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averaged and live weights (call twice to come back)."""
        for live, shadow in zip(map(local, self._trained), map(local, self.shadow), strict=True):
            kept = live.clone()
            live.copy_(shadow)
            shadow.copy_(kept)
