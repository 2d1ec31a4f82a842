"""Tensors of a checkpoint on disk: PyTorch's distributed checkpoint (DCP) with its safetensors storage, for one process and for many.

Every process writes one file with its parts; the headers say which part of which tensor they are, so that any number of processes can
read them again. DCP's usual storage pickles its index and is not used; what the processes of a run tell one another while they plan a
write never reaches the disk.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .parallel import Processes


def shard_name(rank: int) -> str:
    """The file that process ``rank`` writes."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without DCP's warning that there is one process only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], processes: Processes | None) -> None:
    """Write ``tensors`` (sharded ones or whole ones) into ``folder``, bit-exactly. Every process calls this with its parts."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    alone = processes is None or not processes.many
    kept = {name: value.detach().contiguous() for name, value in tensors.items()}
    if kept:
        with _quietly():
            writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
            dcp.save(kept, storage_writer=writer, no_dist=alone)


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Names, shapes and types of the tensors in ``folder``, as tensors without data."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")  # type: ignore[union-attr]
        for name, entry in found.items()
    }


def read_tensors(folder: Path, into: Mapping[str, Tensor], processes: Processes | None = None) -> None:
    """Fill the tensors of ``into`` (sharded or whole, any device) in place. Every one of them must be stored."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    alone = processes is None or not processes.many
    if into:
        with _quietly():
            dcp.load(dict(into), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)


def read_whole(folder: Path) -> dict[str, Tensor]:
    """All tensors in ``folder`` put together, on the CPU."""
    made = {name: torch.empty(meta.shape, dtype=meta.dtype) for name, meta in stored_tensors(folder).items()}
    read_tensors(folder, made)
    return made
