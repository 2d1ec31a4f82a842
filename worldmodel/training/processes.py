"""The processes of a run, as ``torchrun`` starts them: which one this is, its device, and what they tell one another."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from physisforcing.core.errors import UserError

T = TypeVar("T")
#: Teachers may take long in the first process while the others wait; a process that dies ends the others at once all the same.
TIMEOUT = timedelta(hours=6)


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU where torch finds one. Raises ``UserError`` for a GPU that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("run.device", got=name, wanted="a device that torch sees", fix="run.device=cpu")
    return torch.device(name)


@dataclass(slots=True, kw_only=True)
class Processes:
    """The processes of a run. ``rank`` counts from 0, and 0 alone writes what is not sharded. ``sequence`` neighbours compute a sample together;
    ``neighbours`` is their group."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world: int = 1
    mesh: Any = None
    sequence: int = 1
    neighbours: Any = None

    @classmethod
    def start(cls, device: str, sequence: int = 1) -> Processes:
        """This process as ``torchrun`` describes it in the environment; one alone without it. ``device``: ``run.device``; on GPUs each
        process takes its own. ``sequence``: ``run.sequence``. ``UserError`` where it does not divide the processes."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if sequence < 1 or world % sequence:
            wanted = f"1, or what divides the {world} processes of the run"
            raise UserError("run.sequence", got=sequence, wanted=wanted, fix="run.sequence=1, or torchrun with more")
        picked = pick_device(device)
        if world == 1:
            return cls(device=picked)
        if picked.type == "cuda":
            picked = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(picked)
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=TIMEOUT)
        mesh = dist.device_mesh.init_device_mesh(picked.type, (world,))
        found = cls(device=picked, rank=dist.get_rank(), world=world, mesh=mesh, sequence=sequence)
        for first in range(0, world, sequence) if sequence > 1 else ():
            group = dist.new_group(list(range(first, first + sequence)))  # every process makes all groups
            if first <= found.rank < first + sequence:
                found.neighbours = group
        return found

    @property
    def first(self) -> bool:
        """Whether this process writes logs, pictures and exports."""
        return self.rank == 0

    @property
    def many(self) -> bool:
        return self.world > 1

    def barrier(self) -> None:
        if self.many:
            self.total([0.0])

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, over the CPU."""
        if not self.many:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed)
        return summed.tolist()

    def one_after_the_other(self, make: Callable[[], T]) -> T:
        """``make()`` in the first process, then in the others, which find what it has cached."""
        if not self.first:
            self.barrier()
        made = make()
        if self.first:
            self.barrier()
        return made

    def share(self, count: int) -> slice:
        """The rows of this process in a batch of ``count``. ``UserError`` where they cannot be equally many everywhere."""
        sharing = self.world // self.sequence
        if count % sharing:
            more = -(-count // sharing) * sharing
            raise UserError(
                "run.batch",
                got=count,
                wanted=f"a multiple of the {sharing} {'groups of ' * (self.sequence > 1)}processes that share it",
                fix=f"run.batch={more}",
            )
        part, place = count // sharing, self.rank // self.sequence
        return slice(place * part, (place + 1) * part)

    def close(self) -> None:
        if self.many and dist.is_initialized():
            dist.destroy_process_group()
