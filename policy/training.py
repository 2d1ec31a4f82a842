"""``physis train policy``: video and actions learnt together, by the trainer of the world model."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from physisforcing.core.errors import UserError
from physisforcing.core.types import FPS
from physisforcing.worldmodel.data.latent_bank import LatentBank
from physisforcing.worldmodel.data.windows import FRAME_STRIDE, WINDOW_FRAMES
from physisforcing.worldmodel.physics.relation import token_order
from physisforcing.worldmodel.storage import latents_fingerprint
from physisforcing.worldmodel.text import ENCODER, MAX_TOKENS, TEXT_WIDTH
from physisforcing.worldmodel.training.evaluate import Measured, measure_windows
from physisforcing.worldmodel.training.export import gathered
from physisforcing.worldmodel.training.modules import build_forcing
from physisforcing.worldmodel.training.objective import token_grid
from physisforcing.worldmodel.training.parallel import shard_block, shard_rest
from physisforcing.worldmodel.training.recompute import recomputed
from physisforcing.worldmodel.training.runtime import autocast, compiles, kernels_given_back, sharded
from physisforcing.worldmodel.training.steplog import StepLog
from physisforcing.worldmodel.training.trainer import Trainer
from physisforcing.worldmodel.training.worldmodel import run_training

from .checkpoint import PolicyInfo, save_policy
from .flops import step_flops
from .initial import TABLE
from .model import WorldActionModel
from .normalization import ActionStatistics
from .objective import Drawn, draw, policy_losses
from .training_config import TrainPolicyConfig
from .training_start import adopt, build_policy_model, freeze_video, heads_from, packaged_source, prepare_policy_banks
from .windows import PolicyBank, large_info

#: Windows of a held-out measurement that are computed at once.
HELDOUT_CHUNK = 8


@kernels_given_back()
def train_policy(
    config: TrainPolicyConfig, banks: tuple[PolicyBank, PolicyBank] | None = None, *, typed: Collection[str] = ()
) -> Path:
    """Train and write checkpoints, metrics and the policy (``<out>/export``, averaged weights in float16). Returns the export folder; raises as
    ``train_world_model`` does. ``typed``: see ``adopt``."""
    adopt(config, typed)
    return run_training(config, banks, prepare_policy_banks, PolicyTrainer)


class PolicyTrainer(Trainer):
    """``Trainer`` of a world-action model: ``model["policy"]`` and, with physics losses, ``model["forcing"]``."""

    config: TrainPolicyConfig
    bank: PolicyBank  # type: ignore[assignment]

    def __init__(self, *given: Any, **named: Any) -> None:
        # what autocast leaves in float32 (times, action latents, their layers) is multiplied in float32, not in TF32, where a policy acts
        torch.set_float32_matmul_precision("highest")
        super().__init__(*given, **named)

    @property
    def policy(self) -> WorldActionModel:
        return self.model["policy"]  # type: ignore[return-value]

    def modules(self) -> nn.ModuleDict:
        config = self.config
        if config.model:
            return self._large_modules()
        policy, self.source = build_policy_model(config)
        if not config.run.init and config.policy.proprioception == "backbone":
            policy.proprioception.set_statistics(self.bank.bank.proprioception_WKA.cpu())  # type: ignore[operator]
        if config.freeze_video:
            freeze_video(policy)
        made = nn.ModuleDict({"policy": policy, **self._heads(policy)}).to(self.device).train()
        self._prepare(policy)
        if self._spread:
            for block in policy.blocks:
                shard_block(block, self.processes)
            # called outside the model's forward pass, where nothing would put its shards together
            shard_rest(policy, [policy.proprioception], self.processes)
        return made

    def _large_modules(self) -> nn.ModuleDict:
        from .large import large_policy

        bank = self.bank.bank
        assert isinstance(bank, LatentBank)
        policy, self.source = large_policy(self.config, bank.info, self.processes, self._prepare, spread=self._spread)
        heads = {name: module.to(self.device) for name, module in self._heads(policy).items()}
        return nn.ModuleDict({"policy": policy, **heads}).train()

    def _heads(self, policy: WorldActionModel) -> dict[str, nn.Module]:
        """``forcing`` where there are physics losses."""
        config = self.config
        if not config.physics.wanted:
            return {}
        heads = build_forcing(heads_from(config), self.bank.bank, policy.width)
        return {} if heads is None else {"forcing": heads}

    @property
    def noted(self) -> dict[str, Any]:
        """See ``Trainer``; a policy's first latent is always the clean picture of now."""
        return {"large.tap": self.policy.tap} if self.config.model else {}

    @property
    def _spread(self) -> bool:
        """Whether the weights are spread over the processes. Frozen ones have no gradients and states to spread: ``auto`` leaves them whole."""
        whole = self.config.freeze_video and self.config.run.sharding == "auto"
        return sharded(self.config, self.processes) and not whole

    def _prepare(self, policy: WorldActionModel) -> None:
        """Blocks that are compiled or computed again; before they have weights where these are read a block at a time."""
        run = self.config.run
        if compiles(run):
            for block in policy.blocks:
                block.compile(dynamic=False)
        policy.run_block = recomputed(policy.run_block, run.checkpointing, compiles(run))

    def rates(self) -> list[tuple[float, Iterable[nn.Parameter]]]:
        expert = [parameter for _, parameter in self.policy.action_parameters()]
        return [*super().rates(), (self.config.action_rate, expert)]

    def undecayed(self) -> list[nn.Parameter]:
        """The modulation tables: they are added to what they modulate."""
        return [parameter for name, parameter in self.policy.named_parameters() if name.endswith(TABLE)]

    def draw(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Any, ...]:
        drawn = self._drawn((self.config.run.batch, *batch["latents_BCFhw"].shape[1:]), generator)
        return tuple(value if value is None else value[self.part] for value in drawn)

    def _drawn(self, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Any, ...]:
        """Of a batch of this shape: ``objective.Drawn``, and the order of the tokens."""
        tokens = math.prod(token_grid(shape, self.policy.patch))
        return *draw(shape, self.config.policy, generator), token_order(shape[0], tokens, generator)

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
        """Means of the losses over fixed windows at fixed noise by the averaged weights: ``heldout_action``, ``heldout_video``, and with physics
        losses theirs, for which windows that have targets are chosen."""
        chunk = 1 if self.config.model else HELDOUT_CHUNK
        with self.averaged():
            found = measure_windows(
                bank, self._drawn, self._measured,
                windows=self.config.heldout_windows, chunk=chunk, physics=self.forcing is not None,
            )  # fmt: skip
        return {f"heldout_{name}": value for name, value in found.mean().items()}

    def _measured(self, batch: dict[str, Any], drawn: tuple[Any, ...]) -> list[Measured]:
        """The losses of a batch."""
        physics = self.forcing is not None and batch["targets"] is not None
        terms, tapped = policy_losses(self.policy, batch, Drawn(*drawn[:-1]), need_tap=physics)
        count = float(len(batch["latents_BCFhw"]))
        found = [(name, float(terms[name]), count) for name in ("action", "video")]
        if physics:
            assert tapped is not None and self.forcing is not None
            grid = token_grid(batch["latents_BCFhw"].shape, self.policy.patch)
            out = self.forcing(tapped, grid, batch["targets"], drawn[-1], sigma_B=drawn[1])
            found += [
                ("pix", float(out.pix), float(out.metrics["pairs"])),
                ("sem", float(out.sem), float(out.metrics["related"])),
            ]
        return found

    def show(self, bank: Any, done: int, log: StepLog) -> None:
        """Nothing: what a policy does is seen in the simulator."""

    def restore(self, checkpoint: Path) -> int:
        """See ``Trainer``; also ``UserError`` where statistics are others, as they are where episodes were added to a dataset."""
        sizes = {"action_dim": self.config.policy.action_dim, "state_dim": self.config.policy.state_dim}
        stored, mine = ActionStatistics.load(checkpoint / "model", **sizes), self.bank.statistics
        if (got := mine.difference(stored)) is not None:
            wanted = "the statistics that the run began with"
            fix = "give the episodes that it began with, or begin another run with run.init=<its last policy>"
            name = "data.latents" if self.config.data.latents else "data.roots"
            raise UserError(name, got=got, wanted=wanted, fix=fix)
        return super().restore(checkpoint)

    def export(self, folder: Path, *, checkpoint: bool = False) -> None:
        """See ``Trainer``; a policy on a large backbone is stored in bfloat16."""
        if self.config.model:
            from .large_export import export_large

            export_large(folder, self.policy, self.info(), self.bank.statistics, self.forcing, self.processes)
            return
        state = gathered(self.policy, self.processes) if self.processes.many else self.policy.state_dict()
        if not self.processes.first:
            return
        dtype, packaged = None if checkpoint else torch.float16, packaged_source(self.config)
        save_policy(folder, self.policy, self.info(), dtype, state=state, packaged=packaged)
        self.bank.statistics.save(folder)
        if self.forcing is not None:
            from physisforcing.worldmodel.model import save_heads

            save_heads(self.forcing, folder, None if checkpoint else torch.float16)

    def info(self) -> PolicyInfo:
        """What belongs to the policy beside its weights."""
        config = self.config
        source = {**self.source, "video_weight": config.video_weight, "video_trained": not config.freeze_video}
        if config.model:
            return large_info(config, self.bank, source)
        return PolicyInfo(
            frames=WINDOW_FRAMES,
            frame_stride=FRAME_STRIDE,
            text={"encoder": ENCODER, "tokens": MAX_TOKENS, "width": TEXT_WIDTH},
            latents=latents_fingerprint(Path(config.codec)),
            autoencoder=Path(config.codec).name,
            control_hz=FPS,
            source=source,
            tasks=tuple(config.data.tasks),
        )

    def flops(self, shape: Sequence[int]) -> float:
        """Floating-point operations of an update of a batch [B,C,F,h,w] (``flops.step_flops``)."""
        one = tuple(shape[1:])
        if one not in self._sample_flops:
            read = {"video": self.config.video_weight > 0, "tap": self.forcing is not None}
            self._sample_flops[one] = step_flops(self.policy, shape, self.bank.text_tokens, **read)
        return shape[0] * self._sample_flops[one]
