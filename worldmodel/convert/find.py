"""Which release a folder or file is, and the parts of a pipeline that it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from physisforcing.core.errors import UserError

from ..storage import WEIGHTS_NAME
from . import parts, pipeline
from .configs import cosmos3_said, read_jsonc
from .parts import Part
from .sources import PICKLED, Source, open_source

KINDS = ("wan", "pf_wan", "pf_cosmos", "diffusers", "to_wan")
#: Wan2.2-*-A14B's two experts, in the order of diffusers' ``transformer`` and ``transformer_2``.
EXPERTS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
PF_BACKBONE, ROOT_WEIGHTS, WAN22_VAE = "backbone.pth", "model.safetensors", "Wan2.2_VAE.pth"
#: In the authors' repositories: where the weights lie, and where the transformer's config.
PF_PLACES = ("checkpoints/PF_Wan", "checkpoints/PF_Cosmos")
PF_CONFIG = "configs/meta_model/wan2.1_i2v_14b/dit.jsonc"
_WAN_FIX = "see docs/convert.md for the files of each release"


@dataclass(slots=True, kw_only=True)
class Found:
    """Parts of a pipeline and what joins them. ``needed``: what the pipeline's class cannot be opened without."""

    kind: str
    parts: list[Part]
    index: dict[str, Any]
    shift: float
    needed: tuple[str, ...]
    tokenizer: tuple[str, Path] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Asked:
    """What the user said about a checkpoint: ``given``: part -> its own config; ``where`` that stands; file -> SHA-256; stored type."""

    given: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    where: str = "config"
    sha256: Mapping[str, str] = field(default_factory=dict)
    dtype: torch.dtype | None = None

    def config(self, part: str, beside: Path | None) -> tuple[Mapping[str, Any], str]:
        """-> (settings of a part, the file they come from): the user's, else those of the file ``beside`` the weights."""
        if part in self.given:
            return self.given[part], self.where
        if beside is not None and beside.is_file():
            return read_jsonc(beside), str(beside)
        return {}, "config"


def asked(config: str | None, sha256: Mapping[str, str], dtype: torch.dtype | None) -> Asked:
    """``config``: a JSON file with the sections ``transformer`` and ``vae``, or with the transformer's settings alone."""
    if config is None:
        return Asked(sha256=sha256, dtype=dtype)
    content = read_jsonc(Path(config))
    sections = {name: content[name] for name in ("transformer", "vae") if isinstance(content.get(name), dict)}
    return Asked(given=sections or {"transformer": content}, where=config, sha256=sha256, dtype=dtype)


def kind_of(source: Path) -> str:
    """One of ``KINDS``, from the files that are there. ``UserError`` for a path that is none of them."""
    if source.is_file():
        return "wan"
    if not source.is_dir():
        raise UserError("source", got=str(source), wanted="a folder or file on this disk", fix="download it first")
    place = bundle(source)
    if (place / ".metadata").is_file() or any(place.glob("*.distcp")):
        fix = "export it with cosmos_framework.scripts.export_model, and convert the export"
        got = f"{place}: a distributed checkpoint, whose index is a pickle"
        raise UserError("source", got=got, wanted="safetensors", fix=fix)
    if (place / "model_index.json").is_file() or _stock_class(place) is not None:
        return "diffusers"
    if (place / PF_BACKBONE).is_file():
        return "pf_wan"
    if any((place / name).is_file() for name in (ROOT_WEIGHTS, f"{ROOT_WEIGHTS}.index.json")):
        return "pf_cosmos"
    return "wan"


def bundle(source: Path) -> Path:
    """The folder with the weights: ``source`` itself, or its ``checkpoints/PF_*`` where it is one of the authors' repositories."""
    inside = [source / place for place in PF_PLACES if (source / place).is_dir()]
    return inside[0] if len(inside) == 1 else source


