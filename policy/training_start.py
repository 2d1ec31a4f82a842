"""What the training of a policy starts from: settings of ``run.init``, windows with their statistics, and the model."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from physisforcing.core.errors import UserError
from physisforcing.core.paths import weights_root
from physisforcing.core.types import RATE_TOLERANCE
from physisforcing.worldmodel.backbones.wan import build_denoiser
from physisforcing.worldmodel.codec import load_codec
from physisforcing.worldmodel.data.latent_bank import LatentBank
from physisforcing.worldmodel.data.windows import Episode, WindowTable, read_episodes
from physisforcing.worldmodel.storage import fingerprint, latents_fingerprint
from physisforcing.worldmodel.training.banks import load_bank, open_datasets, open_stores, refuse_stores
from physisforcing.worldmodel.training.initial import adopt_heads, adopt_model
from physisforcing.worldmodel.training.runtime import split_heldout

from .backbone import RANDOM, SHIPPED, build_policy, tail
from .checkpoint import INSTRUCTION, SETTINGS, TRANSFORMER, PolicyInfo, load_policy, packaged_backbone, read_settings
from .config import PolicyModelConfig
from .model import WorldActionModel
from .normalization import ActionStatistics
from .recordings import Recordings
from .training_config import TrainPolicyConfig
from .windows import PolicyBank, episode_statistics, latent_banks


def adopt(config: TrainPolicyConfig, typed: Collection[str] = ()) -> None:
    """Take what ``run.init`` fixes into the config. ``UserError`` for a setting that was changed to something that its weights do not have.
    ``typed``: dotted names of the settings that somebody typed, which count as changed where they are the defaults; of a policy's."""
    init = initial_folder(config)
    stored = init is not None and (init / SETTINGS).is_file()
    if stored and (config.run.init or "").startswith(RANDOM):
        fix = "run.init=random:<a world model's export>, or the policy without random: to train it further"
        raise UserError("run.init", got=config.run.init, wanted="random: before a backbone, not a policy", fix=fix)
    if stored and not config.model:
        assert init is not None
        adopt_policy(config, init, typed)
        return
    given = config.run.init
    config.run.init = None if init is None or stored else str(init)
    try:
        adopt_model(config)
    finally:
        config.run.init = given
    if config.model:
        from .large import find_start

        find_start(config)
        if stored:
            assert init is not None
            adopt_policy(config, init, typed)
        return
    joints, usual = config.conditioner.state_dim, PolicyModelConfig()
    for name in ("state_dim", "action_dim"):
        if (chosen := getattr(config.policy, name)) not in (joints, getattr(usual, name)):
            wanted, fix = f"{joints}, as conditioner.state_dim is", f"leave policy.{name} out"
            raise UserError(f"policy.{name}", got=chosen, wanted=wanted, fix=fix)
        setattr(config.policy, name, joints)


def initial_folder(config: TrainPolicyConfig) -> Path | None:
    """The folder that ``run.init`` names, also behind ``random:``; None where everything is drawn at the sizes of the config."""
    name = (config.run.init or "").removeprefix(RANDOM)
    if not name:
        return None
    return weights_root() / "worldmodel" if name == SHIPPED else Path(name)


def adopt_policy(config: TrainPolicyConfig, init: Path, typed: Collection[str] = ()) -> None:
    """Take the settings of the policy in ``init`` into the config and say so; ``UserError`` for one that was changed to something else, or
    ``typed``."""
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
        if mine != default or f"{prefix}{name}" in typed:
            fix = f"leave {prefix}{name} out, or begin from a world model"
            raise UserError(f"{prefix}{name}", got=mine, wanted=f"{theirs!r}, with which run.init was trained", fix=fix)
        print(f"{prefix}{name}={theirs} (from run.init; the default is {default})", file=sys.stderr, flush=True)
        setattr(chosen, name, theirs)
    if config.model:
        _adopt_text(config, info, typed)
        adopt_heads(config, init)
        return
    found = latents_fingerprint(Path(config.codec)) if config.codec else "none"
    if found != info.latents:
        fix = "codec=<the codec of that policy>"
        raise UserError("codec", got=f"latents {found}", wanted=f"latents {info.latents}, as run.init has", fix=fix)
    if extra["conditioner"] is not None:
        config.conditioner.lags = tuple(extra["conditioner"]["lags"])
    adopt_heads(config, init)


