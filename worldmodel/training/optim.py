"""Optimiser, learning-rate schedule and weight averaging."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and a cosine to ``final_lr * lr``. ``ema``: decay of the averaged weights that are exported."""

    lr: float = 1e-3
    final_lr: float = 0.02
    warmup: int = 300
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    ema: float = 0.999


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of update ``step`` (counted from 0) of ``steps``."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """Weight decay on matrices only; the fused kernel on a GPU."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.ndim >= 2 else others).append(parameter)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    fused = any(parameter.is_cuda for parameter in matrices + others)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


class WeightAverage:
    """Exponential moving average of a module's parameters, with ``min(decay, (1 + n) / (10 + n))`` after n updates."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.names = [name for name, _ in module.named_parameters()]
        self._live: list[Tensor] = [parameter for _, parameter in module.named_parameters()]
        self.shadow = [parameter.detach().clone() for parameter in self._live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, self._live, 1.0 - decay)

    def tensors(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.shadow, strict=True))

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, value in zip(self.names, self.shadow, strict=True):
            value.copy_(tensors[name])

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averaged and live weights (call twice to come back)."""
        for live, shadow in zip(self._live, self.shadow, strict=True):
            kept = live.detach().clone()
            live.copy_(shadow)
            shadow.copy_(kept)
