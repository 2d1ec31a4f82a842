"""The model of a run as a plain folder, whatever the run did to it: sharded weights put together, adapters merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.folder import save_settings
from ..backbones.loading import in_modules, kept_in_float32
from ..backbones.wan import WanDenoiser, build_denoiser
from ..convert.writing import plan_shards, write_part
from ..data.batches import WindowBank
from ..data.latent_bank import LatentBank
from ..model import save_heads, save_world_model
from ..physics.forcing import PhysisForcing
from ..storage import WEIGHTS_NAME, as_dtype, latents_fingerprint, save_tensors
from .config import TrainWorldModelConfig
from .denoiser import BackboneDenoiser
from .lora import NAME, merge_one, merged, save_adapter
from .parallel import whole
from .processes import Processes

#: Bytes of a file of weights, as diffusers cuts them.
SHARD_BYTES = 5_000_000_000


def export_model(
    folder: Path,
    model: nn.ModuleDict,
    config: TrainWorldModelConfig,
    bank: WindowBank | LatentBank,
    processes: Processes,
    *,
    checkpoint: bool = False,
) -> None:
    """Write ``denoiser`` and ``forcing`` of ``model`` into ``folder``, with LoRA merged and also as ``adapter/``. Every process takes part in
    putting weights together, and the first writes.

    A small model is stored in float16, in a ``checkpoint`` as it is. A large backbone is stored in bfloat16; its checkpoint has the
    adapter alone where that is all that is trained.
    """
    forcing: PhysisForcing | None = model["forcing"] if "forcing" in model else None  # type: ignore[assignment]
    if isinstance(bank, LatentBank):
        live: BackboneDenoiser = model["denoiser"]  # type: ignore[assignment]
        _export_large(folder, live, forcing, config, processes, checkpoint)
        return
    dtype = None if checkpoint else torch.float16
    _export_small(folder, model["denoiser"], forcing, config, bank, dtype, processes)  # type: ignore[arg-type]


def _export_small(
    folder: Path,
    live: WanDenoiser,
    forcing: PhysisForcing | None,
    config: TrainWorldModelConfig,
    bank: WindowBank,
    dtype: torch.dtype | None,
    processes: Processes,
) -> None:
    denoiser = live
    if processes.many or config.lora.rank:
        state = gathered(live, processes)
        if not processes.first:
            return
        denoiser = _plain(config, live, merged(state, config.lora))
        if config.lora.rank:
            save_adapter(state, config.lora, live.transformer, folder / "adapter", dtype)
    starts = bank.table.start_W.to(bank.proprioception_WKA.device)
    save_world_model(
        folder,
        denoiser,
        forcing,
        sample_shift=config.flow.sample_shift,
        latents_fingerprint=latents_fingerprint(Path(config.codec)),
        home_state=bank.proprioception_WKA[starts == 0, 0].median(0).values.tolist(),
        dtype=dtype,
    )


def _export_large(
    folder: Path,
    live: BackboneDenoiser,
    forcing: PhysisForcing | None,
    config: TrainWorldModelConfig,
    processes: Processes,
    checkpoint: bool,
) -> None:
    """``transformer/`` (a diffusers folder with ``physis_backbone.json``), ``adapter/`` and ``physics_heads.safetensors``. A tensor at a
    time is put together, whatever the model's size."""
    adapters = config.lora.rank > 0
    if processes.first:
        folder.mkdir(parents=True, exist_ok=True)
    if not (checkpoint and adapters):
        part = LivePart.of(live, config)
        shards = plan_shards(part, SHARD_BYTES)
        if processes.first:
            (folder / "transformer").mkdir()
            write_part(part, shards, folder / "transformer", lambda _bytes: None)
            fps = getattr(live, "fps", None)  # Cosmos3 alone reads it
            save_settings(folder / "transformer", first_latent=live.first_latent, tap=live.tap, fps=fps)
        else:
            for name in (name for shard in shards for name in shard.tensors):
                part.read(name)
    if adapters:
        state = gathered(live, processes, only=".lora_")
        if processes.first:
            state = {name.removeprefix("backbone."): value for name, value in state.items()}
            save_adapter(state, config.lora, live.transformer, folder / "adapter", None)
        if config.lora.also:
            _save_whole(folder / "adapter", live, processes)
    if processes.first and forcing is not None:
        save_heads(forcing, folder, None)


