"""Policies on large backbones as the trainer takes them: built without memory, filled and sharded a block at a time.

Weights that are trained are float32; frozen matrices are bfloat16 where the blocks compute in it. A policy lies whole in no process that
shares it: each block gets its video weights from disk (or draws them), then its action expert's, goes to the device and is sharded before
the next one is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from physisforcing.core.errors import UserError
from physisforcing.worldmodel.backbones.loading import Weights, build_empty, check_entries, file_entries
from physisforcing.worldmodel.backbones.loading import read_transformer as read_config
from physisforcing.worldmodel.data.latent_shards import StoreInfo
from physisforcing.worldmodel.storage import fingerprint
from physisforcing.worldmodel.training.modules import base_precision
from physisforcing.worldmodel.training.parallel import shard_block, shard_rest
from physisforcing.worldmodel.training.processes import Processes

from .backbone import RANDOM, Backbone, check_latents, open_backbone, tail, video_account
from .checkpoint import EXPERT, SETTINGS, expert_state, place_expert, read_settings, transformer_folder
from .config import PolicyModelConfig
from .initial import TABLE, interpolate
from .model import EXACT, WorldActionModel
from .training_config import TrainPolicyConfig
from .training_start import freeze_video


@dataclass(slots=True, kw_only=True)
class Start:
    """What a run begins with. ``transformer``: the folder of the video's weights, None where they are drawn; ``config``: arguments of
    ``WanTransformer3DModel``; ``expert``: the file of a policy's action expert, None for a new one; ``told``: what was taken from where."""

    transformer: Path | None
    config: dict[str, Any]
    tap: int | None
    expert: Path | None
    told: dict[str, Any]


