"""Released Fast-WAM checkpoints as policies of ours and back: every tensor has one place (reference sections 1.1 and 5).

A released ``.pt`` holds ``mot`` (both experts under Wan's own names, behind ``mixtures.video.`` and ``mixtures.action.``),
``proprio_encoder``, ``step`` and ``torch_dtype``. LeRobot's port stores the same tensors in one safetensors file behind ``model.``, in newer
files with the blocks of both experts together (``mot.layers.{i}.blocks.video.``). All of these are read; the last but one is written.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from physisforcing.core.digests import file_sha256
from physisforcing.core.errors import UserError
from physisforcing.worldmodel.backbones.loading import TensorEntry, build_empty
from physisforcing.worldmodel.convert.configs import Look, wan_transformer
from physisforcing.worldmodel.convert.keys import KeyMap
from physisforcing.worldmodel.convert.parts import match
from physisforcing.worldmodel.convert.sources import PICKLED, Source, open_source
from physisforcing.worldmodel.convert.wan_keys import transformer_keys

from .config import PolicyModelConfig, fastwam_compat
from .model import WorldActionModel

VIDEO, ACTION, STATE = "mot.mixtures.video.", "mot.mixtures.action.", "proprio_encoder."
#: What LeRobot's port puts before every name.
PREFIX = "model."
#: The action expert's layers that the video expert does not have: released name, ours behind ``expert.``.
OWN = {"action_encoder": "action_in", "head": "proj_out"}
_LAYERS = re.compile(r"mot\.layers\.(\d+)\.blocks\.(video|action)\.(.+)")
_OWN = {old: re.compile(rf"{old}\.(weight|bias)") for old in OWN}
#: What a released ``.pt`` says beside its tensors.
_ASIDE = ("step", "torch_dtype")
_OPTIMIZER = "state of the optimizer"


class PolicyKeys(KeyMap):
    """Names in released checkpoints <-> names in a ``WorldActionModel``. Inside the experts they are Wan's and diffusers'."""

    def __init__(self) -> None:
        super().__init__([], prefixes=("", PREFIX))
        self._wan = transformer_keys()
        self._wan.prefixes = ("",)

    def stock(self, name: str) -> str | None:
        """The name in our model; None where no rule fits."""
        bare = self.bare(name)
        if layer := _LAYERS.fullmatch(bare):
            index, expert, rest = layer.groups()
            bare = f"mot.mixtures.{expert}.blocks.{index}.{rest}"
        if bare in (f"{STATE}weight", f"{STATE}bias"):
            return bare.replace(STATE, "proprioception.")
        if bare.startswith(VIDEO):
            inside = self._wan.stock(bare.removeprefix(VIDEO))
            return None if inside is None else f"transformer.{inside}"
        if not bare.startswith(ACTION):
            return None
        bare = bare.removeprefix(ACTION)
        for old, pattern in _OWN.items():
            if own := pattern.fullmatch(bare):
                return f"expert.{OWN[old]}.{own[1]}"
        inside = self._wan.stock(bare)
        return None if inside is None else _action_name(inside)

    def original(self, name: str) -> str | None:
        """The released name, without LeRobot's prefix, of a tensor in our model; None for one that a release has no place for."""
        if name.startswith("proprioception."):
            return name.replace("proprioception.", STATE)
        for old, new in OWN.items():
            if name.startswith(f"expert.{new}."):
                return name.replace(f"expert.{new}.", f"{ACTION}{old}.")
        if name.startswith("expert.") or ".action." in name:
            found = self._wan.original(
                name.removeprefix("expert.").removeprefix("transformer.").replace(".action.", ".")
            )
            return None if found is None or found.startswith("head.") else ACTION + found
        found = self._wan.original(name.removeprefix("transformer."))
        return None if found is None else VIDEO + found


def _action_name(inside: str) -> str:
    """Of a tensor with diffusers' name in the action expert: blocks lie in the video's blocks."""
    if inside.startswith("blocks."):
        _, index, rest = inside.split(".", 2)
        return f"transformer.blocks.{index}.action.{rest}"
    return f"expert.{inside}"


def convert(path: Path) -> tuple[dict[str, Tensor], int]:
    """-> (tensors of a released ``.pt`` by section and name, tensors of an optimizer that are left out). By torch's restricted unpickler,
    after the checksum was taken; the tensors stay in the file until they are read. ``UserError`` for another layout."""
    fix = "download it again, or give LeRobot's model.safetensors"
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of the unpickler, whose module is not imported here, or of the archive
        got = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(str(path), got=got, wanted="a released Fast-WAM checkpoint", fix=fix) from error
    wanted = "mot and proprio_encoder, with step and torch_dtype beside them"
    if not isinstance(payload, dict) or not isinstance(payload.get("mot"), dict):
        names = sorted(map(str, payload))[:6] if isinstance(payload, dict) else [type(payload).__name__]
        why = "the weights of an action expert are not in this file" if "dit" in names else fix
        raise UserError(str(path), got=", ".join(names), wanted=wanted, fix=why)
    tensors: dict[str, Tensor] = {}
    for section, values in payload.items():
        if section in ("mot", "proprio_encoder") and isinstance(values, dict):
            for name, value in values.items():
                if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
                    raise UserError(f"{path}: {section}.{name}", got=type(value).__name__, wanted="a tensor", fix=fix)
                tensors[f"{section}.{name}"] = value
        elif section not in (*_ASIDE, "optimizer"):
            raise UserError(f"{path}: {section}", got="a section without a place", wanted=wanted, fix=fix)
    return tensors, _count(payload.get("optimizer"))