def _save_whole(folder: Path, live: BackboneDenoiser, processes: Processes) -> None:
    """``whole_modules.safetensors``: what is trained beside the adapters, by the stock model's names."""
    trained = {name for name, p in live.named_parameters() if p.requires_grad and ".lora_" not in name}
    state = {name: whole(value.detach()) for name, value in live.state_dict().items() if name in trained}
    if processes.first:
        plain = {
            name.removeprefix("backbone.transformer.").replace(".base_layer.", "."): value
            for name, value in state.items()
        }
        save_tensors(as_dtype(plain, None), folder / "whole_modules.safetensors")


@dataclass(slots=True, kw_only=True)
class LivePart:
    """The transformer of a run, as ``convert.writing`` writes one. ``tensors``: the stock name -> how the tensor is put together."""

    tensors: dict[str, Callable[[], Tensor]]
    shapes: dict[str, tuple[int, ...]]
    config: dict[str, Any]
    float32: tuple[str, ...]
    weights_name: str = WEIGHTS_NAME

    @classmethod
    def of(cls, live: BackboneDenoiser, config: TrainWorldModelConfig) -> LivePart:
        transformer, prefix = live.transformer, "backbone.transformer."
        # of the outermost module: asking it makes FSDP take back weights that lie around gathered
        state = {name.removeprefix(prefix): value for name, value in live.state_dict().items()}
        tensors: dict[str, Callable[[], Tensor]] = {}
        shapes = {}
        for name, value in state.items():
            if ".lora_" in name:
                continue
            plain, stem = name.replace(".base_layer.", "."), name.removesuffix(".base_layer.weight")
            shapes[plain] = tuple(value.shape)
            if stem == name or f"{stem}.lora_A.{NAME}.weight" not in state:
                tensors[plain] = lambda value=value: whole(value.detach())
                continue
            down, up = (state[f"{stem}.lora_{part}.{NAME}.weight"] for part in "AB")
            tensors[plain] = lambda value=value, down=down, up=up: merge_one(
                *(whole(part.detach()) for part in (value, down, up)), config.lora
            )
        return cls(
            tensors=tensors,
            shapes=shapes,
            config=json.loads(transformer.to_json_string()),
            float32=kept_in_float32(transformer),
        )

    def stored(self, name: str) -> torch.dtype:
        """The type in which a tensor is written: bfloat16, where the class does not keep float32."""
        return torch.float32 if in_modules(name, self.float32) else torch.bfloat16

    def read(self, name: str) -> Tensor:
        """A whole tensor on the CPU; every process must ask for the same ones in the same order."""
        return self.tensors[name]().to("cpu")

    def where(self, name: str) -> str:
        """What a tensor is called in messages."""
        return f"weights of the run: {name}"


def gathered(denoiser: nn.Module, processes: Processes, only: str = "") -> dict[str, Tensor]:
    """The whole state of ``denoiser`` (names with ``only``) on the CPU of the first process; the others keep nothing."""
    state = {}
    for name, value in denoiser.state_dict().items():
        if only not in name:
            continue
        together = whole(value.detach())
        if processes.first:
            state[name] = together.to("cpu", copy=True)
    return state


def _plain(config: TrainWorldModelConfig, live: WanDenoiser, state: dict[str, Tensor]) -> WanDenoiser:
    """A denoiser like ``live`` with these weights, on the CPU, made without drawing random numbers."""
    with torch.device("meta"):
        made = build_denoiser(config.backbone, config.conditioner)
        if live.actions is not None:
            made.add_actions(live.actions.config)
    made.load_state_dict(state, assign=True)
    return made
