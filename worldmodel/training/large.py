"""The large backbones as the trainer takes them: checked, loaded a block at a time, with adapters or sharded.

A model lies whole in no process that shares it: it is built without memory, and each block gets its weights from disk, goes to the device
and is sharded before the next one is read. Weights are bfloat16 where they are frozen under adapters and float32 where they are trained;
the blocks compute in bfloat16 either way on a GPU.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from physisforcing.core.errors import UserError

from ..backbones.folder import Described, describe_backbone, wrap_transformer
from ..backbones.loading import Weights, build_empty, folder_entries, read_transformer
from ..backbones.sequence import SequenceSplit
from ..backbones.wan_paper import WanBackbone
from ..data.latent_shards import StoreInfo
from ..storage import latents_fingerprint
from .config import TrainWorldModelConfig
from .denoiser import BackboneDenoiser
from .float8 import check_float8, dither_weights, use_float8
from .lora import add_lora
from .modules import base_precision
from .parallel import shard_block, shard_rest
from .processes import Processes
from .recompute import recomputed
from .runtime import compiles, sharded

#: Beginnings of the names of settings that say something about the small models alone, and of those that do about the large ones.
_SMALL = (
    "codec", "actions", "text_dropout", "backbone.", "conditioner.", "data.limit", "data.success_only",
    "data.start_stride", "data.start_fraction", "data.end_fraction",
)  # fmt: skip
_LARGE = ("large.", "data.live.", "run.fp8", "run.sequence")
#: Those of the small models whose like ``data.live`` has.
_ALSO_LIVE = ("data.limit", "data.success_only", "data.start_stride")
#: Those that say how windows are made, which stores hold already.
_MAKING = ("data.roots", "data.live.", "data.targets", "data.text_cache", "teacher.")


def check_large(config: TrainWorldModelConfig) -> None:
    """``UserError`` for settings that a large backbone does not have, and for folders that are none. Nothing large is read."""
    for name, value in _chosen(config, _SMALL):
        fix = f"leave {name} out; without experiment= it is that of the small pico: name a recipe such as experiment=lora_24gb"
        if name.startswith("backbone."):
            fix = "large.tap=, and leave the rest out: its sizes are those of its folder"
        if name in _ALSO_LIVE:
            fix = f"data.live.{name.removeprefix('data.')}= with datasets, or leave {name} out: data.latents hold their windows"
        raise UserError(name, got=value, wanted="no such setting with model=", fix=fix)
    for name, value in _chosen(config, _MAKING) if config.data.latents else ():
        fix = f"leave {name} out: data.latents hold their windows"
        if name == "data.roots":
            fix = "data.latents to train on stores, or data.roots to encode while training: leave one out"
        if name.startswith("teacher."):
            fix = "leave teacher out: data.latents hold the targets, and who made them"
        raise UserError(name, got=value, wanted="no such setting with model= and data.latents", fix=fix)
    if not config.data.latents and not config.data.roots:
        fix = (
            "physis data latents, then data.latents=[<its folder>], or data.roots=[<dataset>] to encode while training"
        )
        raise UserError("data.latents", got="no store", wanted="one or more latent stores, or data.roots", fix=fix)
    if config.data.workers < 1:
        raise UserError(
            "data.workers", got=config.data.workers, wanted="1 or more: they read ahead", fix="data.workers=4"
        )
    check_float8(config.run.fp8, rank=config.lora.rank)
    check_sequence(config.run.sequence, described(config))


def check_sequence(count: int, found: Described, shapes: Iterable[Sequence[int]] = ()) -> None:
    """``UserError`` unless ``count`` processes can compute a sample of this transformer together; ``shapes``: of the latents [C,F,h,w] of its windows."""
    if count == 1:
        return
    fix = "run.sequence=1, or another number of processes"
    settings = json.loads((found.path / "config.json").read_text())
    if found.cosmos:
        raise UserError("run.sequence", got=count, wanted="1 with Cosmos3", fix="run.sequence=1")
    if (heads := int(settings["num_attention_heads"])) % count:
        raise UserError("run.sequence", got=f"{count}, and {heads} heads", wanted="equal parts", fix=fix)
    _, rows, columns = settings["patch_size"]
    for shape in shapes:
        if (tokens := shape[2] // rows * (shape[3] // columns)) % count:
            got, fix = f"{count}, and {tokens} tokens a latent frame of {list(shape[2:])}", f"{fix}, or another bucket"
            raise UserError("run.sequence", got=got, wanted="equal parts of each frame", fix=fix)


def check_small(config: TrainWorldModelConfig) -> None:
    """``UserError`` for settings that the small models do not have."""
    for name, value in _chosen(config, _LARGE):
        fix = f"leave {name} out, or name the folder of a large backbone with model="
        raise UserError(name, got=value, wanted="no such setting without model=", fix=fix)


def _chosen(config: TrainWorldModelConfig, beginnings: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Dotted name and value of the settings with such names that are not the usual ones."""
    usual = _flat(dataclasses.asdict(type(config)()))
    for name, value in _flat(dataclasses.asdict(config)).items():
        if name.startswith(beginnings) and value != usual.get(name):
            yield name, value


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def described(config: TrainWorldModelConfig) -> Described:
    """The transformer that the run starts with: that of ``run.init``, an earlier run's export, or of ``model``."""
    options: dict[str, Any] = {"first_latent": config.large.first_latent, "tap": config.large.tap}
    found = describe_backbone(config.model, **options)
    if not config.run.init:
        return found
    return describe_backbone(config.run.init, stride=found.stride, **options)  # no autoencoder lies beside an export


