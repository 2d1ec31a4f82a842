"""``physis train worldmodel``: PhysisForcing training of the video transformer on latents that are resident on the device."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from physisforcing.core.errors import UserError
from physisforcing.core.files import put_back, replace_folder

from ..data.batches import WindowBank
from ..data.latent_bank import LatentBank
from .banks import load_bank, prepare_banks
from .config import TrainWorldModelConfig
from .initial import adopt_model
from .modules import build_modules, check_run
from .processes import Processes
from .runtime import begin_run, kernels_given_back
from .steplog import StepLog
from .stopping import StopSignals, TrainingStopped
from .trainer import Trainer

__all__ = ["Trainer", "build_modules", "load_bank", "prepare_banks", "train_world_model"]

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
    return run_training(config, banks, prepare_banks, Trainer)


def run_training(
    config: TrainWorldModelConfig, banks: Any | None, prepare: Callable[..., Any], kind: Callable[..., Trainer]
) -> Path:
    """The run of a trainer of any ``kind``, on ``banks`` or those that ``prepare`` makes; returns its export. See ``train_world_model``."""
    processes = Processes.start(config.run.device, config.run.sequence)
    try:
        return _train(config, banks, processes, prepare, kind)
    finally:
        processes.close()


def _train(
    config: TrainWorldModelConfig,
    banks: Any | None,
    processes: Processes,
    prepare: Callable[..., Any],
    kind: Callable[..., Trainer],
) -> Path:
    check_run(config, processes)
    run, device, found = begin_run(config, processes)
    if config.large.export and found is None:
        wanted = "a run with a checkpoint, and run.resume=true"
        raise UserError("large.export", got=str(run), wanted=wanted, fix="run.out=<that run> run.resume=true")
    if banks is None:
        banks = processes.one_after_the_other(lambda: prepare(config, device, quiet=not processes.first))
    bank, heldout = banks
    trainer = kind(config, bank, device, processes)
    first = trainer.restore(found) if found is not None else 0
    if config.large.export:
        return _finish(trainer, banks, run)
    quiet = not processes.first
    log = StepLog(
        run, config.run.steps, config.run.batch, device, done=first, quiet=quiet, wandb=config.run.wandb
    )  # fmt: skip
    if first == 0:
        with log.paused():
            _measure(trainer, heldout, 0, log)
    with StopSignals() as signals:
        for step in range(first, config.run.steps):
            terms = trainer.step(step)
            done, last = step + 1, step + 1 == config.run.steps
            _after_update(trainer, log, terms, done)
            told = None if last else _told(signals, processes)
            if not told and (done % config.run.eval_every == 0 or last):
                with log.paused():
                    _measure(trainer, heldout, done, log)
            if done % config.run.save_every == 0 or last or told:
                trainer.guard.check()
                with log.paused():
                    saved = trainer.save(run, done)
                if told:
                    log.close()
                    raise TrainingStopped(told, done, config.run.steps, saved)
    log.close()
    return _finish(trainer, banks, run)


def _finish(trainer: Trainer, banks: Banks, run: Path) -> Path:
    """Write the averaged weights as ``export/``. A run that is killed while it does leaves the export that was there before; between the last two
    steps, under a hidden name (``replaced``), and continuing it puts that back first."""
    target, aside, first = run / "export", run / ".writing-export", trainer.processes.first
    if first:
        put_back(target)
        shutil.rmtree(aside, ignore_errors=True)
    trainer.average.swap()
    trainer.export(aside)
    if first:
        replace_folder(aside, target)
    for some in banks:
        if hasattr(some, "close"):  # windows that are read or encoded while a run trains
            some.close()
    trainer.processes.barrier()
    return target


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
    trainer.show(heldout, done, log)


def _after_update(trainer: Trainer, log: StepLog, terms: dict[str, Tensor], done: int) -> None:
    """Put the update into the log, and write its line where one is due. On a CPU every update is looked at, which costs nothing there."""
    run = trainer.config.run
    if (skipped := trainer.guard.take_skipped()) is not None:
        log.skip(skipped, trainer.wait_s)
    else:
        log.add(terms, trainer.wait_s, trainer.operations)
    due = done % run.log_every == 0 or done == run.steps
    if due or trainer.device.type == "cpu":
        trainer.guard.check()
    if due:
        log.line(done, float(trainer.optimizer.param_groups[0]["lr"]))