def _adopt_text(config: TrainPolicyConfig, info: PolicyInfo, typed: Collection[str]) -> None:
    """The length of sentences that the policy was trained with. ``UserError`` for one that puts words round them: windows have sentences as they
    stand in the data."""
    if (template := info.text.get("template", INSTRUCTION)) != INSTRUCTION:
        fix = f"physis convert again with template='{INSTRUCTION}': it then learns, and acts on, sentences as they stand in the data"
        wanted = f"no words round {INSTRUCTION}, which the windows of a training do not have"
        raise UserError("run.init: text.template", got=template, wanted=wanted, fix=fix)
    theirs, usual = int(info.text["tokens"]), TrainPolicyConfig().text_tokens
    if config.text_tokens != theirs and (config.text_tokens != usual or "text_tokens" in typed):
        fix = f"leave text_tokens out: it is {theirs}"
        raise UserError("text_tokens", got=config.text_tokens, wanted=f"{theirs}, as run.init has", fix=fix)
    if config.text_tokens != theirs:
        print(f"text_tokens={theirs} (from run.init; the default is {usual})", file=sys.stderr, flush=True)
    config.text_tokens = theirs


def prepare_policy_banks(
    config: TrainPolicyConfig, device: torch.device, episodes: list[Episode] | None = None, *, quiet: bool = False
) -> tuple[PolicyBank, PolicyBank | None]:
    """-> (training windows, held-out ones); statistics are those of the training episodes, or of the policy that is trained further. There may be
    no held-out ones with a large backbone."""
    data = config.data
    if config.model:
        return _large_banks(config, device, quiet=quiet)
    refuse_stores(data.latents)
    if data.heldout < 1:
        raise UserError("data.heldout", got=data.heldout, wanted="at least 1", fix="data.heldout=1")
    if episodes is None:
        episodes = read_episodes(
            data.roots, success_only=data.success_only, tasks=data.tasks, limit=data.limit, workers=data.workers,
            quiet=quiet,
        )  # fmt: skip
    codec, parts = load_codec(config.codec, device), split_heldout(episodes, data.heldout)
    stored = initial_statistics(config)
    statistics = stored if stored is not None else episode_statistics(parts[0], config.normalization)
    banks = []
    for part in parts:
        table = WindowTable.build([episode.length for episode in part], data.start_stride)
        bank = load_bank(config, part, table, codec, device)
        banks.append(PolicyBank.of(bank, part, statistics, config.policy.chunk))
    if not quiet:
        _tell_clamped(Recordings.of_windows(banks[0].bank, parts[0]), statistics)
    return banks[0], banks[1]


def _large_banks(
    config: TrainPolicyConfig, device: torch.device, *, quiet: bool
) -> tuple[PolicyBank, PolicyBank | None]:
    """Of latent stores, or of datasets that are encoded while the run trains. ``UserError`` where they are not what ``policy`` says."""
    data, physics = config.data, config.physics if config.physics.wanted else None
    if data.latents:
        banks: tuple[LatentBank, LatentBank | None] = open_stores(
            data.latents, data.heldout, device, physics, ahead=data.workers, tasks=data.tasks, quiet=quiet
        )
    else:
        banks = open_datasets(config, device, physics, quiet=quiet)
    for bank in banks:
        if bank is not None:
            bank.pad_sentences(config.text_tokens)
    stored = initial_statistics(config)
    more = {} if quiet else {"look": _tell_clamped}
    made, heldout = latent_banks(*banks, config.normalization, config.policy.chunk, stored, **more)
    if (init := initial_folder(config)) is not None and (init / SETTINGS).is_file():
        _check_windows(read_settings(init)[1], made)
    _check_sizes(config.policy, made)
    return made, heldout


