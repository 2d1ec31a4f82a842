"""LoRA through peft on the stock transformer: what is added, what is trained, and how it is merged again.

Only adapters, conditioner and physics heads are trained, averaged and saved in checkpoints; the frozen weights are those of
``run.init``. A weight W [out,in] becomes W + alpha / rank * B A with A [rank,in] and B [out,rank], B zero at the start.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from physisforcing.core.errors import UserError, unknown_name

from ..storage import as_dtype, save_tensors
from .config import LoraConfig

#: What peft calls the only adapter, and where diffusers looks for it.
NAME, FILE = "default", "pytorch_lora_weights.safetensors"
#: Under this key diffusers keeps an adapter's settings in the file's header.
SETTINGS = "lora_adapter_metadata"


def require_peft(config: LoraConfig) -> None:
    """``UserError`` where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        fix = "pip install 'physisforcing[lora]', or lora.rank=0"
        raise UserError("lora.rank", got=config.rank, wanted="0 without the package peft", fix=fix)


def add_lora(transformer: Any, config: LoraConfig, usual: Sequence[str], base_dtype: torch.dtype) -> None:
    """Freeze ``transformer`` and put adapters on its linear layers whose names end with one of ``config.targets`` (empty: ``usual``).
    The weights of those layers are kept in ``base_dtype`` where they are frozen, all that is trained in float32; draws A from torch's global
    generator.

    Raises ``UserError`` without peft, and for a target that no layer of the transformer has.
    """
    require_peft(config)
    from peft import LoraConfig as PeftConfig

    targets = list(config.targets or usual)
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise unknown_name(
                "lora.targets", target, {name.split(".", 2)[-1] for name in linear}, see="docs/training.md"
            )
    transformer.requires_grad_(False)
    settings = PeftConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets, lora_dropout=0.0)
    transformer.add_adapter(settings, adapter_name=NAME)
    names = [name for name, _ in transformer.named_modules()]
    for wanted in config.also:
        chosen = [name for name in names if name == wanted or name.endswith(f".{wanted}")]
        if not chosen:
            raise unknown_name("lora.also", wanted, {name.rpartition(".")[2] for name in names}, see="docs/training.md")
        for name in chosen:
            transformer.get_submodule(name).requires_grad_(True)
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        elif ".base_layer." in name:
            parameter.data = parameter.data.to(base_dtype)


def merged(state: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """The state of a module with adapters -> that of the plain module, the adapters added to the weights in float32."""
    plain = {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
    for name, down in state.items():
        if name.endswith(f".lora_A.{NAME}.weight"):
            stem = name.removesuffix(f".lora_A.{NAME}.weight")
            up = state[f"{stem}.lora_B.{NAME}.weight"]
            plain[f"{stem}.weight"] = merge_one(plain[f"{stem}.weight"], down, up, config)
    return plain


def merge_one(weight: Tensor, down: Tensor, up: Tensor, config: LoraConfig) -> Tensor:
    """W + alpha / rank * B A in float32. ``down`` is A [rank,in], ``up`` B [out,rank]."""
    return weight.float() + config.alpha / config.rank * (up.float() @ down.float())


def save_adapter(
    state: Mapping[str, Tensor], config: LoraConfig, transformer: Any, folder: Path, dtype: torch.dtype | None
) -> None:
    """Write the adapter as diffusers' ``load_lora_adapter(folder, prefix=None)`` of a stock transformer reads it. ``state``: of a module
    whose ``transformer`` has the adapters."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {
        name.removeprefix("transformer.").replace(f".{NAME}.weight", ".weight"): value
        for name, value in state.items()
        if ".lora_" in name
    }
    settings = transformer.peft_config[NAME].to_dict()
    settings = {name: list(value) if isinstance(value, set) else value for name, value in settings.items()}
    metadata = {"format": "pt", SETTINGS: json.dumps(settings, indent=2, sort_keys=True)}
    save_tensors(as_dtype(kept, dtype), folder / FILE, metadata=metadata)
