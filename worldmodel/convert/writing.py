"""Writes a part as safetensors files, a tensor at a time, into a folder that gets its name when it is complete.

A killed conversion leaves a hidden folder beside the output and no output; the same command again keeps the files of that folder
that are complete and continues. One that was made from other files or with other settings is thrown away.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from physisforcing.core.errors import UserError
from physisforcing.core.files import locked, replace_text

from ..backbones.loading import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
NOTE = "conversion.json"


class Part(Protocol):
    """What is written: of a checkpoint (``parts.Part``) or of a model that is being trained. ``shapes``: of all tensors by name;
    ``config``: content of ``config.json``."""

    shapes: dict[str, tuple[int, ...]]
    config: dict[str, Any]
    weights_name: str

    def stored(self, name: str) -> torch.dtype:
        """The type in which a tensor is written."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU."""
        ...

    def where(self, name: str) -> str:
        """What to call it in messages."""
        ...


@dataclass(slots=True, kw_only=True)
class Shard:
    """One safetensors file to be: ``header`` with everything before the data, the tensors in the order of the data, all its bytes."""

    name: str
    header: bytes
    tensors: list[str]
    bytes: int


def plan_shards(part: Part, shard_bytes: int) -> list[Shard]:
    """The files of a part, none with more than ``shard_bytes`` of data unless one tensor has more."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name in part.shapes:
        size = _size(part, name)
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    stem = part.weights_name.removesuffix(".safetensors")
    many = len(groups)
    names = [f"{stem}-{k:05d}-of-{many:05d}.safetensors" for k in range(1, many + 1)]
    names = names if many > 1 else [part.weights_name]
    return [_shard(part, name, group) for name, group in zip(names, groups, strict=True)]


def _shard(part: Part, file: str, names: list[str]) -> Shard:
    # Wide types first: then every tensor begins at a multiple of its type's size.
    names = sorted(names, key=lambda name: -part.stored(name).itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + _size(part, name)
        shape = list(part.shapes[name])
        header[name] = {"dtype": _NAMES[part.stored(name)], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return Shard(name=file, header=len(text).to_bytes(8, "little") + text, tensors=names, bytes=8 + len(text) + end)


def _size(part: Part, name: str) -> int:
    return torch.Size(part.shapes[name]).numel() * part.stored(name).itemsize


def write_part(part: Part, shards: list[Shard], folder: Path, told: Callable[[int], object]) -> None:
    """``config.json`` and weights of ``part`` in ``folder``. Files that are there with their full size are kept. ``told`` hears how
    many bytes are done. Raises ``UserError`` for numbers that are not finite, or not any more in the type they are stored in."""
    replace_text(folder / "config.json", json.dumps(part.config, indent=2, sort_keys=True) + "\n")
    for shard in shards:
        path = folder / shard.name
        if not (path.is_file() and path.stat().st_size == shard.bytes):
            aside = path.with_name(f"{path.name}.writing")
            with aside.open("wb") as file:
                file.write(shard.header)
                for name in shard.tensors:
                    file.write(_data(part, name))
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        told(shard.bytes)
    if len(shards) > 1:
        total = sum(_size(part, name) for name in part.shapes)
        weight_map = {name: shard.name for shard in shards for name in shard.tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        replace_text(folder / f"{part.weights_name}.index.json", json.dumps(index, indent=2) + "\n")


def _data(part: Part, name: str) -> memoryview:
    value = part.read(name)
    stored = value.to(part.stored(name)).contiguous()
    if not bool(stored.isfinite().all()):
        there = bool(value.isfinite().all())
        got = f"a number that {str(stored.dtype).removeprefix('torch.')} cannot hold" if there else "NaN or infinity"
        fix = "dtype=bf16" if there else "use another checkpoint: this one is damaged"
        raise UserError(part.where(name), got=got, wanted="finite numbers", fix=fix)
    return memoryview(stored.reshape(-1).view(torch.uint8).numpy())


@contextlib.contextmanager
def workplace(output: Path, note: dict[str, Any]) -> Iterator[Path]:
    """The hidden folder that becomes ``output`` when the block ends well. ``note``: what is converted to what; it stays in the output
    as ``conversion.json``, and only a folder with the same one is continued.

    ``UserError`` where ``output`` is there already, or where another process converts to it.
    """
    _check_free(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = _aside(output)
    with locked(output, "conversion"):
        _check_free(output)  # another process may have finished since
        text = json.dumps(note, indent=2) + "\n"
        if not (folder / NOTE).is_file() or (folder / NOTE).read_text(encoding="utf-8") != text:
            shutil.rmtree(folder, ignore_errors=True)
        replace_text(folder / NOTE, text)
        yield folder
        for left in [path for path in folder.rglob("*") if path.suffix in (".writing", ".partial")]:
            left.unlink()  # of a conversion that was killed before
        os.replace(folder, output)
        _sync(output.parent)


def _aside(output: Path) -> Path:
    return output.with_name(f".{output.name}.converting")


def _check_free(output: Path) -> None:
    if os.path.lexists(output):
        raise UserError("output", got=str(output), wanted="a name that is not taken", fix="output=<another folder>")


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_space(output: Path, needed: int) -> None:
    """``UserError`` where the disk has less room than the conversion writes, what a killed one has left there counted as room."""
    place = next(parent for parent in output.absolute().parents if parent.exists())
    left = [path.lstat().st_size for path in _aside(output).rglob("*") if path.is_file()]
    free = shutil.disk_usage(place).free + sum(left)
    if free < needed:
        got, wanted = f"{free / 1e9:.1f} GB free in {place}", f"{needed / 1e9:.1f} GB"
        raise UserError("output", got=got, wanted=wanted, fix="output=<a folder on another disk>")
