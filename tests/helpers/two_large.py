"""Runs of two gloo processes that train tiny large backbones, for tests/numerics/test_large_distributed.py: ``python two_large.py FOLDER``."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import tiny_large
from physisforcing.worldmodel.training.banks import prepare_banks
from physisforcing.worldmodel.training.config import TrainWorldModelConfig
from physisforcing.worldmodel.training.optim import is_sharded, local
from physisforcing.worldmodel.training.processes import Processes
from physisforcing.worldmodel.training.worldmodel import Trainer, train_world_model
from ranks import both

#: Name of a case -> kind of backbone, rank of the adapters, what else is set.
CASES = {
    "full": ("ti2v", 0, {"micro": 1, "checkpointing": "full", "gather": "update"}),
    "lora": ("a14b", 2, {"checkpointing": "selective"}),
    "spread": ("a14b", 2, {"sharding": "weights", "micro": 1}),
    "cosmos": ("cosmos3", 2, {}),
    "split": ("ti2v", 0, {"sequence": 2, "micro": 2, "checkpointing": "full"}),
    "split_lora": ("a14b", 2, {"sequence": 2}),
}


def settings(folder: Path, case: str, name: str) -> TrainWorldModelConfig:
    """A run ``FOLDER/name`` of six updates. Every second window of the store has no targets, so that a process may have none at all."""
    kind, rank, more = CASES[case]
    made = tiny_large.config(folder / kind, [folder / f"{kind}-store"], folder / name, steps=6, rank=rank)
    made.run.batch, made.run.save_every, made.run.resume = 4, 3, True
    for field, value in more.items():
        setattr(made.run, field, value)
    if "WORLD_SIZE" not in os.environ:
        made.run.sequence = 1
    return made


def prepare(folder: Path) -> None:
    for kind in ("ti2v", "a14b", "cosmos3"):
        tiny_large.pipeline(folder, kind)
        tiny_large.store(folder / f"{kind}-store", kind, episodes=5)


def parts(folder: Path) -> None:
    """Write how much of the weights a process holds, and that its adapters are those of one process."""
    processes = Processes.start("cpu")
    made = settings(folder, "spread", "parts")
    trainer = Trainer(made, prepare_banks(made, processes.device)[0], processes.device, processes)
    found = {name: [local(p).numel(), p.numel(), is_sharded(p)] for name, p in trainer.model.named_parameters()}
    (folder / f"parts{processes.rank}.json").write_text(json.dumps(found))
    processes.close()


def measured(folder: Path) -> None:
    """Write the losses of three updates, without and with held-out values of other, averaged weights between the second and the third."""
    processes = Processes.start("cpu")
    made = settings(folder, "full", "measured")
    made.optim.lr, made.optim.ema = 0.01, 0.99
    bank, heldout = prepare_banks(made, processes.device)
    found: dict[bool, list[float]] = {}
    for measure in (False, True):
        trainer = Trainer(made, bank, processes.device, processes)
        found[measure] = [float(trainer.step(step)["loss"]) for step in (0, 1)]
        if measure:
            trainer.heldout(heldout)
        found[measure].append(float(trainer.step(2)["loss"]))
    if processes.first:
        (folder / "measured.json").write_text(json.dumps([found[False], found[True]]))
    processes.close()


def continued(folder: Path, case: str) -> None:
    """Go on from the middle of the run ``two-<case>``."""
    if os.environ["RANK"] == "0":  # the other waits for it where they meet
        shutil.copytree(folder / f"two-{case}" / "step-000003", folder / f"halves-{case}" / "step-000003")
    train_world_model(settings(folder, case, f"halves-{case}"))


def main(folder: Path) -> None:
    first = settings(folder, "full", "first")
    first.run.steps = 1
    train_world_model(first)  # imports what is imported late
    importlib.import_module("torch.distributed.fsdp")
    cases: list[Callable[[], object]] = []
    for case in CASES:
        cases.append(lambda case=case: train_world_model(settings(folder, case, f"two-{case}")))
        cases.append(lambda case=case: continued(folder, case))
    both(*cases, lambda: parts(folder), lambda: measured(folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
