"""Runs of two gloo processes, and of one that is killed, for tests/numerics/test_training_distributed.py: ``python two_processes.py FOLDER BASE``.

``FOLDER`` has a run ``one`` of one process with checkpoints after 5 and 10 updates; ``BASE`` is a model to put adapters on, or empty.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from killed_lives import KILLS, killed_lives
from physisforcing.worldmodel.data.batches import WindowBank
from physisforcing.worldmodel.training.checkpoint import latest_checkpoint, load_training
from physisforcing.worldmodel.training.config import LoraConfig, TrainWorldModelConfig
from physisforcing.worldmodel.training.processes import Processes
from physisforcing.worldmodel.training.stopping import TrainingStopped
from physisforcing.worldmodel.training.worldmodel import Trainer, train_world_model
from ranks import both, pair
from tiny_training import bank, config

BATCH = 4
#: Updates of a run of two processes of which one is killed again and again, and how often.
LASTING, KILLED_PAIRS = 30, 6


def half_empty() -> tuple[WindowBank, WindowBank]:
    """Banks in which most windows have no targets, so that at some steps one process has none at all."""
    train = bank(0)
    train.targets.row_W[
        torch.randperm(len(train.table), generator=torch.Generator().manual_seed(5))[: 3 * len(train.table) // 4]
    ] = -1
    return train, bank(1)


def settings(folder: Path, name: str, steps: int = 10, base: str = "") -> TrainWorldModelConfig:
    made = config(folder, name, steps)
    made.run.batch, made.run.log_every, made.run.save_every, made.text_dropout = BATCH, 1, 5, 0.3
    made.optim.lr, made.run.resume = 1e-2, True
    if base:
        made.run.init, made.lora = base, LoraConfig(rank=3, alpha=6.0)
    return made


@contextlib.contextmanager
def replaced(owner: type, name: str, value: Callable[..., Any]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def train(folder: Path, name: str, base: str = "", checkpointing: str = "none", source: str = "") -> None:
    """``source``: the run whose first half this one goes on from. Writes which rows of the training bank this process asked for."""
    if source and os.environ["RANK"] == "0":  # the other waits for it where they meet
        shutil.copytree(folder / source / "step-000005", folder / name / "step-000005")
    banks, rows, batch = half_empty(), [], WindowBank.batch

    def noting(self, rows_B):
        if self is banks[0]:
            rows.append(rows_B.tolist())
        return batch(self, rows_B)

    made = settings(folder, name, base=base)
    made.run.checkpointing = checkpointing
    with replaced(WindowBank, "batch", noting):
        train_world_model(made, banks)
    (folder / f"{name}-rows{os.environ['RANK']}.json").write_text(json.dumps(rows))


def spoiled(folder: Path) -> tuple[TrainWorldModelConfig, tuple[WindowBank, WindowBank]]:
    """A run that leaves out what is not finite, and banks with one such window, which stands in one half of some batches."""
    made, banks = settings(folder, f"{'two' if 'RANK' in os.environ else 'one'}_skip"), half_empty()
    made.run.nonfinite = "skip"
    banks[0].latents_WCFhw[11, 0, 1] = float("nan")
    return made, banks


def told_once(folder: Path) -> None:
    """The second process alone is told to end, in the fourth update."""
    step = Trainer.step

    def telling(self, number):
        if number == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number)

    with replaced(Trainer, "step", telling), pytest.raises(TrainingStopped) as stopped:
        train_world_model(settings(folder, "told"), half_empty())
    assert stopped.value.done == 4


def restore_and_save(folder: Path) -> None:
    """Load a checkpoint of one process into two, and write it again."""
    processes, banks = Processes.start("cpu"), half_empty()
    trainer = Trainer(settings(folder, "again"), banks[0], torch.device("cpu"), processes)
    done = trainer.restore(folder / "one" / "step-000005")
    trainer.save(folder / "again", done)
    processes.close()


def lasting(folder: Path, name: str) -> None:
    """A run that saves after each update, none of which is shorter than 30 ms. A file of each process tells that the two have met."""
    made, begin, step = settings(folder, name, steps=LASTING), Trainer.__init__, Trainer.step
    made.run.save_every = made.run.log_every = 1

    def met(self, *arguments):
        begin(self, *arguments)
        (folder / f"met-{os.environ['RANK']}").touch()

    def slowly(self, number):
        time.sleep(0.03)
        return step(self, number)

    with replaced(Trainer, "__init__", met), replaced(Trainer, "step", slowly):
        train_world_model(made, half_empty())


def ended(child: int, seconds: float = 120.0) -> int:
    """The status of a process that has to end by itself; one that does not is killed and told of."""
    deadline = time.monotonic() + seconds
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError(f"process {child} did not end within {seconds:g} s after the other was killed")
        time.sleep(0.01)
    return found[1]


def killed(folder: Path, trials: int) -> list[dict]:
    """Kill one rank at random moments, some of them while it saves and every third before its life has saved anything; the other has to end by
    itself. Then the run goes on to its end."""
    draw, found, run = random.Random(0), [], folder / "killed"

    def newest() -> str:
        return (run / "last").readlink().name if (run / "last").is_symlink() else ""

    def until(happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not happened():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{found} and then nothing for a minute")
            time.sleep(0.0002)

    for trial in range(trials):
        start, how = newest(), ("after a save", "in a save", "before a save")[trial % 3]
        for rank in (0, 1):
            (folder / f"met-{rank}").unlink(missing_ok=True)
        ranks = pair(lambda: lasting(folder, "killed"))
        until(lambda: (folder / "met-0").exists() and (folder / "met-1").exists())
        if how == "before a save":
            time.sleep(draw.uniform(0.0, 0.02))  # the first update is longer
        else:
            until(lambda before=start: newest() != before)
            time.sleep(draw.uniform(0.0, 0.1))
        if how == "in a save":
            until(lambda: bool(list(run.glob(".writing-*"))))
        seen = newest()
        os.kill(ranks[trial % 2], signal.SIGKILL)
        statuses, kept = [ended(child) for child in ranks], latest_checkpoint(run)
        assert kept is not None, "a run that had saved has nothing"
        load_training(kept)
        found.append(
            {"ended": statuses, "how": how, "start": start, "seen": seen, "kept": kept.name, "killed": trial % 2}
        )
    both(lambda: lasting(folder, "killed"))
    return found


def main(folder: Path, base: str) -> None:
    first = settings(folder, "first", steps=1, base=base)
    train_world_model(first, half_empty())  # imports what is imported late
    for name in ("checkpoint", "fsdp"):
        importlib.import_module(f"torch.distributed.{name}")
    cases: list[Callable[[], object]] = [
        lambda: train(folder, "two"),
        lambda: train(folder, "recomputed", checkpointing="full"),
        lambda: train(folder, "halves", source="two"),
        lambda: train(folder, "one_to_two", source="one"),
        lambda: restore_and_save(folder),
        lambda: train_world_model(*spoiled(folder)),
        lambda: told_once(folder),
        lambda: train(folder, "told"),
        lambda: lasting(folder, "unharmed"),
    ]
    if base:
        cases.append(lambda: train(folder, "two_lora", base))
    both(*cases)
    (folder / "alone").mkdir()
    (folder / "alone" / "lives.json").write_text(json.dumps(killed_lives(folder / "alone", KILLS)))
    (folder / "killed.json").write_text(json.dumps(killed(folder, KILLED_PAIRS)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
