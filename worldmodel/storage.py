"""Writing and identifying weights: safetensors only."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from physisforcing.core.errors import UserError

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


def as_dtype(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Contiguous CPU copies of ``state``; floating tensors in ``dtype`` unless it is None."""
    out = {}
    for name, value in state.items():
        target = dtype if dtype is not None and value.is_floating_point() else value.dtype
        out[name] = value.detach().to("cpu", target).contiguous().clone()
    return out


def save_tensors(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file aside and rename it, so that an interrupted save leaves no half file behind."""
    from safetensors.torch import save_file

    aside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(dict(state), aside, metadata=metadata)
    aside.chmod(0o644)  # safetensors writes for the owner only
    os.replace(aside, path)


def save_diffusers(model: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """A diffusers folder (config.json and one safetensors file) of a ``ModelMixin``, stored in ``dtype``.

    Written directly instead of through ``save_pretrained``: this neither changes the model's precision nor needs a second copy
    of it, and the file layout is the same (a test loads it with the stock ``from_pretrained``).
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save_config(folder)
    save_tensors(as_dtype(model.state_dict(), dtype), folder / WEIGHTS_NAME, metadata={"format": "pt"})


def load_diffusers(kind: Any, folder: Path) -> Any:
    """A ``ModelMixin`` from its folder, float32. Every key must fit (``from_pretrained`` only logs those that do not).

    Raises ``UserError`` naming file and tensor, as ``backbones.loading`` does.
    """
    from .backbones.loading import load_weights

    model = kind.from_config(kind.load_config(folder, local_files_only=True))
    load_weights(model, folder, dtype=torch.float32)
    return model


def fingerprint(folder: Path) -> str:
    """12 hex digits over the names and bytes of every safetensors and json file under ``folder``."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".json") and path.is_file():
            digest.update(str(path.relative_to(folder)).encode())
            with path.open("rb") as file:  # a block at a time: a file may be larger than the memory
                hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()[:12]


def latents_fingerprint(codec: Path) -> str:
    """12 hex digits over what decides a codec's latents: its encoder's tensors and the latents' mean and standard deviation.

    Training a codec's decoder further does not change it, so a world model keeps working with the better pictures. ``codec``: a
    diffusers folder of ``CausalVideoAutoencoder`` or ``AutoencoderKLWan``. Raises ``UserError`` for a folder without config or
    weights.
    """
    from safetensors.torch import load_file

    weights = sorted(codec.glob("*.safetensors"))
    if not (codec / "config.json").is_file() or not weights:
        raise UserError(
            "codec",
            got=str(codec),
            wanted="a folder with config.json and weights (.safetensors)",
            fix="codec=<folder of the codec it was trained with>",
        )
    settings = read_json(codec / "config.json")
    digest = hashlib.sha256(json.dumps([settings.get("latents_mean"), settings.get("latents_std")]).encode())
    for path in weights:
        for name, value in sorted(load_file(path).items()):
            if name.startswith(("encode", "quant_conv")):
                digest.update(name.encode())
                digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())
