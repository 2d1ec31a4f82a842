"""``physis train vae``: the causal video autoencoder on windows that are resident on the device."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from physisforcing.core.errors import UserError

from ..autoencoder import CausalVideoAutoencoder
from ..codec import latent_frames, to_unit_range
from ..data.batches import WindowSampler, step_generator
from ..data.windows import WINDOW_FRAMES, Episode, FrameStore, WindowTable, read_episodes
from ..storage import load_diffusers, read_json, save_diffusers
from .checkpoint import binding_settings, restore_training, save_checkpoint, training_tensors
from .config import TrainVaeConfig, VaeLossConfig
from .finite import FiniteGuard
from .initial import adopt_codec
from .optim import WeightAverage, build_optimizer, learning_rate, set_learning_rate
from .runtime import autocast, begin_run, compiles, kernels_given_back, split_heldout
from .steplog import StepLog
from .stopping import StopSignals, TrainingStopped


def motion_map(pictures_BTCHW: Tensor) -> Tensor:
    """What differs from the window's first or mean picture, in [0,1], widened by some pixels: [B,T,1,H,W]."""
    batch, frames = pictures_BTCHW.shape[:2]
    reference = torch.stack([pictures_BTCHW[:, 0], pictures_BTCHW.mean(1)], dim=1)
    difference = (pictures_BTCHW[:, :, None] - reference[:, None]).abs().amax(dim=(2, 3))
    coarse = F.avg_pool2d(difference.view(batch * frames, 1, *difference.shape[-2:]), 4)
    wide = F.max_pool2d(coarse, 3, stride=1, padding=1)
    wide = F.interpolate(wide, scale_factor=4, mode="nearest")
    return (4.0 * wide).clamp(max=1.0).unflatten(0, (batch, frames))


def vae_loss(
    output_BTCHW: Tensor, target_BTCHW: Tensor, mean: Tensor, log_variance: Tensor, config: VaeLossConfig
) -> dict[str, Tensor]:
    """Loss terms and their weighted sum ``loss``; float32 scalars."""
    weight = 1.0 + config.motion * motion_map(target_BTCHW)
    weight = weight / weight.mean()
    residual = (output_BTCHW - target_BTCHW).float()
    pixel = (weight * residual.abs()).mean()
    # The edge term compares gradients at several sizes: the residual's gradient is the difference of gradients.
    edge = residual.new_zeros(())
    scaled, scaled_weight = residual.flatten(0, 1), weight.flatten(0, 1)
    for level in range(config.edge_scales):
        if level:
            scaled, scaled_weight = F.avg_pool2d(scaled, 2), F.avg_pool2d(scaled_weight, 2)
        edge = edge + (scaled_weight[..., 1:, :] * (scaled[..., 1:, :] - scaled[..., :-1, :]).abs()).mean()
        edge = edge + (scaled_weight[..., 1:] * (scaled[..., 1:] - scaled[..., :-1]).abs()).mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
    total = pixel + config.edge * edge / config.edge_scales + config.kl * kl
    return {"loss": total, "pixel": pixel, "edge": edge, "kl": kl}


def train_step_terms(
    model: CausalVideoAutoencoder, frames_BTHWC: Tensor, noise_BCFhw: Tensor, config: VaeLossConfig
) -> dict[str, Tensor]:
    """Loss terms of a batch; ``noise_BCFhw`` standard normal in the shape of its latents."""
    target = to_unit_range(frames_BTHWC)
    mean, log_variance = model.posterior(target)
    output = model.reconstruct(mean + noise_BCFhw * (0.5 * log_variance).exp())
    return vae_loss(output, target, mean, log_variance, config)


@torch.no_grad()
def measure_statistics(model: CausalVideoAutoencoder, store: FrameStore, table: WindowTable, seed: int) -> None:
    """Set the latents' mean and standard deviation from up to 512 windows."""
    device = store.frames_MHWC.device
    rows = torch.randperm(len(table), generator=step_generator(seed, 0))[:512]
    moments = torch.zeros(3, model.latent_channels, dtype=torch.float64)
    for part in rows.split(16):
        frames = store.windows(table.episode_W[part].to(device), table.start_W[part].to(device))
        z = model.posterior(to_unit_range(frames))[0].double().cpu().transpose(0, 1).flatten(1)
        moments += torch.stack([torch.full_like(z[:, 0], z.shape[1]), z.sum(1), z.square().sum(1)])
    mean = moments[1] / moments[0]
    model.set_statistics(mean, (moments[2] / moments[0] - mean.square()).clamp(min=1e-12).sqrt())


@torch.no_grad()
def heldout_psnr(model: CausalVideoAutoencoder, episodes: list[Episode], windows: int = 32) -> dict[str, float]:
    """PSNR in dB over held-out windows: of whole pictures, and of what moves (``motion_map`` > 1/2)."""
    device = next(model.parameters()).device
    store = FrameStore.build(episodes, device)
    table = WindowTable.build([episode.length for episode in episodes], stride=8)
    rows = torch.linspace(0, len(table) - 1, min(windows, len(table))).long()
    whole, moving = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for part in rows.split(8):
        frames = store.windows(table.episode_W[part].to(device), table.start_W[part].to(device))
        z, _ = model.posterior(to_unit_range(frames))
        pictures = (model.reconstruct(z) * 0.5 + 0.5).clamp(0.0, 1.0)
        error = (pictures - (to_unit_range(frames) * 0.5 + 0.5)).square().mean(2, keepdim=True).double()
        mask = (motion_map(to_unit_range(frames)) > 0.5).double()
        whole += torch.stack([error.sum(), torch.ones_like(error).sum()]).cpu()
        moving += torch.stack([(error * mask).sum(), mask.sum()]).cpu()
    psnr = [float(-10.0 * torch.log10(total / count.clamp(min=1.0))) for total, count in (whole, moving)]
    return {"psnr_db": psnr[0], "psnr_moving_db": psnr[1]}