def _count(value: Any) -> int:
    """Tensors in nested dictionaries and lists."""
    if isinstance(value, dict):
        return sum(map(_count, value.values()))
    return sum(map(_count, value)) if isinstance(value, list | tuple) else int(isinstance(value, Tensor))


def open_released(path: Path, sha256: Mapping[str, str] | None = None) -> tuple[Source, dict[str, int]]:
    """-> (a released checkpoint, what of the file is no part of a policy: reason -> tensors).

    ``path``: ``.pt``, safetensors file, index of shards, or a folder with one ``model.safetensors``. ``sha256``: file name -> checksum that it
    must have. ``UserError`` for files that are missing, damaged or of another checksum.
    """
    path = path / "model.safetensors" if path.is_dir() else path
    if path.suffix not in PICKLED:
        return open_source(path, sha256), {}
    if not path.is_file():
        raise UserError("source", got=str(path), wanted="a released checkpoint", fix="download it, or correct the path")
    digest = file_sha256(path)
    wanted = (sha256 or {}).get(path.name, digest).lower()
    if digest != wanted:
        fix = "download the file again, or correct sha256="
        raise UserError(f"sha256 of {path.name}", got=digest, wanted=wanted, fix=fix)
    tensors, optimizer = convert(path)
    entries = {name: TensorEntry(path, value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    source = Source(path=path, entries=entries, read=tensors.__getitem__, digests={path.name: digest})
    return source, {_OPTIMIZER: optimizer} if optimizer else {}


@dataclass(slots=True, kw_only=True)
class Released:
    """A checkpoint matched against our model. ``origin``: our tensor -> the file's; ``model``: ours, without weights; ``video``: config of
    its transformer."""

    source: Source
    origin: dict[str, str]
    model: WorldActionModel
    config: PolicyModelConfig
    video: dict[str, Any]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self.model.state_dict().items()}

    def read(self, name: str) -> Tensor:
        """Our tensor ``name``, as the file has it."""
        return self.source.read(self.origin[name])


def match_released(source: Source, given: Mapping[str, Any] | None = None, **settings: Any) -> Released:
    """Sizes from the tensors' shapes, then each tensor to its place, before any is read.

    ``given``: of the video expert what no shape says (``num_heads`` where a head is not 128 wide). ``settings``: fields of
    ``PolicyModelConfig`` that no tensor says, such as ``mode`` and ``chunk``. ``UserError`` names a tensor that is missing, unknown, there
    twice, of another shape or not of a floating type, as the file calls it.
    """
    keys = PolicyKeys()
    by_ours = {ours: entry.shape for name, entry in source.entries.items() if (ours := keys.stock(name))}
    shapes = {keys.original(ours) or "": shape for ours, shape in by_ours.items()}
    video = {name.removeprefix(VIDEO): shape for name, shape in shapes.items() if name.startswith(VIDEO)}
    config = wan_transformer(Look(video, source.path, lambda bare: bare), given or {}, "config")
    look = Look(shapes, source.path)
    width, action_dim = look.shape(f"{ACTION}action_encoder.weight")
    policy = fastwam_compat(
        action_dim=action_dim,
        state_dim=look.shape(f"{STATE}weight")[1],
        width=width,
        ffn_dim=look.shape(f"{ACTION}blocks.0.ffn.0.weight")[0],
    )
    policy = dataclasses.replace(policy, **settings)
    model = hollow(policy, config)
    origin, left_out = match(source, keys, {name: tuple(value.shape) for name, value in model.state_dict().items()})
    assert not left_out, "every released tensor has a place"
    return Released(source=source, origin=origin, model=model, config=policy, video=config)


def hollow(config: PolicyModelConfig, video: Mapping[str, Any]) -> WorldActionModel:
    """A model without weights (meta device). ``video``: arguments of ``WanTransformer3DModel``."""
    from accelerate import init_empty_weights
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    transformer = build_empty(WanTransformer3DModel, video)
    with init_empty_weights(include_buffers=False):
        model = WorldActionModel(transformer, dataclasses.replace(config, initial="random"))
    model.config = config
    return model


def is_expert(name: str) -> bool:
    """Whether a tensor of a model is not the video backbone's."""
    return ".action." in name or not name.startswith("transformer.")


#: What a release can express: the design's fields and their published values.
EXPRESSED = {"head": "bare", "positions": "separate", "proprioception": "linear"}


def released_names(model: nn.Module) -> dict[str, str]:
    """Released name (with LeRobot's prefix) -> ours, of every tensor of a model of a design that ``EXPRESSED`` allows."""
    keys = PolicyKeys()
    names = {f"{PREFIX}{keys.original(ours)}": ours for ours in model.state_dict()}
    assert f"{PREFIX}None" not in names and len(names) == len(model.state_dict()), "each tensor has a released name"
    return names
