"""A network with 8-bit moments in one process, or in two gloo processes: ``python two_eight_bits.py FOLDER`` (tests/unit/test_adamw8bit.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from physisforcing.worldmodel.training.checkpoint import restore_training, save_checkpoint, training_tensors
from physisforcing.worldmodel.training.optim import OptimConfig, WeightAverage, build_optimizer, set_learning_rate
from physisforcing.worldmodel.training.parallel import shard_block
from physisforcing.worldmodel.training.processes import Processes
from ranks import both


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(128, 128), nn.Linear(128, 4)
        self.table = nn.Parameter(torch.ones(1, 6, 128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.nn.functional.gelu(self.first(x)) * self.table.mean(1))


class Net:
    """``kind``: of the optimiser. The moments of the first layer's matrix are 8-bit numbers; the last one's are too few, and the ``table`` has one row,
    which two processes cannot share, as the modulations of a Wan block."""

    def __init__(self, processes: Processes | None = None, kind: str = "adamw8bit") -> None:
        torch.manual_seed(0)
        self.processes = processes or Processes()
        self.module = Layers()
        if self.processes.many:
            shard_block(self.module, self.processes)
        config = OptimConfig(kind=kind, lr=1e-2, ema=0.9)
        self.optimizer = build_optimizer(self.module.parameters(), config)
        self.average = WeightAverage(self.module, config.ema)

    def step(self, number: int) -> None:
        draw = torch.Generator().manual_seed(number)
        x = torch.randn(32, 128, generator=draw)
        set_learning_rate(self.optimizer, 1e-2 / (1 + number))
        (self.module(x) - x[:, :4].sin()).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(number)

    def save(self, run: Path, step: int) -> Path:
        def nothing(folder: Path) -> None:
            folder.mkdir(parents=True, exist_ok=True)

        tensors = training_tensors(self.module, self.average, self.optimizer, torch.device("cpu"))
        return save_checkpoint(run, step, nothing, tensors, {}, self.processes)

    def restore(self, checkpoint: Path) -> None:
        restore_training(
            checkpoint, self.module, self.average, self.optimizer, torch.device("cpu"), processes=self.processes
        )


def train(folder: Path, name: str, source: str = "") -> None:
    """Six updates, saved after three and six; the last three alone from the checkpoint of ``source``."""
    net = Net(Processes.start("cpu"))
    if source:
        net.restore(folder / source / "step-000003")
    for number in range(3 if source else 0, 6):
        net.step(number)
        if number in (2, 5):
            net.save(folder / name, number + 1)


def main(folder: Path) -> None:
    torch.compiler.set_stance("force_eager")  # a copy of a process compiles nothing
    train(folder, "one")
    for name in ("two", "halves", "one_to_two"):
        (folder / name).mkdir()
    both(
        lambda: train(folder, "two"),
        lambda: train(folder, "halves", source="two"),
        lambda: train(folder, "one_to_two", source="one"),
    )
    train(folder, "two_to_one", source="two")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
