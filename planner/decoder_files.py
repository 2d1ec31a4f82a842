"""Folders of decoders: ``config.json``, ``model.safetensors``, a card; and one function that loads whichever decoder a folder holds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from physisforcing.core.errors import UserError, unknown_name
from physisforcing.core.protocols import InverseDynamics
from physisforcing.worldmodel.storage import save_tensors

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
#: What ``decoder`` in a folder's configuration says; folders of the pixel decoder may leave it out.
KINDS = ("pixel", "single_frame", "latent", "feature")
#: Kinds that need nothing but pictures, and so read recorded video as well.
PICTURE_KINDS = ("pixel", "single_frame")
C = TypeVar("C")


def save_decoder(
    model: nn.Module, folder: str | Path, *, kind: str, exact: Collection[str] = (), card: str | None = None
) -> Path:
    """Write ``model`` with its ``config``: tensors as float16, those named in ``exact`` (statistics) as they are.

    The weights come last, so that a folder with weights has the configuration they belong to.
    """
    assert kind in KINDS
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value.detach().cpu().to(value.dtype if name in exact else torch.float16).contiguous()
        for name, value in model.state_dict().items()
    }
    config = {"decoder": kind, **dataclasses.asdict(model.config)}  # type: ignore[call-overload]
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    save_tensors(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def read_config(folder: str | Path) -> dict[str, Any]:
    """The plain configuration of a decoder folder, with ``decoder``. Raises ``UserError`` for a folder that holds none."""
    folder = Path(folder)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            fix = "train one: physis train idm"
            raise UserError("decoder", got=str(folder), wanted=f"a folder with {name}", fix=fix)
    config = {"decoder": "pixel", **json.loads((folder / CONFIG_NAME).read_text())}
    if config["decoder"] not in KINDS:
        raise unknown_name("decoder", str(config["decoder"]), KINDS, see=str(folder / CONFIG_NAME))
    return config


def config_of(schema: type[C], plain: dict[str, Any], kind: str) -> C:
    """A configuration dataclass, nested ones included, from what ``read_config`` gave. Fields that are not there or not known are a
    ``UserError``: their defaults may have changed since the weights were written."""
    values = dict(plain)
    found = values.pop("decoder", kind)
    if found != kind:
        fix = "load_decoder(folder) loads any kind"
        raise UserError("decoder", got=found, wanted=kind, fix=fix)
    return _dataclass(schema, values, "decoder config")


def load_weights(model: nn.Module, folder: str | Path, device: str | torch.device = "cpu") -> str:
    """Fill ``model`` from a folder and move it; returns the fingerprint of weights and configuration. Keys and shapes must fit."""
    from safetensors.torch import load_file

    path = Path(folder) / WEIGHTS_NAME
    tensors, shapes = load_file(path), {name: value.shape for name, value in model.state_dict().items()}
    wrong = sorted(n for n in {*tensors, *shapes} if n not in tensors or shapes.get(n) != tensors[n].shape)
    if wrong:
        raise UserError(
            "decoder weights",
            got=f"{len(wrong)} tensors that do not fit, such as {wrong[0]}",
            wanted="exactly the tensors of the configuration",
            fix="export the decoder again with physis train idm",
        )
    model.load_state_dict({name: value.float() for name, value in tensors.items()})
    model.eval().requires_grad_(False).to(device)
    digest = hashlib.sha256(path.read_bytes())
    digest.update((Path(folder) / CONFIG_NAME).read_bytes())
    return digest.hexdigest()[:16]


def load_decoder(folder: str | Path, device: str = "cpu", *, text: Any = None) -> InverseDynamics:
    """The decoder of a folder, whatever its kind. ``text``: encoder of instructions for those that read them (default: the sentence
    encoder that the shipped models use)."""
    kind = read_config(folder)["decoder"]
    if kind == "feature":
        from .feature_decoder.files import load_feature_decoder

        return load_feature_decoder(folder, device, text=text)
    if kind == "latent":
        from .latent_decoder import load_latent_decoder

        return load_latent_decoder(folder, device)
    if kind == "single_frame":
        from .single_frame import load_single_frame_decoder

        return load_single_frame_decoder(folder, device)
    from .inverse_dynamics import load_inverse_dynamics

    return load_inverse_dynamics(folder, device)


def _dataclass(schema: type[C], values: dict[str, Any], field: str) -> C:
    hints = typing.get_type_hints(schema)
    known = {f.name for f in dataclasses.fields(schema)}  # type: ignore[arg-type]
    if set(values) != known:
        off = sorted(set(values) ^ known)
        raise UserError(field, got=f"{off} in one of them only", wanted=f"fields {sorted(known)}", fix="match versions")
    made = {name: _value(hints[name], value, f"{field}.{name}") for name, value in values.items()}
    return schema(**made)


def _value(kind: Any, value: Any, field: str) -> Any:
    if dataclasses.is_dataclass(kind):
        assert isinstance(kind, type)
        if not isinstance(value, dict):
            raise UserError(field, got=value, wanted=f"fields of {kind.__name__}", fix="match versions")
        return _dataclass(kind, value, field)
    if isinstance(value, list):
        return tuple(value)
    base = typing.get_origin(kind) or kind
    good = isinstance(value, base) if isinstance(base, type) and base is not types.UnionType else True
    if not (good or (base is float and isinstance(value, int))):
        raise UserError(field, got=value, wanted=getattr(kind, "__name__", str(kind)), fix="match versions")
    return value
