"""What a training run holds and what one update does, whatever is trained: model, heads, optimiser, average, checkpoints."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from physisforcing.core.errors import UserError

from ..data.batches import WindowBank, step_generator
from ..data.latent_bank import LatentBank
from ..physics.forcing import PhysisForcing
from .checkpoint import binding_settings, restore_training, save_checkpoint, training_tensors
from .config import TrainWorldModelConfig
from .denoiser import Denoiser
from .evaluate import heldout_losses
from .export import export_model
from .finite import FiniteGuard
from .flops import step_flops
from .modules import base_fingerprint, prepared_modules
from .objective import draw_noise, objective, part_counts, part_of, without_text
from .optim import WeightAverage, build_optimizer, learning_rate, set_learning_rate
from .parallel import average_gradients, clip_gradients, gather_once, mean_terms, scatter, sum_parts
from .pictures import heldout_pictures
from .processes import Processes
from .runtime import autocast, gathers_once
from .steplog import StepLog
from .videos import heldout_videos


class Trainer:
    """Model, heads, optimiser and average of one run; ``step`` makes one update. Random numbers depend on (seed, step) only.

    ``processes``: those that share the run (``None``: one, on ``device``). All of them make the same calls.
    """

    def __init__(
        self,
        config: TrainWorldModelConfig,
        bank: WindowBank | LatentBank,
        device: torch.device,
        processes: Processes | None = None,
    ) -> None:
        self.config, self.bank, self.device = config, bank, device
        self.processes = processes if processes is not None else Processes(device=device)
        #: The rows of a batch that this process computes.
        self.part = self.processes.share(config.run.batch)
        torch.manual_seed(config.run.seed)
        self.model = self.modules()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.trained, config.optim, self.rates(), self.undecayed())
        self.average = WeightAverage(self.model, config.optim.ema)
        self.sampler = bank.sampler(config.data.start_fraction, config.data.end_fraction)
        self.guard = FiniteGuard(config.run.nonfinite, self.clips)
        #: The frozen weights that adapters belong to; they are not in checkpoints.
        self.base = base_fingerprint(config) if config.lora.rank else None
        #: The windows of a large backbone, whose data may have grown; those of small models are told by their settings.
        self.windows: str | None = getattr(bank, "fingerprint", None)
        #: The step that comes next, once it is known, and its rows.
        self._next = -1, torch.empty(0, dtype=torch.int64)
        self.wait_s = 0.0
        #: Floating-point operations of the last update in this process.
        self.operations = 0.0
        self._sample_flops: dict[tuple[int, ...], float] = {}
        #: The held-out window whose pictures are shown, once it is chosen.
        self.shown: Tensor | None = None

    def modules(self) -> nn.ModuleDict:
        """What is trained, on its device; ``forcing`` among it where there are physics losses. Torch's global generator is seeded."""
        return prepared_modules(self.config, self.bank, self.processes)

    def rates(self) -> list[tuple[float, Iterable[nn.Parameter]]]:
        """Parameters with a learning rate of their own, as a multiple of the run's."""
        return [(self.config.optim.heads, self.forcing.parameters())] if self.forcing is not None else []

    def undecayed(self) -> list[nn.Parameter]:
        """Parameters of two axes or more that are no matrices and have no weight decay."""
        return []

    @property
    def denoiser(self) -> Denoiser:
        return self.model["denoiser"]  # type: ignore[return-value]

    @property
    def forcing(self) -> PhysisForcing | None:
        return self.model["forcing"] if "forcing" in self.model else None  # type: ignore[return-value]

    def rows(self, step: int) -> Tensor:
        """Window rows of the batch of a step, on the CPU: a function of (seed, step)."""
        return self.sampler.rows(self.config.run.batch, self.config.run.seed, step)

    def clips(self, step: int) -> list[str]:
        """What the windows in the batch of a step are called."""
        return [self.bank.name(row) for row in self.rows(step).tolist()]

    def batch(self, step: int) -> dict[str, Any]:
        """What this process computes of the batch of a step."""
        drawn, rows = self._next
        made = self.bank.batch((rows if drawn == step else self.rows(step))[self.part])
        if step + 1 < self.config.run.steps:
            self._next = step + 1, self.rows(step + 1)
            self.bank.expect(self._next[1][self.part])
        return made

    def step(self, step: int) -> dict[str, Tensor]:
        """Update number ``step`` (from 0). Returns loss terms and gradient norm (before clipping) as device scalars.

        Gradient shares of the physics losses are measured at the steps whose line is logged. What is not finite is for ``guard``.
        """
        begun = time.perf_counter()
        if self.forcing is not None:
            # flow matching's gradient does not pass where the parts of a sample are put together for the physics losses
            due = (step + 1) % self.config.run.log_every == 0
            self.forcing.measure = due and self.processes.sequence == 1
        batch = self.batch(step)
        generator = step_generator(self.config.run.seed + 1, step, self.device)
        drawn = self.draw(batch, generator)
        self.wait_s, self.operations = time.perf_counter() - begun, self.flops(batch["latents_BCFhw"].shape)
        self.operations /= self.processes.sequence
        set_learning_rate(self.optimizer, learning_rate(self.config.optim, step, self.config.run.steps))
        terms = self._backward(batch, drawn)
        average_gradients(self.trained, self.processes)
        norm = clip_gradients(self.trained, self.config.optim.clip, self.processes)
        terms = mean_terms(terms, self.processes) | {"grad_norm": norm.detach()}
        if self.guard.admits(step, terms["loss"], norm):
            self.optimizer.step()
            self.average.update(step)
        self.optimizer.zero_grad(set_to_none=True)
        return terms

    def draw(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Any, ...]:
        """The random numbers of this process's part of a batch, drawn for the whole of it; may leave sentences of ``batch`` out."""
        whole = self.config.run.batch, *batch["latents_BCFhw"].shape[1:]
        drawn = draw_noise(whole, self.config.flow, generator, self.denoiser.patch)
        if self.config.text_dropout > 0:
            shared = self.config.run.batch, self.part
            batch["text_BLD"] = without_text(batch["text_BLD"], self.config.text_dropout, generator, *shared)
        return tuple(value[self.part] for value in drawn)

    def counts(self, batch: dict[str, Any], parts: int) -> Tensor | None:
        """What the losses are means of, where a batch is computed in ``parts``."""
        return part_counts(self.denoiser, self.forcing, batch, self.config.flow, parts)

    def terms(self, batch: dict[str, Any], drawn: tuple[Any, ...], counts: Tensor | None) -> dict[str, Tensor]:
        """Loss terms of a batch, ``loss`` with its graph."""
        precision = autocast(self.config.run, self.device)
        return objective(self.denoiser, self.forcing, batch, drawn, self.config.flow, precision, counts)  # type: ignore[arg-type]

    def _backward(self, batch: dict[str, Any], drawn: tuple[Any, ...]) -> dict[str, Tensor]:
        """Gradients of the mean loss of what this process computes, ``run.micro`` samples at a time; its loss terms."""
        count, found = len(batch["latents_BCFhw"]), []
        micro = self.config.run.micro or count
        counts = self.counts(batch, count // micro) if micro < count else None
        once = self.processes.many and gathers_once(self.config.run)
        for first in range(0, count, micro):
            rows = slice(first, first + micro)
            if once:
                gather_once(self.model, last=first + micro >= count)
            terms = self.terms(part_of(batch, rows), tuple(v if v is None else v[rows] for v in drawn), counts)
            (terms["loss"] * (micro / count)).backward()
            if self.forcing is not None and self.forcing.measures:
                terms |= self.forcing.shares()
            found.append(terms)
        return found[0] if len(found) == 1 else sum_parts(found)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has the averaged weights. Weights that are gathered or frozen in bfloat16 are used in it, others in float32."""
        half = self.config.lora.rank > 0 or self.config.model or (self.processes.many and self.device.type == "cuda")
        self._swap()
        try:
            with autocast(self.config.run, self.device) if half else contextlib.nullcontext():
                yield
        finally:
            self._swap()

    def _swap(self) -> None:
        if self.processes.many:
            scatter(self.model)
        self.average.swap()

    def heldout(self, bank: WindowBank | LatentBank) -> dict[str, float]:
        """Held-out values of the averaged weights; each of several processes computes all of them, which gives what one would."""
        with self.averaged():
            values = heldout_losses(
                self.denoiser, self.forcing, bank, self.config.flow, windows=self.config.heldout_windows,
                chunk=1 if self.config.model else 8,
            )  # fmt: skip
        return {f"heldout_{name}": value for name, value in values.items()}

    def show(self, bank: WindowBank | LatentBank, done: int, log: StepLog) -> None:
        """Pictures or videos of held-out windows into the log."""
        if isinstance(bank, LatentBank):
            heldout_videos(self, bank, done, log)
        else:
            heldout_pictures(self, bank, done, log)

    def save(self, run: Path, done: int) -> Path:
        """Write the checkpoint after ``done`` updates; every process takes part."""

        def write_model(folder: Path) -> None:
            with self.averaged():
                self.export(folder, checkpoint=True)

        tensors = training_tensors(
            self.model, self.average, self.optimizer, self.device, frozen=self.config.lora.rank == 0
        )
        state = {
            "settings": binding_settings(self.config),
            "teachers": self.teachers,
            "skipped": self.guard.skipped,
            "base": self.base,
            "windows": self.windows,
            "noted": self.noted,
            "processes": self.processes.world,
        }
        return save_checkpoint(run, done, write_model, tensors, state, self.processes, self.config.run.keep)

    @property
    def noted(self) -> dict[str, Any]:
        """Settings that are not given but noted beside a large backbone's weights."""
        live = self.model["denoiser"] if self.config.model else None
        return {} if live is None else {"large.first_latent": live.first_latent, "large.tap": live.tap}

    @property
    def teachers(self) -> dict[str, Any] | None:
        """Who made the targets: name, version, licence and checksum of each teacher."""
        return None if self.bank.targets is None else self.bank.targets.identity

    def restore(self, checkpoint: Path) -> int:
        """Continue from a checkpoint, bit-exactly; returns the number of updates it holds. ``UserError`` where the targets are of
        other teachers, the frozen weights of another model or the windows of latent stores others, whose settings may look the same, and
        where another folder of the same model notes that it is tapped elsewhere or shown its first latent in another way."""
        state = json.loads((checkpoint / "training" / "state.json").read_text())
        began, self.guard.skipped = state.get("teachers", self.teachers), state.get("skipped", 0)
        if began != self.teachers:
            fix = "give the weights that the run began with (teacher.*.path), or begin another run"
            raise UserError("teacher", got=str(self.teachers), wanted=str(began), fix=fix)
        if state.get("base") != self.base:
            fix = "give run.init the model that the run began with, or begin another run"
            raise UserError("run.init", got=f"weights {self.base}", wanted=f"weights {state.get('base')}", fix=fix)
        for name, mine in self.noted.items():
            if (theirs := state.get("noted", self.noted)[name]) != mine:
                wanted, fix = f"{theirs}, with which {checkpoint} was trained", f"{name}={theirs}, or begin another run"
                raise UserError(name, got=f"{mine}, as {self.config.model} notes", wanted=wanted, fix=fix)
        if state.get("windows", self.windows) != self.windows:
            name = "data.latents" if self.config.data.latents else "data.roots"
            fix = f"give {name} and how windows are made as they were when the run began, or begin another run with run.init"
            raise UserError(name, got=f"windows {self.windows}", wanted=f"windows {state['windows']}", fix=fix)
        return restore_training(
            checkpoint,
            self.model,
            self.average,
            self.optimizer,
            self.device,
            frozen=self.config.lora.rank == 0,
            processes=self.processes,
        )

    def export(self, folder: Path, *, checkpoint: bool = False) -> None:
        """Write the live weights as a model's folder, in a ``checkpoint`` bit-exactly or what of it is trained; every process takes part,
        and the first writes."""
        export_model(folder, self.model, self.config, self.bank, self.processes, checkpoint=checkpoint)

    def flops(self, shape: Sequence[int]) -> float:
        """Floating-point operations of an update of a batch [B,C,F,h,w] (``flops.step_flops``)."""
        one = tuple(shape[1:])
        if one not in self._sample_flops:
            self._sample_flops[one] = step_flops(self.denoiser, shape, self.bank.text_tokens)
        return shape[0] * self._sample_flops[one]