@kernels_given_back()
def train_vae(config: TrainVaeConfig, episodes: list[Episode] | None = None) -> Path:
    """Train, write checkpoints and metrics into ``config.run.out`` and the codec into ``<out>/codec``; returns that folder.

    ``episodes``: given by callers that hold the data already; read from ``config.data.roots`` otherwise.
    """
    adopt_codec(config)
    if config.run.checkpointing != "none":
        fix = "leave it out: the codec is small"
        raise UserError("run.checkpointing", got=config.run.checkpointing, wanted="none for a codec", fix=fix)
    if (world := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UserError("torchrun", got=f"{world} processes", wanted="one for a codec", fix="start it without torchrun")
    run, device, found = begin_run(config)
    data = config.data
    if episodes is None:
        episodes = read_episodes(
            data.roots, success_only=data.success_only, tasks=data.tasks, limit=data.limit, workers=data.workers
        )
    train, heldout = split_heldout(episodes, data.heldout)
    store = FrameStore.build(train, device)
    table = WindowTable.build([episode.length for episode in train], stride=2)
    sampler = WindowSampler.build(table, data.start_fraction, data.end_fraction)
    torch.manual_seed(config.run.seed)
    model = CausalVideoAutoencoder(**asdict(config.model))
    if config.run.init:
        model = load_diffusers(CausalVideoAutoencoder, Path(config.run.init))
    if config.decoder_only:
        _freeze_encoder(model, config)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = build_optimizer((p for p in model.parameters() if p.requires_grad), config.optim)
    average = WeightAverage(model, config.optim.ema)
    first = restore_training(found, model, average, optimizer, device) if found is not None else 0
    terms_of = torch.compile(train_step_terms, dynamic=False) if compiles(config.run) else train_step_terms
    log = StepLog(run, config.run.steps, config.run.batch, device, done=first)

    def clips(step: int) -> list[str]:
        rows = sampler.draw(config.run.batch, step_generator(config.run.seed, step)).tolist()
        places = [(train[int(table.episode_W[row])], int(table.start_W[row])) for row in rows]
        return [f"{episode.root} episode {episode.index} from step {start}" for episode, start in places]

    guard = FiniteGuard(config.run.nonfinite, clips)
    if found is not None:
        guard.skipped = read_json(found / "training" / "state.json").get("skipped", 0)

    with StopSignals() as signals:
        for step in range(first, config.run.steps):
            begun = time.perf_counter()
            rows = sampler.draw(config.run.batch, step_generator(config.run.seed, step))
            frames = store.windows(
                table.episode_W[rows].to(device, non_blocking=True), table.start_W[rows].to(device, non_blocking=True)
            )
            shape = (
                len(rows),
                model.latent_channels,
                latent_frames(WINDOW_FRAMES),
                *(n // 8 for n in frames.shape[2:4]),
            )
            generator = step_generator(config.run.seed + 1, step, device)
            noise = torch.randn(shape, generator=generator, device=device)
            wait = time.perf_counter() - begun
            lr = learning_rate(config.optim, step, config.run.steps)
            set_learning_rate(optimizer, lr)
            with autocast(config.run, device):
                terms = terms_of(model, frames, noise, config.loss)
            terms["loss"].backward()
            terms["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
            if guard.admits(step, terms["loss"], terms["grad_norm"]):
                optimizer.step()
                average.update(step)
            optimizer.zero_grad(set_to_none=True)
            if (skipped := guard.take_skipped()) is not None:
                log.skip(skipped, wait)
            else:
                log.add(terms, wait)
            done = step + 1
            last = done == config.run.steps
            told = None if last else signals.told
            if done % config.run.log_every == 0 or last:
                guard.check()
                log.line(done, lr)
            if not told and (done % config.run.eval_every == 0 or last):
                with log.paused():
                    average.swap()
                    log.event({"step": done, **heldout_psnr(model, heldout or train)})
                    average.swap()
            if done % config.run.save_every == 0 or last or told:
                guard.check()
                with log.paused():
                    tensors = training_tensors(model, average, optimizer, device)
                    state = {"settings": binding_settings(config), "skipped": guard.skipped}
                    saved = save_checkpoint(
                        run,
                        done,
                        lambda folder: _write_average(folder, model, average),
                        tensors,
                        state,
                        keep=config.run.keep,
                    )
                if told:
                    log.close()
                    raise TrainingStopped(told, done, config.run.steps, saved)
    average.swap()
    if not config.decoder_only:
        measure_statistics(model, store, table, config.run.seed)
    save_diffusers(model, run / "codec", torch.float16)
    log.close()
    return run / "codec"


def _freeze_encoder(model: CausalVideoAutoencoder, config: TrainVaeConfig) -> None:
    if not config.run.init:
        raise UserError(
            "decoder_only", got="no run.init", wanted="a trained codec", fix="run.init=<folder of the codec>"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("encode"))


def _write_average(folder: Path, model: CausalVideoAutoencoder, average: WeightAverage) -> None:
    average.swap()
    save_diffusers(model, folder)
    average.swap()
