"""The parts of a pipeline, each matched against the stock model before anything is written.

A part is a checkpoint, the stock model that it belongs to, built without weights, and for each of the model's tensors the original
one. Every original tensor goes to exactly one place, or is left out for a stated reason.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from physisforcing.core.errors import UserError

from ..backbones import loading
from ..storage import WEIGHTS_NAME
from . import configs
from .configs import Look
from .cosmos_keys import cosmos3_keys
from .keys import KeyMap
from .sources import Source
from .wan_keys import autoencoder_keys, text_encoder_keys, transformer_keys

#: transformers' name for a model's weights.
TEXT_WEIGHTS_NAME = "model.safetensors"

#: What diffusers keeps in float32, in Wan's names.
ORIGINAL_FLOAT32 = ("time_embedding", "modulation", "norm3")


@dataclass(slots=True, kw_only=True)
class Part:
    """``name``: its folder in the pipeline. ``origin``: the model's tensor -> the checkpoint's. ``config``: content of its config.json.
    ``dtype``: what it is stored in, None as it is; ``float32``: modules that keep float32 all the same. ``left_out``: reason -> tensors.
    """

    name: str
    library: str
    class_name: str
    source: Source
    origin: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    config: dict[str, Any]
    weights_name: str = WEIGHTS_NAME
    dtype: torch.dtype | None = None
    float32: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    def stored(self, name: str) -> torch.dtype:
        """The type in which a tensor of the model is written."""
        found = self.source.entries[self.origin[name]].dtype
        if self.dtype is None:
            return found
        return torch.float32 if loading.in_modules(name, self.float32) else self.dtype

    def read(self, name: str) -> Tensor:
        """A tensor of the model, as the checkpoint has it."""
        return self.source.read(self.origin[name])

    def where(self, name: str) -> str:
        """Where that tensor lies, for messages."""
        original = self.origin[name]
        return f"{self.source.entries[original].file}: {original}"


def match(source: Source, keys: KeyMap, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, str], Counter[str]]:
    """-> (the model's tensor -> the checkpoint's, reason -> number of tensors left out).

    Raises ``UserError``, naming tensors as the checkpoint does: one that no rule knows or that the model has no place for, two for
    one place, one that is missing, one of another shape or of no floating type.
    """
    origin: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    for name, entry in source.entries.items():
        if (why := keys.why_left_out(name)) is not None:
            left_out[why] += 1
            continue
        stock = keys.stock(name)
        if stock is None or stock not in shapes:
            lora = "lora" in name
            fix = (
                "merge the adapter into the weights first"
                if lora
                else "choose kind= and config= for this checkpoint; see docs/convert.md"
            )
            raise UserError(
                f"{entry.file}: {name}",
                got="a tensor without a place in the stock model",
                wanted=f"names such as {keys.original(next(iter(shapes)))}",
                fix=fix,
            )
        if stock in origin:
            got, fix = f"{origin[stock]} and {name}", "use a checkpoint that holds each tensor once"
            raise UserError(f"{entry.file}: {stock}", got=got, wanted="one tensor for it", fix=fix)
        loading.check_entry(entry, name, shapes[stock])
        origin[stock] = name
    missing = [keys.original(name) or name for name in shapes if name not in origin]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        fix = "copy or download the whole checkpoint again"
        raise UserError(str(source.path), got=f"no {missing[0]}{more}", wanted=f"{len(shapes)} tensors", fix=fix)
    return origin, left_out


def wan_transformer(
    name: str, source: Source, given: Mapping[str, Any], where: str, dtype: torch.dtype | None = None
) -> Part:
    """``WanTransformer3DModel`` from a ``WanModel``'s checkpoint. ``given``: that model's own config, see ``configs``."""
    from diffusers import WanTransformer3DModel

    keys = transformer_keys()
    look = _look(source, keys, "patch_embedding.weight")
    return _diffusers(
        name, WanTransformer3DModel, configs.wan_transformer(look, given, where), source, keys, dtype=dtype
    )


def wan_autoencoder(source: Source, given: Mapping[str, Any], where: str) -> Part:
    """``AutoencoderKLWan`` from ``Wan2.1_VAE.pth`` or ``Wan2.2_VAE.pth``, in the precision of the file (float32)."""
    from diffusers import AutoencoderKLWan

    config = configs.wan_autoencoder(Look(source.shapes, source.path), given, where)
    keys = autoencoder_keys(len(config["dim_mult"]), config["num_res_blocks"], config["is_residual"])
    return _diffusers("vae", AutoencoderKLWan, config, source, keys)


def cosmos3_transformer(source: Source, given: Mapping[str, Any], where: str, dtype: torch.dtype | None = None) -> Part:
    """``Cosmos3OmniTransformer`` from a checkpoint with the framework's names."""
    from diffusers import Cosmos3OmniTransformer

    keys = cosmos3_keys()
    look = _look(source, keys, "vae2llm.weight")
    config = configs.cosmos3_transformer(look, given, where)
    return _diffusers("transformer", Cosmos3OmniTransformer, config, source, keys, dtype=dtype)