def large_denoiser(config: TrainWorldModelConfig, info: StoreInfo, processes: Processes) -> BackboneDenoiser:
    """The backbone on its device, trainable. ``UserError`` where the stores were made for another one."""
    device = processes.device
    found = described(config)
    transformer = build_empty(found.kind, read_transformer(found.path, found.kind))
    base = base_precision(config, device) if config.lora.rank else torch.float32
    weights = Weights(transformer, found.path, base)
    check_float8(config.run.fp8, rank=config.lora.rank, device=device)
    if config.lora.rank:
        add_lora(transformer, config.lora, found.lora_targets, base)
    backbone = wrap_transformer(transformer, found, fps=info.fps)
    denoiser = BackboneDenoiser(backbone)
    _check_stores(denoiser, info, Path(config.model) / "vae")
    if processes.sequence > 1:
        assert isinstance(backbone, WanBackbone), "check_sequence has looked"
        place = processes.rank % processes.sequence
        backbone.share_samples(SequenceSplit(group=processes.neighbours, place=place, count=processes.sequence))
    if config.run.fp8:
        use_float8(backbone.blocks, device)
    if compiles(config.run):
        denoiser.compile_blocks()
    denoiser.run_block = recomputed(denoiser.run_block, config.run.checkpointing, compiles(config.run))
    dither = torch.Generator(device).manual_seed(config.run.seed) if config.run.fp8 else None
    _place(denoiser, weights, device, processes if sharded(config, processes) else None, dither)
    return denoiser


def _place(
    denoiser: BackboneDenoiser,
    weights: Weights,
    device: torch.device,
    processes: Processes | None,
    dither: torch.Generator | None,
) -> None:
    """Weights from disk, adapters drawn, block by block; each is sharded over ``processes`` before the next is read. ``dither``: what the blocks' weights are
    dithered with (``dither_weights``), alike in all processes."""
    transformer = denoiser.backbone.transformer
    there = {name for name, _ in transformer.named_parameters()} | {name for name, _ in transformer.named_buffers()}
    trained = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}

    def rename(name: str) -> str:
        if name in there:
            return name
        stem, _, leaf = name.rpartition(".")
        return f"{stem}.base_layer.{leaf}"  # peft moves the layer under its adapter

    places = {id(module): name for name, module in transformer.named_modules()}
    prefixes = [f"{places[id(block)]}." for block in denoiser.backbone.blocks]
    for block, prefix in zip(denoiser.backbone.blocks, prefixes, strict=True):
        weights.place(device, lambda name, prefix=prefix: name.startswith(prefix), rename, trained.__contains__)
        _draw_adapters(block, device)
        if dither is not None:
            dither_weights(block, dither)
        if processes is not None:
            shard_block(block, processes)
    weights.place(device, lambda name: not name.startswith(tuple(prefixes)), rename, trained.__contains__)
    _draw_adapters(transformer, device)
    if processes is not None:
        shard_rest(denoiser, [], processes)


def _draw_adapters(module: nn.Module, device: torch.device) -> None:
    """Adapters without memory, as peft starts them: A uniform, B zero. Drawn on the CPU from torch's global generator, so that every
    process and device begins with the same ones."""
    for name, parameter in list(module.named_parameters()):
        if not parameter.is_meta:
            continue
        assert ".lora_" in name, f"{name} has no weights"
        value = torch.zeros(parameter.shape)
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(value, a=math.sqrt(5))
        path, _, leaf = name.rpartition(".")
        holder = module.get_submodule(path)
        holder._parameters[leaf] = nn.Parameter(value.to(device, parameter.dtype), requires_grad=True)


def _check_stores(denoiser: BackboneDenoiser, info: StoreInfo, autoencoder: Path) -> None:
    """``autoencoder``: that of the pipeline, whose weights a run without held-out videos need not have."""
    backbone = denoiser.backbone
    kind = "cosmos3" if type(backbone.transformer).__name__ == "Cosmos3OmniTransformer" else "wan"
    needed: list[tuple[str, Any, Any]] = [
        ("kind", info.kind, kind),
        ("channels", info.channels, backbone.latent_channels),
        ("stride", tuple(info.stride), tuple(backbone.stride)),
        ("conditioned", info.conditioned, bool(getattr(backbone, "conditioned", False))),
    ]
    for name, got, wanted in needed:
        if got != wanted:
            fix = "physis data latents with the model= of this run"
            raise UserError(f"data.latents: {name}", got=got, wanted=f"{wanted}, as the backbone has", fix=fix)
    if any(autoencoder.glob("*.safetensors")) and (mine := latents_fingerprint(autoencoder)) != info.latents:
        got, wanted = f"of the autoencoder {info.latents}", f"those of {autoencoder}, which is {mine}"
        fix = "physis data latents with the model= of this run, or name the folder that they were made with"
        raise UserError("data.latents", got=got, wanted=wanted, fix=fix)


def transformer_fingerprint(config: TrainWorldModelConfig) -> str:
    """12 hex digits that tell a folder's weights from others: names, types and shapes of all tensors, and 64 pieces of each file. (Reading
    28 GB at every start would take longer than loading them.)"""
    folder = described(config).path
    entries = folder_entries(folder)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for name, entry in sorted(entries.items()):
        digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
    for file in sorted({entry.file for entry in entries.values()}):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for piece in range(64):
                stream.seek(piece * max(0, size - 65536) // 63)
                digest.update(stream.read(65536))
    return digest.hexdigest()[:12]
