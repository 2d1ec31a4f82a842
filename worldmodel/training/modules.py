"""The modules of a run: the denoiser and the physics heads."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from torch import nn

from physisforcing.core.errors import UserError

from ..backbones.actions import ActionConfig
from ..backbones.protocol import call_block
from ..backbones.wan import WanDenoiser, build_denoiser, load_denoiser
from ..backbones.wan_paper import WAN_LORA_TARGETS, frame_block
from ..data.batches import WindowBank
from ..model import load_heads
from ..physics.forcing import PhysisForcing
from .config import TrainWorldModelConfig
from .lora import add_lora, require_peft
from .parallel import shard
from .processes import Processes
from .recompute import check_checkpointing, recomputed
from .runtime import autocast, compiles


def build_modules(config: TrainWorldModelConfig, bank: WindowBank) -> dict[str, nn.Module]:
    """``denoiser`` and, where the windows have physics targets, ``forcing``: as ``run.init`` has them, or freshly initialised from
    torch's global generator (seed it first)."""
    init = Path(config.run.init) if config.run.init else None
    if init is None:
        denoiser = build_denoiser(config.backbone, config.conditioner)
        denoiser.conditioner.set_statistics(bank.proprioception_WKA.cpu())
    else:
        denoiser = load_denoiser(init)
    if config.actions and denoiser.actions is None:
        assert bank.actions_WPA is not None, "windows without actions"
        present_WA = bank.proprioception_WKA[:, 0]
        denoiser.add_actions(ActionConfig()).set_statistics(bank.actions_WPA.cpu(), present_WA.cpu())
    modules: dict[str, nn.Module] = {"denoiser": denoiser}
    if bank.targets is not None:
        # without an encoder relations come from bodies, whose psi may have any width
        teacher_dim = bank.targets.teacher_dim or config.physics.feature_dim
        forcing = PhysisForcing(config.physics, width=config.backbone.dim, teacher_dim=teacher_dim)
        if init is not None:
            load_heads(forcing, init)
        modules["forcing"] = forcing
    return modules


def check_run(config: TrainWorldModelConfig, processes: Processes) -> None:
    """``UserError`` for what ``prepare_modules`` could not do, before any data is read."""
    check_checkpointing(config.run.checkpointing, config.run.compile)
    processes.share(config.run.batch)
    if config.lora.rank:
        require_peft(config.lora)
        if not config.run.init:
            fix = "run.init=<folder of a trained model>, or lora.rank=0"
            raise UserError("lora.rank", got=config.lora.rank, wanted="0 without run.init", fix=fix)


def prepare_modules(denoiser: WanDenoiser, config: TrainWorldModelConfig, processes: Processes) -> None:
    """Put what the config asks for onto a denoiser that lies on its device: adapters, compilation, recomputation, sharding."""
    run, device = config.run, processes.device
    check_run(config, processes)
    if config.lora.rank:
        half = not isinstance(autocast(run, device), contextlib.nullcontext)
        add_lora(denoiser.transformer, config.lora, WAN_LORA_TARGETS, torch.bfloat16 if half else torch.float32)
    if processes.many:
        # a shard is put together when its block is called as a module
        for block in denoiser.transformer.blocks:
            block.__class__ = frame_block()
            if compiles(run):
                block.compile(dynamic=False)
        denoiser.run_block = call_block
    elif compiles(run):
        denoiser.compile_blocks()
    denoiser.run_block = recomputed(denoiser.run_block, run.checkpointing)
    if processes.many:
        kept = [part for part in (denoiser.conditioner, denoiser.actions) if part is not None]
        shard(denoiser, denoiser.transformer.blocks, kept, processes)
