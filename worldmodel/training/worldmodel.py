"""``physis train worldmodel``: PhysisForcing training of the video transformer on latents that are resident on the device."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from physisforcing.core.errors import UserError

from ..data.batches import WindowBank, step_generator
from ..data.latent_bank import LatentBank
from ..physics.forcing import PhysisForcing
from .banks import load_bank, prepare_banks
from .checkpoint import binding_settings, restore_training, save_checkpoint, training_tensors
from .config import TrainWorldModelConfig
from .denoiser import Denoiser
from .evaluate import heldout_losses
from .export import export_model
from .finite import FiniteGuard
from .flops import step_flops
from .initial import adopt_model
from .modules import base_fingerprint, build_modules, check_run, prepared_modules
from .objective import draw_noise, objective, part_counts, part_of, without_text
from .optim import WeightAverage, build_optimizer, learning_rate, set_learning_rate
from .parallel import average_gradients, clip_gradients, mean_terms, scatter, sum_parts
from .pictures import heldout_pictures
from .processes import Processes
from .runtime import autocast, begin_run, kernels_given_back
from .steplog import StepLog
from .stopping import StopSignals, TrainingStopped
from .videos import heldout_videos

__all__ = ["Trainer", "build_modules", "load_bank", "prepare_banks", "train_world_model"]


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
        self.model = prepared_modules(config, bank, self.processes)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        heads = self.forcing.parameters() if self.forcing is not None else ()
        self.optimizer = build_optimizer(self.trained, config.optim, heads)
        self.average = WeightAverage(self.model, config.optim.ema)
        self.sampler = bank.sampler(config.data.start_fraction, config.data.end_fraction)
        self.guard = FiniteGuard(config.run.nonfinite, self.clips)
        #: The frozen weights that adapters belong to; they are not in checkpoints.
        self.base = base_fingerprint(config) if config.lora.rank else None
        #: The windows of a large backbone, whose data may have grown; those of small models are told by their settings.
        self.windows = bank.fingerprint if isinstance(bank, LatentBank) else None
        #: The step that comes next, once it is known, and its rows.
        self._next = -1, torch.empty(0, dtype=torch.int64)
        self.wait_s = 0.0
        #: Floating-point operations of the last update in this process.
        self.operations = 0.0
        self._sample_flops: dict[tuple[int, ...], float] = {}
        #: The held-out window whose pictures are shown, once it is chosen.
        self.shown: Tensor | None = None

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
            self.forcing.measure = (step + 1) % self.config.run.log_every == 0
        batch = self.batch(step)
        generator = step_generator(self.config.run.seed + 1, step, self.device)
        whole = self.config.run.batch, *batch["latents_BCFhw"].shape[1:]
        drawn = draw_noise(whole, self.config.flow, generator, self.denoiser.patch)
        drawn = tuple(value[self.part] for value in drawn)
        if self.config.text_dropout > 0:
            shared = self.config.run.batch, self.part
            batch["text_BLD"] = without_text(batch["text_BLD"], self.config.text_dropout, generator, *shared)
        self.wait_s, self.operations = time.perf_counter() - begun, self.flops(batch["latents_BCFhw"].shape)
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

    def _backward(self, batch: dict[str, Any], drawn: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Gradients of the mean loss of what this process computes, ``run.micro`` samples at a time; its loss terms."""
        count, found = len(batch["latents_BCFhw"]), []
        micro = self.config.run.micro or count
        flow, precision, counts = self.config.flow, autocast(self.config.run, self.device), None
        if micro < count:
            counts = part_counts(self.denoiser, self.forcing, batch, flow, count // micro)
        for first in range(0, count, micro):
            some, noise = part_of(batch, slice(first, first + micro)), tuple(v[first : first + micro] for v in drawn)
            terms = objective(self.denoiser, self.forcing, some, noise, flow, precision, counts)  # type: ignore[arg-type]
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
            "processes": self.processes.world,
        }
        return save_checkpoint(run, done, write_model, tensors, state, self.processes)

    @property
    def teachers(self) -> dict[str, Any] | None:
        """Who made the targets: name, version, licence and checksum of each teacher."""
        return None if self.bank.targets is None else self.bank.targets.identity

    def restore(self, checkpoint: Path) -> int:
        """Continue from a checkpoint, bit-exactly; returns the number of updates it holds. ``UserError`` where the targets are of
        other teachers, the frozen weights of another model or the windows of latent stores others, whose settings may look the same."""
        state = json.loads((checkpoint / "training" / "state.json").read_text())
        began, self.guard.skipped = state.get("teachers", self.teachers), state.get("skipped", 0)
        if began != self.teachers:
            fix = "give the weights that the run began with (teacher.*.path), or begin another run"
            raise UserError("teacher", got=str(self.teachers), wanted=str(began), fix=fix)
        if state.get("base") != self.base:
            fix = "give run.init the model that the run began with, or begin another run"
            raise UserError("run.init", got=f"weights {self.base}", wanted=f"weights {state.get('base')}", fix=fix)
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