def find(source: Path, kind: str, wanted: Asked) -> Found:
    """The parts in ``source``, each matched with its stock model. Raises ``UserError`` as ``parts.match`` and the readers do."""
    if kind == "pf_cosmos":
        return _cosmos(bundle(source), wanted)
    return _wan_file(source, wanted) if source.is_file() else _wan_folder(source, kind, wanted)


def _wan_file(path: Path, wanted: Asked) -> Found:
    """One file: a transformer, an autoencoder or a text encoder, told apart by their tensors."""
    opened = open_source(path, wanted.sha256)
    names = {name.removeprefix("model.diffusion_model.") for name in opened.entries}
    if "head.modulation" in names:
        given, where = wanted.config("transformer", None)
        return _wan_found("wan", [_transformer("transformer", opened, given, where, wanted)], given, None)
    if "decoder.middle.0.residual.0.gamma" in names:
        return _wan_found("wan", [parts.wan_autoencoder(opened, *wanted.config("vae", None))], {}, None)
    if "blocks.0.pos_embedding.embedding.weight" in names:
        return _wan_found("wan", [parts.text_encoder(opened)], {}, None)
    wanted_text = "Wan's transformer, autoencoder or text encoder"
    raise UserError("source", got=f"{path} with {min(names, default='no tensors')}", wanted=wanted_text, fix=_WAN_FIX)


def _transformer(name: str, opened: Source, given: Mapping[str, Any], where: str, wanted: Asked) -> Part:
    return parts.wan_transformer(name, opened, given, where, wanted.dtype)


def _wan_folder(source: Path, kind: str, wanted: Asked) -> Found:
    place = bundle(source)
    found: list[Part] = []
    model: Mapping[str, Any] = {}
    beside = source / PF_CONFIG if kind == "pf_wan" else None
    for name, path in _wan_transformers(place, kind).items():
        model, where = wanted.config("transformer", beside or path.parent / "config.json")
        found.append(_transformer(name, open_source(path, wanted.sha256), model, where, wanted))
    if (vae := _only(place, "*VAE*", "autoencoder")) is not None:
        found.append(parts.wan_autoencoder(open_source(vae, wanted.sha256), *wanted.config("vae", None)))
    if (text := _only(place, "models_t5*", "text encoder")) is not None:
        found.append(parts.text_encoder(open_source(text, wanted.sha256)))
    if not found:
        listed = sorted(path.name for path in place.iterdir())[:8]
        wanted_text = f"{WEIGHTS_NAME} or its index, {PF_BACKBONE}, Wan2.x_VAE.pth or models_t5_*.pth"
        raise UserError("source", got=f"{place} with {listed}", wanted=wanted_text, fix=_WAN_FIX)
    tokenizer = place / "google" / "umt5-xxl"
    return _wan_found(kind, found, model, tokenizer if tokenizer.is_dir() else None)


def _wan_transformers(place: Path, kind: str) -> dict[str, Path]:
    """Name in the pipeline -> file or index of each transformer."""
    if kind == "pf_wan":
        return {"transformer": place / PF_BACKBONE}
    experts = {name: place / folder for name, folder in EXPERTS.items()}
    there = [folder.is_dir() for folder in experts.values()]
    if any(there) and not all(there):
        missing = next(folder for folder in experts.values() if not folder.is_dir())
        fix = "copy or download the other expert, or give one expert's folder as source"
        raise UserError("source", got=f"no {missing}", wanted="both experts", fix=fix)
    folders = experts if all(there) else {"transformer": place}
    paths = {name: _weights(folder, WEIGHTS_NAME) for name, folder in folders.items()}
    if all(there) and None in paths.values():
        name = next(name for name, path in paths.items() if path is None)
        fix = "copy or download the whole folder"
        raise UserError("source", got=str(folders[name]), wanted=f"{WEIGHTS_NAME}.index.json and its shards", fix=fix)
    return {name: path for name, path in paths.items() if path is not None}


