"""What the training of a policy starts from: settings of ``run.init``, windows with their statistics, and the model."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

from physisforcing.core.errors import UserError
from physisforcing.worldmodel.backbones.wan import build_denoiser, load_denoiser
from physisforcing.worldmodel.codec import load_codec
from physisforcing.worldmodel.data.windows import Episode, WindowTable, read_episodes
from physisforcing.worldmodel.storage import latents_fingerprint
from physisforcing.worldmodel.training.banks import load_bank
from physisforcing.worldmodel.training.initial import adopt_model
from physisforcing.worldmodel.training.runtime import split_heldout

from .checkpoint import SETTINGS, load_policy, read_settings
from .model import WorldActionModel
from .normalization import ActionStatistics
from .training_config import TrainPolicyConfig
from .windows import PolicyBank, episode_statistics

HEADS = "physics_heads.safetensors"


def adopt(config: TrainPolicyConfig) -> None:
    """Take what ``run.init`` fixes into the config. ``UserError`` for a setting that was changed to something that its weights do not have."""
    if config.model:
        raise UserError(
            "model",
            got=config.model,
            wanted="nothing: large backbones are not trained as policies yet",
            fix="leave it out",
        )
    init = Path(config.run.init) if config.run.init else None
    if init is None or not (init / SETTINGS).is_file():
        adopt_model(config)
        config.policy.state_dim = config.policy.action_dim = config.conditioner.state_dim
        return
    adopt_policy(config, init)


def adopt_policy(config: TrainPolicyConfig, init: Path) -> None:
    """Take the settings of the policy in ``init`` into the config and say so; ``UserError`` for one that was changed to something else."""
    stored, info, extra = read_settings(init)
    statistics = ActionStatistics.load(init, action_dim=stored.action_dim, state_dim=stored.state_dim)
    usual = TrainPolicyConfig()
    wanted = [
        (config.policy, usual.policy, "policy.", item.name, getattr(stored, item.name))
        for item in dataclasses.fields(stored)
    ]
    for chosen, before, prefix, name, theirs in [*wanted, (config, usual, "", "normalization", statistics.kind)]:
        mine, default = getattr(chosen, name), getattr(before, name)
        if mine == theirs:
            continue
        if mine != default:
            fix = f"leave {prefix}{name} out, or begin from a world model"
            raise UserError(f"{prefix}{name}", got=mine, wanted=f"{theirs!r}, with which run.init was trained", fix=fix)
        print(f"{prefix}{name}={theirs} (from run.init; the default is {default})", file=sys.stderr, flush=True)
        setattr(chosen, name, theirs)
    found = latents_fingerprint(Path(config.codec)) if config.codec else "none"
    if found != info.latents:
        fix = "codec=<the codec of that policy>"
        raise UserError("codec", got=f"latents {found}", wanted=f"latents {info.latents}, as run.init has", fix=fix)
    if extra["conditioner"] is not None:
        config.conditioner.lags = tuple(extra["conditioner"]["lags"])


def prepare_policy_banks(
    config: TrainPolicyConfig, device: torch.device, episodes: list[Episode] | None = None, *, quiet: bool = False
) -> tuple[PolicyBank, PolicyBank]:
    """-> (training windows, held-out ones); statistics are those of the training episodes, or of the policy that is trained further."""
    data = config.data
    if data.heldout < 1:
        raise UserError("data.heldout", got=data.heldout, wanted="at least 1", fix="data.heldout=1")
    if episodes is None:
        episodes = read_episodes(
            data.roots, success_only=data.success_only, tasks=data.tasks, limit=data.limit, workers=data.workers
        )
    codec, parts = load_codec(config.codec, device), split_heldout(episodes, data.heldout)
    stored = initial_statistics(config)
    statistics = stored if stored is not None else episode_statistics(parts[0], config.normalization)
    banks = []
    for part in parts:
        table = WindowTable.build([episode.length for episode in part], data.start_stride)
        bank = load_bank(config, part, table, codec, device)
        banks.append(PolicyBank.of(bank, part, statistics, config.policy.chunk))
    if not quiet:
        shares = (statistics.action.saturated(torch.from_numpy(episode.states_TA)) for episode in parts[0])
        worst = max(shares)
        if worst > 0:
            print(f"normalisation: up to {100 * worst:.2f} % of an episode's numbers are clamped", flush=True)
    return banks[0], banks[1]


def initial_statistics(config: TrainPolicyConfig) -> ActionStatistics | None:
    """Those of the policy that is trained further: other ones would change what its numbers mean. None where a run begins with a world model."""
    init = Path(config.run.init) if config.run.init else None
    if init is None or not (init / SETTINGS).is_file():
        return None
    return ActionStatistics.load(init, action_dim=config.policy.action_dim, state_dim=config.policy.state_dim)


def build_policy_model(config: TrainPolicyConfig) -> WorldActionModel:
    """As ``run.init`` has it, or with an action expert beside its transformer, or drawn. Seed torch's global generator first."""
    init = Path(config.run.init) if config.run.init else None
    if init is not None and (init / SETTINGS).is_file():
        return load_policy(init)[0].requires_grad_(True).train()
    denoiser = load_denoiser(init) if init is not None else build_denoiser(config.backbone, config.conditioner)
    if denoiser.actions is not None:
        fix = "give a model that was trained without actions=true"
        raise UserError(
            "run.init", got="an action model", wanted="a text model: the video does not see actions", fix=fix
        )
    conditioner = denoiser.conditioner if config.policy.proprioception == "backbone" else None
    return WorldActionModel(denoiser.transformer, config.policy, tap=denoiser.tap, conditioner=conditioner)


def heads_from(config: TrainPolicyConfig) -> TrainPolicyConfig:
    """The config for the physics heads: they are drawn, which is said, where ``run.init`` was trained without (flow matching, or a policy)."""
    if not config.run.init or (Path(config.run.init) / HEADS).is_file():
        return config
    print(f"physics heads are drawn: {config.run.init} has none", file=sys.stderr, flush=True)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, init=None))