#: Training windows and held-out ones.
Banks = tuple[WindowBank, WindowBank] | tuple[LatentBank, LatentBank | None]


@kernels_given_back()
def train_world_model(config: TrainWorldModelConfig, banks: Banks | None = None) -> Path:
    """Train and write checkpoints, metrics and the exported model (``<out>/export``, averaged weights; float16, of a large backbone
    bfloat16).

    ``heldout.json`` in the run folder holds the held-out values before and after. Returns the export folder. Raises
    ``TrainingStopped`` once a signal has ended the run and its checkpoint is written, and ``FloatingPointError`` as ``FiniteGuard`` does.
    """
    adopt_model(config)
    processes = Processes.start(config.run.device)
    try:
        return _train(config, banks, processes)
    finally:
        processes.close()


def _train(config: TrainWorldModelConfig, banks: Banks | None, processes: Processes) -> Path:
    check_run(config, processes)
    run, device, found = begin_run(config, processes)
    if config.large.export and found is None:
        wanted = "a run with a checkpoint, and run.resume=true"
        raise UserError("large.export", got=str(run), wanted=wanted, fix="run.out=<that run> run.resume=true")
    if banks is None:
        banks = processes.one_after_the_other(lambda: prepare_banks(config, device, quiet=not processes.first))
    bank, heldout = banks
    trainer = Trainer(config, bank, device, processes)
    first = trainer.restore(found) if found is not None else 0
    if config.large.export:
        return _finish(trainer, banks, run)
    quiet = not processes.first
    log = StepLog(
        run, config.run.steps, config.run.batch, device, done=first, quiet=quiet, wandb=config.run.wandb
    )  # fmt: skip
    if first == 0:
        _measure(trainer, heldout, 0, log)
    with StopSignals() as signals:
        for step in range(first, config.run.steps):
            terms = trainer.step(step)
            done, last = step + 1, step + 1 == config.run.steps
            _after_update(trainer, log, terms, done)
            told = None if last else _told(signals, processes)
            if not told and (done % config.run.eval_every == 0 or last):
                _measure(trainer, heldout, done, log)
            if done % config.run.save_every == 0 or last or told:
                trainer.guard.check()
                saved = trainer.save(run, done)
                if told:
                    log.close()
                    raise TrainingStopped(told, done, config.run.steps, saved)
    log.close()
    return _finish(trainer, banks, run)


def _finish(trainer: Trainer, banks: Banks, run: Path) -> Path:
    """Write the averaged weights as ``export/``."""
    trainer.average.swap()
    trainer.export(run / "export")
    for some in banks:
        if isinstance(some, LatentBank):
            some.close()
    trainer.processes.barrier()
    return run / "export"


def _told(signals: StopSignals, processes: Processes) -> str | None:
    """What tells the run to end, in any of its processes."""
    if not processes.total([float(signals.told is not None)])[0]:
        return None
    return signals.told or "a signal to another process"


def _measure(trainer: Trainer, heldout: WindowBank | LatentBank | None, done: int, log: StepLog) -> None:
    """Held-out values and pictures into the log; those before and after the run into ``heldout.json``."""
    if heldout is None:
        return
    values = trainer.heldout(heldout)
    log.event({"step": done, **values})
    report, place = log.run / "heldout.json", {0: "before", trainer.config.run.steps: "after"}.get(done)
    if place is not None and trainer.processes.first:
        known = json.loads(report.read_text()) if report.is_file() and done else {}
        report.write_text(json.dumps({**known, place: values}, indent=2) + "\n")
    if isinstance(heldout, LatentBank):
        heldout_videos(trainer, heldout, done, log)
    else:
        heldout_pictures(trainer, heldout, done, log)


def _after_update(trainer: Trainer, log: StepLog, terms: dict[str, Tensor], done: int) -> None:
    """Put the update into the log, and write its line where one is due. On a CPU every update is looked at, which costs nothing there."""
    run = trainer.config.run
    if (skipped := trainer.guard.take_skipped()) is not None:
        log.event(skipped)
    else:
        log.add(terms, trainer.wait_s, trainer.operations)
    due = done % run.log_every == 0 or done == run.steps
    if due or trainer.device.type == "cpu":
        trainer.guard.check()
    if due:
        log.line(done, trainer.optimizer.param_groups[0]["lr"])
