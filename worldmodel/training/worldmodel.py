"""``physis train worldmodel``: PhysisForcing training of the video transformer on latents that are resident on the device."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from physisforcing.core.errors import UserError

from ..backbones.actions import ActionConfig
from ..backbones.wan import WanDenoiser, build_denoiser, load_denoiser
from ..codec import VideoCodec, load_codec
from ..data.batches import BankTargets, OnlineTargets, WindowBank, WindowSampler, build_bank, step_generator
from ..data.windows import Episode, FrameStore, WindowTable, read_episodes
from ..model import load_heads, save_world_model
from ..physics.forcing import PhysisForcing
from ..storage import latents_fingerprint
from ..teachers.online import OnlineTeachers
from ..teachers.selection import Teachers
from .checkpoint import binding_settings, restore_training, save_checkpoint, training_tensors
from .config import TrainWorldModelConfig
from .evaluate import heldout_losses
from .initial import adopt_world_model
from .objective import draw_noise, objective, without_text
from .optim import WeightAverage, build_optimizer, learning_rate, set_learning_rate
from .pictures import heldout_pictures
from .runtime import autocast, begin_run, compiles, split_heldout
from .steplog import StepLog


def prepare_banks(
    config: TrainWorldModelConfig, device: torch.device, episodes: list[Episode] | None = None
) -> tuple[WindowBank, WindowBank]:
    """-> (training windows, held-out windows): latents, conditions and physics targets on ``device``.

    With ``run.init`` the sizes in ``config`` become those of that model first (``adopt_world_model``).
    """
    adopt_world_model(config)
    data = config.data
    if data.heldout < 1:
        wanted = "at least 1: the run measures its losses on held-out episodes"
        raise UserError("data.heldout", got=data.heldout, wanted=wanted, fix="data.heldout=1")
    if episodes is None:
        episodes = read_episodes(
            data.roots, success_only=data.success_only, tasks=data.tasks, limit=data.limit, workers=data.workers
        )
    codec = load_codec(config.codec, device)
    banks = []
    for part in split_heldout(episodes, data.heldout):
        table = WindowTable.build([episode.length for episode in part], data.start_stride)
        banks.append(load_bank(config, part, table, codec, device))
    return banks[0], banks[1]


def load_bank(
    config: TrainWorldModelConfig, episodes: list[Episode], table: WindowTable, codec: VideoCodec, device: torch.device
) -> WindowBank:
    """Latents, conditions and, with physics losses, targets of the windows of ``table``."""
    data = config.data
    cache = Path(data.text_cache) if data.text_cache else None
    store = FrameStore.build(episodes, device)
    bank = build_bank(store, table, codec, config.conditioner.lags, text_cache=cache)
    if config.physics.lambda_pix == 0 and config.physics.lambda_sem == 0:
        return bank
    if data.targets == "online":
        teachers = OnlineTeachers(Teachers(config.teacher, str(device)), config.physics)
        rows = {"episode_W": table.episode_W.to(device), "start_W": table.start_W.to(device)}
        grid = tuple(bank.latents_WCFhw.shape[2:])
        bank.targets = OnlineTargets(store=store, **rows, teachers=teachers, grid=grid)  # type: ignore[arg-type]
    else:
        options = {"teachers": config.teacher, "cache": data.targets_cache, "workers": data.workers}
        bank.targets = BankTargets.load(episodes, table, config.physics, device, **options)  # type: ignore[arg-type]
    return bank


class Trainer:
    """Model, heads, optimiser and average of one run; ``step`` makes one update. Random numbers depend on (seed, step) only."""

    def __init__(self, config: TrainWorldModelConfig, bank: WindowBank, device: torch.device) -> None:
        self.config, self.bank, self.device = config, bank, device
        assert bank.proprioception_WKA.shape[1] == len(config.conditioner.lags), "windows of another conditioner"
        torch.manual_seed(config.run.seed)
        self.model = nn.ModuleDict(build_modules(config, bank)).to(device).train()
        if compiles(config.run):
            self.denoiser.compile_blocks()
        self.optimizer = build_optimizer(self.model.parameters(), config.optim)
        self.average = WeightAverage(self.model, config.optim.ema)
        self.sampler = WindowSampler.build(bank.table, config.data.start_fraction, config.data.end_fraction)
        self.wait_s = 0.0
        #: The held-out window whose pictures are shown, once it is chosen.
        self.shown: Tensor | None = None

    @property
    def denoiser(self) -> WanDenoiser:
        return self.model["denoiser"]  # type: ignore[return-value]

    @property
    def forcing(self) -> PhysisForcing | None:
        return self.model["forcing"] if "forcing" in self.model else None  # type: ignore[return-value]

    def batch(self, step: int) -> dict[str, Any]:
        """The batch of a step, a function of (seed, step)."""
        rows = self.sampler.draw(self.config.run.batch, step_generator(self.config.run.seed, step))
        if self.device.type == "cuda":
            rows = rows.pin_memory()
        return self.bank.batch(rows.to(self.device, non_blocking=True))

    def step(self, step: int) -> dict[str, Tensor]:
        """Update number ``step`` (from 0). Returns loss terms and gradient norm as device scalars.

        Gradient shares of the physics losses are measured at the steps whose line is logged.
        """
        begun = time.perf_counter()
        if self.forcing is not None:
            self.forcing.measure = (step + 1) % self.config.run.log_every == 0
        batch = self.batch(step)
        generator = step_generator(self.config.run.seed + 1, step, self.device)
        drawn = draw_noise(batch["latents_BCFhw"], self.config.flow, generator)
        if self.config.text_dropout > 0:
            batch["text_BLD"] = without_text(batch["text_BLD"], self.config.text_dropout, generator)
        self.wait_s = time.perf_counter() - begun
        set_learning_rate(self.optimizer, learning_rate(self.config.optim, step, self.config.run.steps))
        terms = objective(
            self.denoiser, self.forcing, batch, drawn, self.config.flow, autocast(self.config.run, self.device)
        )
        terms["loss"].backward()
        if self.forcing is not None and self.forcing.measures:
            terms |= self.forcing.shares()
        terms["grad_norm"] = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(step)
        return {name: value.detach() for name, value in terms.items()}

    def heldout(self, bank: WindowBank) -> dict[str, float]:
        """Held-out values of the averaged weights."""
        self.average.swap()
        values = heldout_losses(
            self.denoiser, self.forcing, bank, self.config.flow, windows=self.config.heldout_windows
        )
        self.average.swap()
        return {f"heldout_{name}": value for name, value in values.items()}

    def save(self, run: Path, done: int) -> Path:
        def write_model(folder: Path) -> None:
            self.average.swap()
            self.export(folder, dtype=None)
            self.average.swap()

        tensors = training_tensors(self.model, self.average, self.optimizer, self.device)
        state = {"settings": binding_settings(self.config), "teachers": self.teachers}
        return save_checkpoint(run, done, write_model, tensors, state)

    @property
    def teachers(self) -> dict[str, Any] | None:
        """Who made the targets: name, version, licence and checksum of each teacher."""
        return None if self.bank.targets is None else self.bank.targets.identity

    def restore(self, checkpoint: Path) -> int:
        """Continue from a checkpoint, bit-exactly; returns the number of updates it holds. ``UserError`` where the targets are of
        other teachers, whose settings may look the same."""
        began = json.loads((checkpoint / "training" / "state.json").read_text()).get("teachers", self.teachers)
        if began != self.teachers:
            fix = "give the weights that the run began with (teacher.*.path), or begin another run"
            raise UserError("teacher", got=str(self.teachers), wanted=str(began), fix=fix)
        return restore_training(checkpoint, self.model, self.average, self.optimizer, self.device)

    def export(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Write the live weights as a world-model folder."""
        firsts = self.bank.proprioception_WKA[self.bank.table.start_W.to(self.device) == 0, 0]
        save_world_model(
            folder,
            self.denoiser,
            self.forcing,
            sample_shift=self.config.flow.sample_shift,
            latents_fingerprint=latents_fingerprint(Path(self.config.codec)),
            home_state=firsts.median(0).values.tolist(),
            dtype=dtype,
        )

    def flops(self) -> float:
        """Floating-point operations of one update: 6 a parameter and token, and attention (forward once, backward twice)."""
        config, shape = self.config.backbone, self.bank.latents_WCFhw.shape
        tokens = shape[2] * shape[3] * shape[4]
        dense = sum(p.numel() for p in self.denoiser.transformer.blocks.parameters())
        attention = config.num_layers * 4 * tokens * tokens * config.dim
        return self.config.run.batch * 3.0 * (2.0 * dense * tokens + attention)


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