def _check_windows(info: PolicyInfo, bank: PolicyBank) -> None:
    """``UserError`` for windows of another rate, or of other pictures, than the policy that is trained further on them has: its chunks would last
    another time, and its statistics be those of other motions."""
    assert isinstance(bank.bank, LatentBank) and bank.hz is not None
    rows = abs(bank.hz - info.control_hz) <= RATE_TOLERANCE * info.control_hz
    for name, fits, got, wanted in (
        ("rate", rows, f"{bank.hz:.4g} rows a second", f"{info.control_hz:.4g}"),
        ("stride", bank.stride == info.frame_stride, f"a picture every {bank.stride} rows", f"every {info.frame_stride}"),
        ("canvas", bank.bank.info.canvas == info.canvas, bank.bank.info.canvas, info.canvas),
    ):  # fmt: skip
        if not fits:
            fix = "data as that policy was trained on, or begin from a world model"
            raise UserError(f"{bank.bank.SETTING}: {name}", got=got, wanted=f"{wanted}, as run.init has", fix=fix)


def _check_sizes(policy: PolicyModelConfig, bank: PolicyBank) -> None:
    found = {
        "action_dim": bank.statistics.action.width,
        "state_dim": bank.statistics.state.width,
        "steps_per_latent": float(bank.stride * bank.time),
    }
    for name, value in found.items():
        if getattr(policy, name) != value:
            wanted, fix = f"{value}, as the windows have", f"policy.{name}={value}"
            raise UserError(f"policy.{name}", got=getattr(policy, name), wanted=wanted, fix=fix)


def _tell_clamped(recordings: Recordings, statistics: ActionStatistics) -> None:
    if (worst := recordings.saturated(statistics)) > 0:
        print(f"normalisation: up to {100 * worst:.2f} % of an episode's numbers are clamped", flush=True)


def initial_statistics(config: TrainPolicyConfig) -> ActionStatistics | None:
    """Those of the policy that is trained further: other ones would change what its numbers mean. None where a run begins with a world model."""
    init = initial_folder(config)
    if init is None or not (init / SETTINGS).is_file():
        return None
    return ActionStatistics.load(init, action_dim=config.policy.action_dim, state_dim=config.policy.state_dim)


def build_policy_model(config: TrainPolicyConfig) -> tuple[WorldActionModel, dict[str, Any]]:
    """-> (the policy, what was taken from where): as ``run.init`` has it, with an action expert beside its transformer, or drawn. Seed torch's
    global generator first."""
    init = initial_folder(config)
    if init is None:
        denoiser = build_denoiser(config.backbone, config.conditioner)
        conditioner = denoiser.conditioner if config.policy.proprioception == "backbone" else None
        made = WorldActionModel(denoiser.transformer, config.policy, tap=denoiser.tap, conditioner=conditioner)
        return made, {"video": {"from": "drawn", "weights": f"drawn, seed {config.run.seed}"}}
    if (init / SETTINGS).is_file():
        policy, info = load_policy(init)
        return policy.requires_grad_(True).train(), {
            "policy": tail(init),
            "fingerprint": fingerprint(init),
            **info.source,
        }
    if config.actions:
        wanted, fix = (
            "a text model: the video does not see actions",
            "give a model that was trained without actions=true",
        )
        raise UserError("run.init", got="an action model", wanted=wanted, fix=fix)
    policy, report = build_policy(config.run.init, config.policy, seed=config.run.seed, autoencoder=config.codec)
    return policy.train(), report


def freeze_video(model: WorldActionModel) -> None:
    """Only the action expert and the proprioception are trained."""
    expert = {name for name, _ in model.action_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in expert)


def packaged_source(config: TrainPolicyConfig) -> str:
    """Fingerprint of the packaged transformer where the run leaves it as it is, which then need not be written; else ""."""
    init = config.run.init or ""
    folder = None if init.startswith(RANDOM) or not config.freeze_video else initial_folder(config)
    if folder is None:
        return ""
    if (folder / SETTINGS).is_file():
        return read_settings(folder)[2]["packaged"] or ""
    found = packaged_backbone()
    return found if fingerprint(folder / TRANSFORMER) == found else ""


def heads_from(config: TrainPolicyConfig) -> TrainPolicyConfig:
    """The config that ``build_forcing`` makes the physics heads by: those of ``run.init``'s folder, or drawn, which is said, where its weights are."""
    init = config.run.init or ""
    folder = None if init.startswith(RANDOM) else initial_folder(config)
    if init and folder is None:
        print(f"physics heads are drawn: {init} has none", file=sys.stderr, flush=True)
    start = None if folder is None else str(folder)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, init=start))