def find_start(config: TrainPolicyConfig, latents: str = "") -> Start:
    """What ``run.init`` names, or the transformer of ``model``. ``latents``: fingerprint of those in the windows, "" where there are none yet.
    Headers alone are read. ``UserError`` as ``open_backbone``, and for a backbone or policy of another autoencoder's latents."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    if config.large.first_latent not in (None, "pinned"):
        wanted = "pinned: a policy's first latent frame is the clean picture of now"
        raise UserError("large.first_latent", got=config.large.first_latent, wanted=wanted, fix="leave it out")
    init = (config.run.init or "").removeprefix(RANDOM)
    if init and (Path(init) / SETTINGS).is_file():
        folder = Path(init)
        _, info, extra = read_settings(folder)
        if latents and latents != info.latents:
            wanted = f"latents {info.latents}, as run.init has"
            fix = "physis data latents with the model= of that policy"
            raise UserError("data.latents", got=f"latents {latents}", wanted=wanted, fix=fix)
        video = transformer_folder(folder, extra["packaged"] or "")
        told = {"policy": tail(folder), "fingerprint": fingerprint(folder), **info.source}
        shape = read_config(video, WanTransformer3DModel)
        return Start(transformer=video, config=shape, tap=extra["tap"], expert=folder / EXPERT, told=told)
    backbone: Backbone = open_backbone(config.run.init or config.model)
    if backbone.conditioner is not None:
        wanted, fix = "a large backbone beside model=", "leave model out, and give codec= and data.roots"
        raise UserError("run.init", got=f"the small model {backbone.name}", wanted=wanted, fix=fix)
    if latents:
        check_latents(latents, backbone, "data.latents")
    tap = config.large.tap if config.large.tap is not None else backbone.tap
    drawn = f"drawn, seed {config.run.seed}"
    told = {
        "video": {
            "from": backbone.name,
            **video_account(backbone),
            "tap": tap,
            "weights": drawn if backbone.drawn else "taken",
        },
        "action_expert": {"from": "the video's, resized" if config.policy.initial == "interpolated" else drawn},
        "proprioception": {"from": drawn},
    }
    folder = None if backbone.drawn else backbone.folder
    return Start(transformer=folder, config=backbone.config, tap=tap, expert=None, told=told)


def large_policy(
    config: TrainPolicyConfig,
    info: StoreInfo,
    processes: Processes,
    prepare: Callable[[WorldActionModel], None],
    *,
    spread: bool,
) -> tuple[WorldActionModel, dict[str, Any]]:
    """-> (the policy on its device, trainable, what was taken from where). Draws from torch's global generators; what is drawn of the video
    is drawn on the device. ``prepare``: what is done to the blocks before they have weights. ``spread``: over the processes. ``UserError``
    as ``find_start``, and for windows that the backbone does not read."""
    start = find_start(config, info.latents)
    if config.policy.proprioception != "linear":
        fix = "policy.proprioception=linear, as the recipes for large backbones have"
        raise UserError("policy.proprioception", got=config.policy.proprioception, wanted="linear with model=", fix=fix)
    if int(start.config.get("in_channels", 16)) != info.channels:
        wanted = f"{start.config.get('in_channels', 16)}, as the backbone has"
        fix = "physis data latents with the model= of this run"
        raise UserError("data.latents: channels", got=info.channels, wanted=wanted, fix=fix)
    filling = _Filling.begin(config, start, processes.device, base=None if spread else _base(config, processes))
    prepare(filling.model)
    for index, block in enumerate(filling.model.blocks):
        filling.fill(f"transformer.blocks.{index}.")
        if spread:
            shard_block(block, processes)
    filling.fill("")
    if spread:
        # called outside the model's forward pass, where nothing would put its shards together
        shard_rest(filling.model, [filling.model.proprioception], processes)
    return filling.model.train(), start.told


def _base(config: TrainPolicyConfig, processes: Processes) -> torch.dtype | None:
    """The type of frozen matrices."""
    return base_precision(config, processes.device) if config.freeze_video else None


@dataclass(slots=True, kw_only=True)
class _Filling:
    """A model that gets its weights by the beginnings of their names; ``fill`` of a block first, of "" last."""

    model: WorldActionModel
    start: Start
    settings: PolicyModelConfig
    device: torch.device
    base: torch.dtype
    weights: Weights | None

    @classmethod
    def begin(cls, config: TrainPolicyConfig, start: Start, device: torch.device, base: torch.dtype | None) -> _Filling:
        from accelerate import init_empty_weights
        from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

        base = torch.float32 if base is None else base
        transformer = build_empty(WanTransformer3DModel, start.config)
        # looked at before the action expert's blocks are inside
        weights = None if start.transformer is None else Weights(transformer, start.transformer, base)
        with init_empty_weights(include_buffers=False):
            made = dataclasses.replace(config.policy, initial="random")  # filled below, whatever it is
            model = WorldActionModel(transformer, made, tap=start.tap)
        model.config = config.policy
        if config.freeze_video:
            freeze_video(model)
        if start.expert is not None:
            wanted = {name: tuple(value.shape) for name, value in expert_state(model.state_dict()).items()}
            check_entries(file_entries(start.expert), wanted, start.expert)
        return cls(model=model, start=start, settings=config.policy, device=device, base=base, weights=weights)

    def fill(self, prefix: str) -> None:
        """All weights whose names begin with ``prefix`` and that have none yet."""
        self._fill_video(prefix)
        self._fill_expert(prefix)
        if not prefix:
            for module in self.model.modules():
                module._buffers.update({k: b if b is None else b.to(self.device) for k, b in module._buffers.items()})
        left = [name for name, value in self.model.named_parameters() if value.is_meta and name.startswith(prefix)]
        assert not left, f"{left[0]} has no weights"

    def _fill_video(self, prefix: str) -> None:
        inner = prefix.removeprefix("transformer.")
        if self.weights is not None:
            blocks = "blocks." if not inner else None
            self.weights.place(
                self.device,
                lambda name: name.startswith(inner) and not (blocks and name.startswith(blocks)),
                exact=self._exact,
            )
            return
        mine = self._meta(prefix, expert=False)
        draw_empty(self.model, mine, self.device)
        if not inner:
            for parameter in self.model.transformer.proj_out.parameters():
                nn.init.zeros_(parameter)
        for name in mine:
            value = self.model.get_parameter(name)
            if not self._exact(name.removeprefix("transformer.")):
                value.data = value.data.to(self.base)

    def _exact(self, name: str) -> bool:
        """Whether a weight of the transformer is float32 whatever the frozen matrices are: it is trained, or no matrix product's."""
        full = f"transformer.{name}"
        holder = self.model.get_submodule(full.rpartition(".")[0])
        if self.model.get_parameter(full).requires_grad or not isinstance(holder, nn.Linear | nn.Conv3d):
            return True
        return full.startswith(tuple(f"{one}." for one in EXACT))

    def _fill_expert(self, prefix: str) -> None:
        mine = self._meta(prefix, expert=True)
        if self.start.expert is not None:
            place_expert(self.model, self.start.expert, self.device, torch.float32, mine)
            return
        # of a few layers and, with initial=random, of all
        draw_empty(self.model, mine, self.device)
        if not prefix:
            self._fresh_head()
        if self.settings.initial != "interpolated":
            return
        video = self.model.transformer
        module: Any = self.model.expert
        if prefix:
            video = self.model.get_submodule(prefix.removesuffix("."))
            module = video.action
        own = {name: value for name, value in video.named_parameters() if ".action." not in f".{name}"}
        if not prefix:
            own = {name: value for name, value in own.items() if not name.startswith("blocks.")}
        interpolate(module, own, published=self.settings.published_initial)

    def _fresh_head(self) -> None:
        if self.model.expert.modulated:
            for parameter in self.model.expert.proj_out.parameters():
                nn.init.zeros_(parameter)

    def _meta(self, prefix: str, *, expert: bool) -> list[str]:
        """Names of the parameters without values that belong to the expert (or the video) and begin with ``prefix``."""
        empty = {name: p for name, p in self.model.named_parameters() if p.is_meta and name.startswith(prefix)}
        theirs = expert_state(empty)
        return [name for name in empty if (name in theirs) == expert]


@torch.no_grad()
def draw_empty(model: nn.Module, names: list[str], device: torch.device) -> None:
    """Values for parameters without any, as their classes draw them, on ``device`` in float32: the layers' own ``reset_parameters``, and for
    modulation tables what diffusers does. A layer has all its parameters in ``names`` or none."""
    holders = {name.rpartition(".")[0]: None for name in names}
    for path in holders:
        holder = model.get_submodule(path)
        for leaf, old in holder._parameters.items():
            if old is not None and old.is_meta:
                value = torch.empty_like(old, device=device, dtype=torch.float32)
                holder._parameters[leaf] = nn.Parameter(value, requires_grad=old.requires_grad)
        if hasattr(holder, "reset_parameters"):
            holder.reset_parameters()
            continue
        (table,) = holder._parameters
        assert table == TABLE, f"{path} has no way to draw {table}"
        value = holder._parameters[table]
        assert value is not None
        value.normal_(std=value.shape[-1] ** -0.5)
