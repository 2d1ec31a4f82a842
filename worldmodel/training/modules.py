"""What a run trains: built or loaded, then compiled, recomputed, sharded or given adapters as the run's settings say."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch
from torch import nn

from physisforcing.core.errors import UserError

from ..backbones.actions import ActionConfig
from ..backbones.protocol import call_block
from ..backbones.wan import WanDenoiser, build_denoiser, load_denoiser
from ..backbones.wan_paper import frame_block
from ..data.batches import WindowBank
from ..data.latent_bank import LatentBank
from ..model import HEADS_NAME, load_heads
from ..physics.forcing import PhysisForcing
from ..storage import fingerprint
from .config import TrainWorldModelConfig
from .lora import add_lora, require_peft
from .parallel import shard_block, shard_rest
from .processes import Processes
from .recompute import check_checkpointing, recomputed
from .runtime import autocast, compiles, sharded
from .steplog import check_wandb


def prepared_modules(
    config: TrainWorldModelConfig, bank: WindowBank | LatentBank, processes: Processes
) -> nn.ModuleDict:
    """The modules of a run on their device, ready to be trained: ``denoiser`` and, with physics losses, ``forcing``. Seed torch's global
    generator first."""
    check_run(config, processes)
    if config.model:
        from .large import check_sequence, described, large_denoiser

        assert isinstance(bank, LatentBank)
        check_sequence(processes.sequence, described(config), {window.shape for _, window in bank.windows})
        denoiser = large_denoiser(config, bank.info, processes)
        modules: dict[str, nn.Module] = {"denoiser": denoiser}
        if (heads := build_forcing(config, bank, denoiser.width)) is not None:
            modules["forcing"] = heads.to(processes.device)
        return nn.ModuleDict(modules).train()
    assert isinstance(bank, WindowBank)
    assert bank.proprioception_WKA.shape[1] == len(config.conditioner.lags), "windows of another conditioner"
    made = nn.ModuleDict(build_modules(config, bank)).to(processes.device).train()
    prepare_denoiser(made["denoiser"], config, processes)  # type: ignore[arg-type]
    return made


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
    if (heads := build_forcing(config, bank, config.backbone.dim)) is not None:
        modules["forcing"] = heads
    return modules


def build_forcing(config: TrainWorldModelConfig, bank: WindowBank | LatentBank, width: int) -> PhysisForcing | None:
    """The physics heads on the CPU, those of ``run.init`` where it has some, else drawn, which is said; None where the windows have no targets."""
    if bank.targets is None:
        return None
    # without an encoder relations come from bodies, whose psi may have any width
    teacher_dim = bank.targets.teacher_dim or config.physics.feature_dim
    forcing = PhysisForcing(config.physics, width=width, teacher_dim=teacher_dim)
    if config.run.init and (Path(config.run.init) / HEADS_NAME).is_file():
        load_heads(forcing, Path(config.run.init))
    elif config.run.init:
        print(f"physics heads are drawn: {config.run.init} has none", file=sys.stderr, flush=True)
    return forcing


def check_run(config: TrainWorldModelConfig, processes: Processes) -> None:
    """``UserError`` for what ``prepared_modules`` could not do, before any data is read."""
    check_checkpointing(config.run.checkpointing)
    check_wandb(config.run.wandb)
    sharded(config, processes)
    share = processes.share(config.run.batch)
    mine, micro = share.stop - share.start, config.run.micro
    if micro < 0 or (micro and mine % micro):
        wanted = f"0, or what divides the {mine} samples of a process"
        raise UserError("run.micro", got=micro, wanted=wanted, fix="run.micro=1")
    if config.run.micro and config.physics.weights == "gradient":
        wanted = "fixed with run.micro: the weights would move between the parts of a batch"
        raise UserError("physics.weights", got="gradient", wanted=wanted, fix="physics.weights=fixed, or run.micro=0")
    if config.run.sequence > 1 and config.physics.weights == "gradient":
        wanted = "fixed with run.sequence: the gradients are not measured there"
        raise UserError(
            "physics.weights", got="gradient", wanted=wanted, fix="physics.weights=fixed, or run.sequence=1"
        )
    if not config.lora.rank and (config.lora.targets or config.lora.also):
        name = "lora.targets" if config.lora.targets else "lora.also"
        fix = "lora.rank=32, or leave it out: all weights are trained"
        raise UserError(name, got=config.lora.targets or config.lora.also, wanted="nothing without lora.rank", fix=fix)
    if config.lora.rank:
        require_peft(config.lora)
        if not config.run.init and not config.model:
            fix = "run.init=<folder of a trained model>, or lora.rank=0"
            raise UserError("lora.rank", got=config.lora.rank, wanted="0 without run.init", fix=fix)


def base_precision(config: TrainWorldModelConfig, device: torch.device) -> torch.dtype:
    """The precision of weights that are frozen under adapters."""
    half = not isinstance(autocast(config.run, device), contextlib.nullcontext)
    return torch.bfloat16 if half else torch.float32


def base_fingerprint(config: TrainWorldModelConfig) -> str | None:
    """What tells the frozen weights of a run with adapters from others."""
    if config.model:
        from .large import transformer_fingerprint

        return transformer_fingerprint(config)
    return fingerprint(Path(config.run.init)) if config.run.init else None


def prepare_denoiser(denoiser: WanDenoiser, config: TrainWorldModelConfig, processes: Processes) -> None:
    """Put what the config asks for onto a small model that lies on its device: adapters, compilation, recomputation, sharding."""
    if config.lora.rank:
        base = base_precision(config, processes.device)
        add_lora(denoiser.transformer, config.lora, denoiser.lora_targets, base)
    spread = sharded(config, processes)
    if spread:
        # a shard is put together when its block is called as a module
        for block in denoiser.blocks:
            block.__class__ = frame_block()
            if compiles(config.run):
                block.compile(dynamic=False)
        denoiser.run_block = call_block
    elif compiles(config.run):
        denoiser.compile_blocks()
    denoiser.run_block = recomputed(denoiser.run_block, config.run.checkpointing, compiles(config.run))
    if spread:
        for block in denoiser.blocks:
            shard_block(block, processes)
        shard_rest(denoiser, denoiser.whole_parts(), processes)