def text_encoder(source: Source) -> Part:
    """``UMT5EncoderModel`` from Wan's ``models_t5_umt5-xxl-enc-bf16.pth``, in the precision of the file."""
    from accelerate import init_empty_weights
    from transformers import UMT5Config, UMT5EncoderModel

    config = configs.text_encoder(Look(source.shapes, source.path))
    with init_empty_weights(include_buffers=False):
        model = UMT5EncoderModel(UMT5Config(**config))
    # The embedding has two names in the model and one in its file.
    shapes = {name: shape for name, shape in loading.shapes_of(model).items() if name != "encoder.embed_tokens.weight"}
    origin, left_out = match(source, text_encoder_keys(), shapes)
    content = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": ["UMT5EncoderModel"]}
    return Part(
        name="text_encoder",
        library="transformers",
        class_name="UMT5EncoderModel",
        source=source,
        origin=origin,
        shapes=shapes,
        config=content,
        weights_name=TEXT_WEIGHTS_NAME,
        left_out=left_out,
    )


def stock_folder(name: str, folder: Path, kind: Any) -> Part:
    """A part that is in diffusers' layout already, checked like the others."""
    model = loading.build_empty(kind, loading.read_transformer(folder, kind))
    entries, shapes = loading.folder_entries(folder), loading.shapes_of(model)
    loading.check_entries(entries, shapes, folder)
    return Part(
        name=name,
        library="diffusers",
        class_name=kind.__name__,
        source=Source.of_entries(folder, entries),
        origin={key: key for key in shapes},
        shapes=shapes,
        config=json.loads(model.to_json_string()),
    )


def original_transformer(name: str, folder: Path, dtype: torch.dtype | None) -> Part:
    """The way back: a stock Wan transformer in ``folder`` as a ``WanModel`` with its own names, in the folder ``name``."""
    from diffusers import WanTransformer3DModel

    stock, keys = stock_folder(name, folder, WanTransformer3DModel), transformer_keys()
    origin = {keys.original(key) or "": key for key in stock.shapes}
    assert len(origin) == len(stock.shapes) and "" not in origin, "each tensor of the stock model has a rule"
    return Part(
        name=name,
        library="wan",
        class_name="WanModel",
        source=stock.source,
        origin=origin,
        shapes={new: stock.shapes[old] for new, old in origin.items()},
        config=configs.wan_original(stock.config),
        dtype=dtype,
        float32=ORIGINAL_FLOAT32,
    )


def _diffusers(
    name: str,
    kind: Any,
    config: dict[str, Any],
    source: Source,
    keys: KeyMap,
    dtype: torch.dtype | None = None,
) -> Part:
    model = loading.build_empty(kind, config)
    shapes = loading.shapes_of(model)
    origin, left_out = match(source, keys, shapes)
    return Part(
        name=name,
        library="diffusers",
        class_name=kind.__name__,
        source=source,
        origin=origin,
        shapes=shapes,
        config=json.loads(model.to_json_string()),
        dtype=dtype,
        float32=loading.kept_in_float32(model),
        left_out=left_out,
    )


def _look(source: Source, keys: KeyMap, certain: str) -> Look:
    """A look at the shapes behind the prefix of this checkpoint: the one with which the tensor ``certain`` is there. From here on
    every name must have it."""
    found = [prefix for prefix in keys.prefixes if prefix + certain in source.entries]
    keys.prefixes = (found[0] if found else keys.prefixes[0],)
    return Look(source.shapes, source.path, lambda bare: keys.prefixes[0] + bare)