def train_world_model(config: TrainWorldModelConfig, banks: tuple[WindowBank, WindowBank] | None = None) -> Path:
    """Train and write checkpoints, metrics and the exported model (``<out>/export``, float16, averaged weights).

    ``heldout.json`` in the run folder holds the held-out values before and after. Returns the export folder.
    """
    adopt_world_model(config)
    run, device, found = begin_run(config)
    bank, heldout = banks if banks is not None else prepare_banks(config, device)
    trainer = Trainer(config, bank, device)
    first = trainer.restore(found) if found is not None else 0
    log = StepLog(run, config.run.steps, config.run.batch, trainer.flops(), device, done=first)
    report = run / "heldout.json"
    if first == 0:
        before = trainer.heldout(heldout)
        report.write_text(json.dumps({"before": before}, indent=2) + "\n")
        log.event({"step": 0, **before})
        heldout_pictures(trainer, heldout, 0, log)
    for step in range(first, config.run.steps):
        terms = trainer.step(step)
        log.add(terms, trainer.wait_s)
        done = step + 1
        last = done == config.run.steps
        if done % config.run.log_every == 0 or last:
            log.line(done, trainer.optimizer.param_groups[0]["lr"])
        if done % config.run.eval_every == 0 or last:
            values = trainer.heldout(heldout)
            log.event({"step": done, **values})
            heldout_pictures(trainer, heldout, done, log)
            if last:
                record = json.loads(report.read_text()) if report.is_file() else {}
                report.write_text(json.dumps({**record, "after": values}, indent=2) + "\n")
        if done % config.run.save_every == 0 or last:
            trainer.save(run, done)
    log.close()
    trainer.average.swap()
    trainer.export(run / "export", dtype=torch.float16)
    return run / "export"
