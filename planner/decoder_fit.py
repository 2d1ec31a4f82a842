"""The training loop that feature, latent and other small decoders share: AdamW, tri-stage learning rate, averaged weights, exact resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from physisforcing.core.errors import UserError, check_at_least
from physisforcing.worldmodel.data.batches import step_generator
from physisforcing.worldmodel.training.checkpoint import (
    binding_settings,
    check_settings,
    latest_checkpoint,
    load_training,
    restore_training,
    save_checkpoint,
    training_tensors,
)
from physisforcing.worldmodel.training.optim import OptimConfig, WeightAverage, build_optimizer, set_learning_rate

Log = Callable[[dict[str, Any]], None]
#: Loss terms of one step from its generator; ``loss`` is minimised, the others are reported.
Loss = Callable[[torch.Generator], dict[str, Tensor]]


@dataclass(slots=True, kw_only=True)
class FitConfig:
    """The learning rate rises from ``first_scale * lr`` over ``warmup_share`` of the run, holds for ``hold_share`` and falls along a cosine
    to ``last_scale * lr``: WorldArena's tri-stage schedule. ``ema``: decay of the average that is saved. ``time_limit_s``: end after so
    many seconds of steps (0: none); the schedule then follows the time, so that a shorter run is a complete one. ``precision``: fp32 or
    bf16. ``save_every``: steps between checkpoints to continue from (0: none)."""

    steps: int = 8000
    time_limit_s: float = 0.0
    batch: int = 64
    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.9
    weight_decay: float = 0.05
    warmup_share: float = 0.02
    hold_share: float = 0.08
    first_scale: float = 0.1
    last_scale: float = 1e-6
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    precision: str = "fp32"
    log_every: int = 50
    save_every: int = 0


def check_fit(config: FitConfig) -> None:
    """Raise ``UserError`` for settings that no run could have."""
    check_at_least(config, steps=1, batch=1, log_every=1, save_every=0)
    if config.precision not in ("fp32", "bf16"):
        raise UserError("precision", got=config.precision, wanted="fp32 or bf16", fix="precision=bf16 on a GPU")
    if not 0 <= config.ema < 1:
        raise UserError("ema", got=config.ema, wanted="0 or more, below 1", fix="ema=0.999")
    if config.warmup_share + config.hold_share > 1 or min(config.warmup_share, config.hold_share) < 0:
        got = (config.warmup_share, config.hold_share)
        raise UserError("warmup_share, hold_share", got=got, wanted="shares of the run", fix="0.02 and 0.08")


def tri_stage(done: float, config: FitConfig) -> float:
    """Factor on the learning rate when the share ``done`` of the run is over."""
    if done < config.warmup_share:
        return config.first_scale + (1 - config.first_scale) * done / config.warmup_share
    falling = 1.0 - config.warmup_share - config.hold_share
    if done < config.warmup_share + config.hold_share or falling <= 0:
        return 1.0
    place = min(1.0, (done - config.warmup_share - config.hold_share) / falling)
    return config.last_scale + (1 - config.last_scale) * 0.5 * (1 + math.cos(math.pi * place))


def check_folder(folder: Path, *, resume: bool) -> Path | None:
    """The latest checkpoint in ``folder``, or None. ``UserError`` where one is there that nobody wants to continue."""
    found = latest_checkpoint(folder)
    if found is not None and not resume:
        fix = "resume=true continues that run; for a new one name another output or delete the folder"
        got = f"{folder}, which holds {found.name} of an earlier run"
        raise UserError("output", got=got, wanted="a folder without checkpoints", fix=fix)
    return found


class Fit:
    """One run: ``run()`` makes all steps and leaves the averaged weights in the model.

    Random numbers of a step depend on (seed, step) alone; dropout draws from torch's global generator, whose state checkpoints hold.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        config: FitConfig,
        *,
        folder: Path,
        resume: bool = False,
        settings: Any = None,
    ) -> None:
        check_fit(config)
        self.model, self.loss, self.config, self.folder = model, loss, config, folder
        self.settings = config if settings is None else settings
        self.device = next(model.parameters()).device
        optim = OptimConfig(
            lr=config.lr, weight_decay=config.weight_decay, beta1=config.beta1, beta2=config.beta2, ema=config.ema
        )
        self.optimizer = build_optimizer(model.parameters(), optim)
        self.average = WeightAverage(model, config.ema)
        self.step, self.seconds = 0, 0.0
        found = check_folder(folder, resume=resume)
        if found is not None:
            check_settings(found, self.settings)
            self.step = restore_training(found, model, self.average, self.optimizer, self.device)
            self.seconds = float(load_training(found)[1]["seconds"])

    @property
    def done(self) -> float:
        """Share of the run that is over."""
        share = self.step / self.config.steps
        return max(share, self.seconds / self.config.time_limit_s) if self.config.time_limit_s else share

    def run(self, log: Log = lambda row: None) -> int:
        """Returns the number of steps. Raises ``FloatingPointError`` where a logged loss is not finite."""
        config, before, since, first = self.config, self.seconds, time.perf_counter(), self.step
        self.model.train()
        while self.done < 1.0:
            terms = self.update()
            self.seconds = before + time.perf_counter() - since
            if self.step % config.log_every == 0 or self.step == first + 1 or self.done >= 1.0:
                log(self._row(terms, self.seconds - before, self.step - first))
            if config.save_every and (self.step % config.save_every == 0 or self.done >= 1.0):
                self.save()
        self.average.swap()
        self.model.eval()
        return self.step

    def update(self) -> dict[str, Tensor]:
        """One step; returns its loss terms and gradient norm."""
        config = self.config
        set_learning_rate(self.optimizer, config.lr * tri_stage(self.done, config))
        generator = step_generator(config.seed, self.step, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            terms = self.loss(generator)
        self.optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.average.update(self.step)
        self.step += 1
        return {name: value.detach() for name, value in terms.items()} | {"grad_norm": norm}

    def save(self) -> Path:
        """A checkpoint from which the run goes on bit-exactly (with ``time_limit_s``: with the time that was left)."""
        tensors = training_tensors(self.model, self.average, self.optimizer, self.device)
        state = {"settings": binding_settings(self.settings), "seconds": self.seconds}
        return save_checkpoint(self.folder, self.step, lambda folder: folder.mkdir(), tensors, state)

    def _row(self, terms: dict[str, Tensor], seconds: float, steps: int) -> dict[str, Any]:
        row: dict[str, Any] = {"step": self.step} | {name: float(value) for name, value in terms.items()}
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(f"the loss is not finite at step {self.step}")
        row |= {"lr": self.optimizer.param_groups[0]["lr"], "step_ms": 1e3 * seconds / steps}
        row |= {"windows_s": self.config.batch * steps / seconds}
        row["eta_s"] = self.seconds * (1 - self.done) / self.done
        if self.device.type == "cuda":
            row["memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        return row
