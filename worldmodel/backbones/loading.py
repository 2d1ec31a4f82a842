"""Weights of a diffusers folder, one file or an index with shards, into a model without weights: every tensor must fit.

``from_pretrained`` logs what is missing and goes on; here each of these is a ``UserError`` with the file and the tensor's name: a shard
that the index names and nobody copied, a file that was cut off, a tensor that is missing, unknown, of another shape or not of a
floating type. All of it is read from the files' headers, before the first tensor is placed. One tensor is in memory at a time.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from physisforcing.core.errors import UserError, unknown_name

from ..storage import WEIGHTS_NAME

#: What safetensors calls the types.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
#: Types that weights may have. Quantised ones need scales that the models here do not know.
FLOATING = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(slots=True, frozen=True)
class TensorEntry:
    """Where a tensor lies and what it is, from the header of its file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


def file_entries(path: Path) -> dict[str, TensorEntry]:
    """Name -> entry of a safetensors file. ``UserError`` for a file that is missing, cut off or something else."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(str(path), got="no such file", wanted="a safetensors file", fix="copy or download it")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        got, fix = f"a file of {path.stat().st_size} bytes: {error}", "copy it again: it was cut off or damaged"
        raise UserError(str(path), got=got, wanted="a whole safetensors file", fix=fix) from error
    for name, (dtype, _) in found.items():
        if dtype not in DTYPES:
            raise _wrong_dtype(path, name, dtype)
    return {name: TensorEntry(path, DTYPES[dtype], shape) for name, (dtype, shape) in found.items()}


def index_entries(index: Path) -> dict[str, TensorEntry]:
    """Name -> entry of all shards that a ``*.safetensors.index.json`` names.

    ``UserError`` for an index that cannot be read, a shard that is missing or damaged, and a shard that holds other tensors than the
    index says.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({Path(file) for file in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fix = "copy the index again; it comes with the shards"
        raise UserError(str(index), got=repr(error), wanted="an index with a weight_map", fix=fix) from error
    outside = [file for file in files if file.is_absolute() or len(file.parts) != 1]
    if outside:
        fix = "put index and shards in one folder"
        raise UserError(str(index), got=str(outside[0]), wanted="names of files beside the index", fix=fix)
    missing = [str(file) for file in files if not (index.parent / file).is_file()]
    if missing:
        wanted = f"all {len(files)} shards that {index.name} names"
        fix = f"copy or download {missing[0]} into {index.parent}"
        raise UserError(str(index.parent), got=f"no {_some(missing)}", wanted=wanted, fix=fix)
    entries: dict[str, TensorEntry] = {}
    for file in files:
        inside = file_entries(index.parent / file)
        listed = {name for name, place in weight_map.items() if Path(place) == file}
        if other := sorted(listed ^ set(inside)):
            got = f"{_some(other)} in only one of shard and index"
            wanted = f"the tensors that {index.name} lists for it"
            raise UserError(
                str(index.parent / file), got=got, wanted=wanted, fix="copy index and shards of one release"
            )
        entries |= inside
    return entries


def folder_entries(folder: Path, name: str = WEIGHTS_NAME) -> dict[str, TensorEntry]:
    """Name -> entry of a folder with ``name`` or ``name.index.json`` and its shards; raises as ``index_entries`` does."""
    single, index = folder / name, folder / f"{name}.index.json"
    if index.is_file() and single.is_file():
        fix = "remove the one that is left over from another conversion"
        raise UserError(str(folder), got=f"{name} and an index with shards", wanted="one of them", fix=fix)
    if index.is_file():
        return index_entries(index)
    if single.is_file():
        return file_entries(single)
    got = sorted(path.name for path in folder.glob("*"))[:8] if folder.is_dir() else "no such folder"
    fix = "physis convert makes such a folder of original checkpoints"
    raise UserError(str(folder), got=got, wanted=f"{single.name}, or {index.name} and its shards", fix=fix)


def check_entries(entries: Mapping[str, TensorEntry], shapes: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """``UserError`` unless ``entries`` are exactly the tensors of ``shapes`` (name -> shape), of a floating type.

    ``where``: the folder or file, for messages about tensors that no file has.
    """
    if missing := [name for name in shapes if name not in entries]:
        wanted = f"{len(shapes)} tensors"
        fix = "use weights and config of one model; these do not fit together"
        raise UserError(str(where), got=f"no {_some(missing)}", wanted=wanted, fix=fix)
    if unknown := [name for name in entries if name not in shapes]:
        raise UserError(
            str(entries[unknown[0]].file),
            got=f"{_some(unknown)} too many",
            wanted=f"the {len(shapes)} tensors of the model that config.json describes",
            fix="use weights and config of one model, these do not fit together; merge adapters before saving",
        )
    for name, entry in entries.items():
        check_entry(entry, name, shapes[name])


def check_entry(entry: TensorEntry, name: str, shape: tuple[int, ...]) -> None:
    """``UserError`` for a tensor of another shape or not of a floating type."""
    if entry.shape != tuple(shape):
        wanted = f"{list(shape)}, as the config says"
        fix = "use weights and config of one model; these do not fit together"
        raise UserError(f"{entry.file}: {name}", got=list(entry.shape), wanted=wanted, fix=fix)
    if entry.dtype not in FLOATING:
        raise _wrong_dtype(entry.file, name, str(entry.dtype).removeprefix("torch."))


def _wrong_dtype(file: Path, name: str, dtype: str) -> UserError:
    fix = "use the weights as released, not a quantised copy"
    return UserError(f"{file}: {name}", got=dtype, wanted="float32, bfloat16 or float16", fix=fix)


def read_transformer(folder: Path, kind: Any) -> dict[str, Any]:
    """The arguments of the diffusers class ``kind`` (``WanTransformer3DModel``, ``Cosmos3OmniTransformer``) from ``config.json``.

    ``UserError`` for a folder without it, another class, and fields that the class does not have (diffusers drops those).
    """
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fix = "give the folder that holds config.json and the weights, such as MODEL/transformer"
        raise UserError(str(path), got=repr(error), wanted="the config of a diffusers folder", fix=fix) from error
    name = content.get("_class_name")
    if name != kind.__name__:
        fix = "give a folder of that class; physis convert makes one of original checkpoints"
        raise UserError(f"{path}: _class_name", got=name, wanted=kind.__name__, fix=fix)
    config = {key: value for key, value in content.items() if not key.startswith("_")}
    known = set(inspect.signature(kind.__init__).parameters) - {"self"}
    for key in config:
        if key not in known:
            raise unknown_name(f"{path}", key, known, see=f"diffusers {kind.__name__}")
    return config


def build_empty(kind: Any, config: Mapping[str, Any]) -> Any:
    """A model of ``kind`` whose parameters are on the meta device; what it computes itself, such as rotary tables, is real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return kind.from_config(dict(config))


def load_transformer(
    folder: Path, kind: Any, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Any:
    """``read_transformer``, ``build_empty`` and ``load_weights`` in one."""
    model = build_empty(kind, read_transformer(folder, kind))
    load_weights(model, folder, device, dtype)
    return model


def load_weights(
    model: nn.Module, folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> None:
    """Place the weights of a diffusers ``folder`` in ``model`` (built by ``build_empty``, or any other), tensor by tensor.

    ``dtype``: of the weights; None keeps what the file has. As in ``from_pretrained``, modules that the class keeps in float32
    (``_keep_in_fp32_modules``) are float32 also where ``dtype`` is narrower. Raises ``UserError`` (see the module's docstring)
    before ``model`` is touched.
    """
    Weights(model, folder, dtype).place(device)


class Weights:
    """The weights of a diffusers ``folder`` for a ``model``, checked as in ``load_weights``, to be placed in parts: a model that is spread
    over processes never lies whole in one of them."""

    def __init__(self, model: nn.Module, folder: Path, dtype: torch.dtype | None = None) -> None:
        self.model, self.dtype = model, dtype
        self.entries = folder_entries(folder)
        check_entries(self.entries, shapes_of(model), folder)
        self._kept = kept_in_float32(model)

    def place(
        self,
        device: str | torch.device,
        wanted: Callable[[str], bool] = lambda _name: True,
        rename: Callable[[str], str] = lambda name: name,
        exact: Callable[[str], bool] = lambda _name: False,
    ) -> None:
        """Put the tensors with ``wanted`` names, and the buffers that the model computes itself, on ``device``. ``rename``: from a stored
        name to that in the model as it is now. ``exact``: which of the latter are float32 whatever the others are in."""
        from safetensors import safe_open

        device = torch.device(device)
        by_file: dict[Path, list[str]] = {}
        for name, entry in self.entries.items():
            if wanted(name):
                by_file.setdefault(entry.file, []).append(name)
        for file, names in by_file.items():
            with safe_open(file, framework="pt") as opened:
                for name in names:
                    there = rename(name)
                    wide = self.dtype is not None and in_modules(name, self._kept)
                    dtype = torch.float32 if wide or exact(there) else self.dtype
                    # to the device as it is stored, and to its precision there: on a CPU that is most of the time of loading, all the more
                    # with the one thread that torchrun leaves a process
                    _place(self.model, there, opened.get_tensor(name).to(device).to(dtype))
        for module in self.model.modules():
            for name in module._non_persistent_buffers_set:
                buffer = module._buffers[name]
                assert buffer is None or not buffer.is_meta, f"{name} has no values: build the model with build_empty"
                module._buffers[name] = None if buffer is None else buffer.to(device)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything that the model's file holds."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def kept_in_float32(model: Any) -> tuple[str, ...]:
    """Names of modules and parameters that a diffusers class wants in float32 whatever the rest has."""
    return tuple(getattr(model, "_keep_in_fp32_modules", None) or ())


def in_modules(name: str, modules: Iterable[str]) -> bool:
    """Whether a tensor's dotted name goes through one of ``modules``."""
    parts = name.split(".")
    return any(module in parts for module in modules)


def _place(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = value
        return
    old = module._parameters[leaf]
    assert old is not None
    if old.stride() != value.stride():  # a module may want its weights channels last
        value = torch.empty_like(old, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value)
    if old.is_meta:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=old.requires_grad)
    else:  # the same object: an optimizer may hold it
        old.data = value


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
