"""Tensors of a released checkpoint: safetensors files and PyTorch's ``.pth``, read one at a time.

A ``.pth`` is a pickle, which can run code. It is opened here alone, by torch's restricted unpickler, after its SHA-256 was
compared with the one that the user gave or recorded in ``conversion.json``; its tensors stay on disk until they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from physisforcing.core.digests import file_sha256
from physisforcing.core.errors import UserError

from ..backbones.loading import TensorEntry, file_entries, index_entries

PICKLED = (".pth", ".pt", ".ckpt")
#: SHA-256 of files that Wan-AI's repositories on the Hugging Face hub publish (Wan2.2-TI2V-5B, Wan2.1-T2V-14B), as read from
#: many projects that pin them; the files themselves were not available here.
PUBLISHED = {
    "Wan2.1_VAE.pth": "38071ab59bd94681c686fa51d75a1968f64e470262043be31f7a094e442fd981",
    "Wan2.2_VAE.pth": "20eb789667fa5e60e7516bf509512f6cb61f01b0aa0695eadaea930c13892b36",
    "models_t5_umt5-xxl-enc-bf16.pth": "7cace0da2b446bbbbc57d031ab6cf163a3d59b366da94e5afe36745b746fd81d",
}


@dataclass(slots=True, kw_only=True)
class Source:
    """One checkpoint. ``entries``: name -> file, type, shape. ``read``: the tensor of a name. ``digests``: file -> SHA-256 of pickled
    files, and None of others."""

    path: Path
    entries: Mapping[str, TensorEntry]
    read: Callable[[str], Tensor]
    digests: Mapping[str, str | None]

    @classmethod
    def of_entries(
        cls, path: Path, entries: Mapping[str, TensorEntry], digests: Mapping[str, str | None] | None = None
    ) -> Source:
        """Of safetensors files whose headers were read."""
        files = sorted({entry.file.name for entry in entries.values()})
        digests = dict.fromkeys(files) | dict(digests or {})
        return cls(path=path, entries=entries, read=_Shards(entries).read, digests=digests)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}


def open_source(path: Path, expected: Mapping[str, str] | None = None) -> Source:
    """The checkpoint in ``path``: a safetensors file, an index of shards, or a PyTorch file.

    ``expected``: file name -> SHA-256. Raises ``UserError`` for files that are missing, damaged or of another checksum.
    """
    if path.suffix in PICKLED:
        return _pickled(path, expected or {})
    entries = index_entries(path) if path.suffix == ".json" else file_entries(path)
    expected = expected or {}
    files = sorted({entry.file for entry in entries.values()})
    digests = {file.name: _compared(file, expected) for file in files if file.name in expected}
    return Source.of_entries(path, entries, digests)


@dataclass(slots=True)
class _Shards:
    """Tensors of several safetensors files; one file is open at a time."""

    entries: Mapping[str, TensorEntry]
    opened: dict = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        from safetensors import safe_open

        file = self.entries[name].file
        if file not in self.opened:
            self.opened.clear()
            self.opened[file] = safe_open(file, framework="pt")
        tensor: Tensor = self.opened[file].get_tensor(name)
        return tensor


def _compared(path: Path, expected: Mapping[str, str]) -> str:
    """SHA-256 of a file, equal to the expected one where one is given."""
    digest = file_sha256(path)
    wanted = expected.get(path.name, digest).lower()
    if digest != wanted:
        raise UserError(
            f"sha256 of {path.name}", got=digest, wanted=wanted, fix="download the file again, or correct sha256="
        )
    return digest


def _pickled(path: Path, expected: Mapping[str, str]) -> Source:
    if not path.is_file():
        raise UserError(str(path), got="no such file", wanted="a PyTorch checkpoint", fix="copy or download it")
    digest = _compared(path, expected)
    state = convert(path)
    entries = {name: TensorEntry(path, value.dtype, tuple(value.shape)) for name, value in state.items()}
    return Source(path=path, entries=entries, read=state.__getitem__, digests={path.name: digest})


def convert(path: Path) -> dict[str, Tensor]:
    """The state dict in a PyTorch file whose checksum was taken, by torch's restricted unpickler. Its tensors are mapped from the
    file, not read. ``UserError`` for a file that is damaged, of the old tar format, or holds anything but tensors by name."""
    fix = "download it again; files that hold more than tensors are not opened"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of the unpickler, whose module is not imported here, or of the archive
        got = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(str(path), got=got, wanted="a PyTorch state dict in a zip file", fix=fix) from error
    for wrapper in ("state_dict", "model", "module"):  # of training frameworks
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state or not all(map(_is_named_tensor, state.items())):
        raise UserError(str(path), got=type(state).__name__, wanted="dense tensors by name", fix=fix)
    return state


def _is_named_tensor(item: tuple[object, object]) -> bool:
    name, value = item
    dense = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
    return isinstance(name, str) and dense


def notes(digests: Iterable[tuple[str, str | None]]) -> list[str]:
    """What to tell about checksums: files that have a published file's name and other bytes."""
    return [
        f"{name} is not the published file: its SHA-256 is {digest}"
        for name, digest in digests
        if digest is not None and PUBLISHED.get(name, digest) != digest
    ]
