"""``physis train policy``: video and actions learnt together, by the trainer of the world model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from physisforcing.core.errors import UserError
from physisforcing.worldmodel.backbones.wan import build_denoiser, load_denoiser
from physisforcing.worldmodel.codec import load_codec
from physisforcing.worldmodel.data.batches import step_generator
from physisforcing.worldmodel.data.windows import (
    FRAME_STRIDE,
    WINDOW_FRAMES,
    WindowTable,
    read_episodes,
)
from physisforcing.worldmodel.physics.relation import token_order
from physisforcing.worldmodel.storage import fingerprint, latents_fingerprint
from physisforcing.worldmodel.text import ENCODER, MAX_TOKENS, TEXT_WIDTH
from physisforcing.worldmodel.training.banks import load_bank
from physisforcing.worldmodel.training.export import gathered
from physisforcing.worldmodel.training.initial import adopt_model
from physisforcing.worldmodel.training.modules import build_forcing
from physisforcing.worldmodel.training.objective import token_grid
from physisforcing.worldmodel.training.parallel import shard_block, shard_rest
from physisforcing.worldmodel.training.recompute import recomputed
from physisforcing.worldmodel.training.runtime import autocast, compiles, kernels_given_back, sharded, split_heldout
from physisforcing.worldmodel.training.steplog import StepLog
from physisforcing.worldmodel.training.trainer import Trainer
from physisforcing.worldmodel.training.worldmodel import run_training

from .checkpoint import SETTINGS, PolicyInfo, load_policy, read_settings, save_policy
from .model import WorldActionModel
from .normalization import ActionStatistics
from .objective import Drawn, draw, policy_losses
from .training_config import TrainPolicyConfig
from .windows import PolicyBank, episode_statistics

#: Windows of a held-out measurement that are computed at once.
HELDOUT_CHUNK = 8
#: Number of a training step that there is none of: its generator is that of held-out noise.
HELDOUT_STEP = 2**40


@kernels_given_back()
def train_policy(config: TrainPolicyConfig) -> Path:
    """Train and write checkpoints, metrics and the policy (``<out>/export``, averaged weights in float16). Returns the export folder; raises as
    ``train_world_model`` does."""
    adopt(config)
    return run_training(config, None, prepare_policy_banks, PolicyTrainer)


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
    stored, info, extra = read_settings(init)
    usual = TrainPolicyConfig().policy
    for item in dataclasses.fields(stored):
        mine, theirs = getattr(config.policy, item.name), getattr(stored, item.name)
        if mine not in (theirs, getattr(usual, item.name)):
            fix = f"leave policy.{item.name} out, or begin from a world model"
            raise UserError(
                f"policy.{item.name}", got=mine, wanted=f"{theirs!r}, with which run.init was trained", fix=fix
            )
    config.policy = stored
    found = latents_fingerprint(Path(config.codec)) if config.codec else "none"
    if found != info.latents:
        fix = "codec=<the codec of that policy>"
        raise UserError("codec", got=f"latents {found}", wanted=f"latents {info.latents}, as run.init has", fix=fix)
    if extra["conditioner"] is not None:
        config.conditioner.lags = tuple(extra["conditioner"]["lags"])


def prepare_policy_banks(
    config: TrainPolicyConfig, device: torch.device, *, quiet: bool = False
) -> tuple[PolicyBank, PolicyBank]:
    """-> (training windows, held-out ones); statistics are those of the training episodes, or of the policy that is trained further."""
    data = config.data
    if data.heldout < 1:
        raise UserError("data.heldout", got=data.heldout, wanted="at least 1", fix="data.heldout=1")
    episodes = read_episodes(
        data.roots, success_only=data.success_only, tasks=data.tasks, limit=data.limit, workers=data.workers
    )
    codec, parts = load_codec(config.codec, device), split_heldout(episodes, data.heldout)
    init = Path(config.run.init) if config.run.init else None
    if init is not None and (init / SETTINGS).is_file():
        sizes = {"action_dim": config.policy.action_dim, "state_dim": config.policy.state_dim}
        statistics = ActionStatistics.load(init, **sizes)
    else:
        statistics = episode_statistics(parts[0], config.normalization)
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


class PolicyTrainer(Trainer):
    """``Trainer`` of a world-action model: ``model["policy"]`` and, with physics losses, ``model["forcing"]``."""

    config: TrainPolicyConfig
    bank: PolicyBank  # type: ignore[assignment]

    @property
    def policy(self) -> WorldActionModel:
        return self.model["policy"]  # type: ignore[return-value]

    def modules(self) -> nn.ModuleDict:
        config = self.config
        policy = build_policy_model(config)
        if not config.run.init and config.policy.proprioception == "backbone":
            policy.proprioception.set_statistics(self.bank.bank.proprioception_WKA.cpu())  # type: ignore[operator]
        if config.freeze_video:
            expert = {id(parameter) for _, parameter in policy.action_parameters()}
            for parameter in policy.parameters():
                parameter.requires_grad_(id(parameter) in expert)
        modules: dict[str, nn.Module] = {"policy": policy}
        if config.physics.wanted and (heads := build_forcing(config, self.bank.bank, policy.width)) is not None:
            modules["forcing"] = heads
        made = nn.ModuleDict(modules).to(self.device).train()
        self._prepare(policy)
        return made

    def _prepare(self, policy: WorldActionModel) -> None:
        run = self.config.run
        if compiles(run):
            for block in policy.blocks:
                block.compile(dynamic=False)
        policy.run_block = recomputed(policy.run_block, run.checkpointing, compiles(run))
        if sharded(self.config, self.processes):
            for block in policy.blocks:
                shard_block(block, self.processes)
            # called outside the model's forward pass, where nothing would put its shards together
            shard_rest(policy, [policy.proprioception], self.processes)

    def rates(self) -> list[tuple[float, Iterable[nn.Parameter]]]:
        expert = [parameter for _, parameter in self.policy.action_parameters()]
        return [*super().rates(), (self.config.action_rate, expert)]

    def draw(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Any, ...]:
        whole = self.config.run.batch, *batch["latents_BCFhw"].shape[1:]
        drawn = draw(whole, self.config.policy, generator)
        order = token_order(whole[0], self._tokens(whole), generator)
        return tuple(value if value is None else value[self.part] for value in (*drawn, order))

    def _tokens(self, shape: tuple[int, ...]) -> int:
        frames, rows, columns = token_grid(shape, self.policy.patch)
        return frames * rows * columns

    def counts(self, batch: dict[str, Any], parts: int) -> Tensor | None:
        if self.forcing is None or batch["targets"] is None:
            return None
        points = self.forcing.counts(batch["targets"], token_grid(batch["latents_BCFhw"].shape, self.policy.patch))
        return torch.tensor(self.processes.total(points.tolist()), device=self.device) / parts

    def terms(self, batch: dict[str, Any], drawn: tuple[Any, ...], counts: Tensor | None) -> dict[str, Tensor]:
        noise, order = Drawn(*drawn[:-1]), drawn[-1]
        physics = self.forcing is not None and batch["targets"] is not None
        with autocast(self.config.run, self.device):
            terms, tapped = policy_losses(
                self.policy, batch, noise, video_weight=self.config.video_weight, need_tap=physics
            )
        if physics:
            assert tapped is not None and self.forcing is not None
            self.forcing.watch(tapped)
            grid = token_grid(batch["latents_BCFhw"].shape, self.policy.patch)
            out = self.forcing(tapped, grid, batch["targets"], order, sigma_B=noise.sigma_B, counts_2=counts)
            terms["loss"] = terms["loss"] + out.loss
            terms |= {"pix": out.pix, "sem": out.sem, **out.metrics}
        return terms

    @torch.no_grad()
    def heldout(self, bank: Any) -> dict[str, float]:
        """Means of the two losses over fixed windows at fixed noise, ``heldout_action`` and ``heldout_video``, by the averaged weights."""
        rows = torch.arange(len(bank))
        rows = rows[torch.linspace(0, len(rows) - 1, min(self.config.heldout_windows, len(rows))).long()]
        shape = bank.latent_shape(rows)
        drawn = draw(shape, self.config.policy, step_generator(0, HELDOUT_STEP))
        sums: dict[str, float] = {}
        with self.averaged():
            for part in torch.arange(len(rows)).split(HELDOUT_CHUNK):
                some = Drawn(*(value if value is None else value[part].to(self.device) for value in drawn))
                terms, _ = policy_losses(self.policy, bank.batch(rows[part]), some)
                for name in ("action", "video"):
                    sums[name] = sums.get(name, 0.0) + float(terms[name]) * len(part) / len(rows)
        return {f"heldout_{name}": value for name, value in sums.items()}

    def show(self, bank: Any, done: int, log: StepLog) -> None:
        """Nothing: what a policy does is seen in the simulator."""

    def export(self, folder: Path, *, checkpoint: bool = False) -> None:
        state = gathered(self.policy, self.processes) if self.processes.many else self.policy.state_dict()
        if not self.processes.first:
            return
        save_policy(folder, self.policy, self.info(), None if checkpoint else torch.float16, state=state)
        self.bank.statistics.save(folder)
        if self.forcing is not None:
            from physisforcing.worldmodel.model import save_heads

            save_heads(self.forcing, folder, None if checkpoint else torch.float16)

    def info(self) -> PolicyInfo:
        """What belongs to the policy beside its weights."""
        config, init = self.config, self.config.run.init
        source = {"backbone": Path(init).name if init else "drawn", "video_weight": config.video_weight}
        source["fingerprint"] = fingerprint(Path(init)) if init else ""
        return PolicyInfo(
            frames=WINDOW_FRAMES,
            frame_stride=FRAME_STRIDE,
            text={"encoder": ENCODER, "tokens": MAX_TOKENS, "width": TEXT_WIDTH},
            latents=latents_fingerprint(Path(config.codec)),
            autoencoder=Path(config.codec).name,
            source=source,
            tasks=tuple(config.data.tasks),
        )

    def flops(self, shape: Any) -> float:
        """Not counted yet: 0 leaves the share of the peak out of the log."""
        return 0.0