def _weights(folder: Path, name: str) -> Path | None:
    """Index or single file of a safetensors checkpoint; ``UserError`` for shards without their index."""
    for path in (folder / f"{name}.index.json", folder / name):
        if path.is_file():
            return path
    shards = sorted(folder.glob(f"{Path(name).stem}-*-of-*.safetensors"))
    if shards:
        fix = f"copy or download {name}.index.json into {folder}"
        raise UserError(str(folder), got=f"{len(shards)} shards without an index", wanted="the index too", fix=fix)
    return None


def _only(place: Path, pattern: str, what: str) -> Path | None:
    """The one checkpoint that fits; ``UserError`` for several."""
    files = [path for path in sorted(place.glob(pattern)) if path.suffix in (*PICKLED, ".safetensors")]
    if len(files) > 1:
        got, fix = ", ".join(path.name for path in files), "convert from a folder with the one that belongs to it"
        raise UserError("source", got=got, wanted=f"one {what}", fix=fix)
    return files[0] if files else None


def _wan_found(kind: str, found: list[Part], model: Mapping[str, Any], tokenizer: Path | None) -> Found:
    by_name = {part.name: part for part in found}
    index: dict[str, Any] = {"_class_name": "WanImageToVideoPipeline", "boundary_ratio": None}
    if "transformer" in by_name:
        index = pipeline.wan_index(by_name, model.get("model_type"))
    facts: dict[str, Any] = {}
    if kind == "pf_wan":
        # Their inference puts the clean first latent back after every step and gives its tokens timestep 0.
        facts = {"first_latent": "pinned", "boundary_ratio": None}
    return Found(
        kind=kind,
        parts=found,
        index=index,
        shift=pipeline.wan_shift(index),
        needed=("transformer", "vae", "text_encoder", "tokenizer"),
        tokenizer=None if tokenizer is None else ("tokenizer", tokenizer),
        facts=facts,
    )


def _cosmos(place: Path, wanted: Asked) -> Found:
    """An export of cosmos-framework: root weights with the framework's names and its config; Wan2.2's autoencoder anywhere below."""
    root = _weights(place, ROOT_WEIGHTS) if place.is_dir() else place
    if root is None:
        fix = "export the checkpoint with cosmos_framework.scripts.export_model"
        raise UserError("source", got=str(place), wanted=f"{ROOT_WEIGHTS} or its index and shards", fix=fix)
    given, where = wanted.config("transformer", root.parent / "config.json")
    given = cosmos3_said(given) if "transformer" not in wanted.given else given
    opened = open_source(root, wanted.sha256)
    found = [parts.cosmos3_transformer(opened, given, where, wanted.dtype)]
    vaes = sorted(root.parent.rglob(WAN22_VAE))
    if vaes:
        found.append(parts.wan_autoencoder(open_source(vaes[0], wanted.sha256), *wanted.config("vae", None)))
    elif (root.parent / "vae" / "config.json").is_file():
        from diffusers import AutoencoderKLWan

        found.append(parts.stock_folder("vae", root.parent / "vae", AutoencoderKLWan))
    folders = (root.parent, root.parent / "text_tokenizer", root.parent / "tokenizer")
    tokenizer = next((folder for folder in folders if (folder / "tokenizer_config.json").is_file()), None)
    return Found(
        kind="pf_cosmos",
        parts=found,
        index=pipeline.cosmos_index(),
        shift=pipeline.SHIFT_COSMOS,
        needed=("transformer", "vae", "text_tokenizer"),
        tokenizer=None if tokenizer is None else ("text_tokenizer", tokenizer),
    )


def _stock_class(folder: Path) -> str | None:
    """The stock class that a folder's ``config.json`` names; None for other configs, Wan's own included."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        name = content.get("_class_name") or (content.get("architectures") or [None])[0]
    except (OSError, ValueError, AttributeError):
        return None
    return name if name in (*STOCK, "UMT5EncoderModel") else None


#: diffusers classes whose folders can be checked.
STOCK = ("WanTransformer3DModel", "Cosmos3OmniTransformer", "AutoencoderKLWan")
