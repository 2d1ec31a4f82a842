"""Training of the latent decoder: real latents, noisy ones, and ones that a world model made in one step from noisy ones.

Imagined latents are not the codec's: they are blurred where the future is uncertain and noisy where denoising took few steps. A share
of every batch gets Gaussian noise, another share is made noisy at a random level and denoised in one step by the frozen world model.
Frame 0 stays as it is: it is the encoded picture in an imagination too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from physisforcing.core.errors import UserError

from .decoder_fit import Fit, FitConfig, Log
from .decoder_windows import FrozenWorldModel
from .frame_store import episode_counts, split_episodes
from .idm_training import loss_terms, noisy_start, statistics
from .inverse_dynamics import chunk_errors
from .latent_decoder import LatentDecoderConfig, LatentInverseDynamics

#: Noise level of the one-step latents that held-out errors are measured on.
HELD_OUT_SIGMA = 0.5


def _fit() -> FitConfig:
    return FitConfig(steps=2500, batch=96, lr=1e-3, beta2=0.99, weight_decay=0.01, warmup_share=0.04)


@dataclass(slots=True, kw_only=True)
class LatentTrainConfig:
    """``denoised_share`` of every batch are one-step latents from levels up to ``denoised_sigma``; the others get noise of standard
    deviation U(0, ``latent_noise``). Everything else as in the pixel decoder's training."""

    model: LatentDecoderConfig = field(default_factory=LatentDecoderConfig)
    fit: FitConfig = field(default_factory=_fit)
    denoised_share: float = 0.5
    denoised_sigma: float = 0.8
    latent_noise: float = 0.2
    validation_share: float = 0.05
    validation_windows: int = 128
    start_share: float = 0.15
    state_noise: float = 0.03
    delta_floor: float = 0.05
    huber_beta: float = 0.05
    spread_weight: float = 0.05


class LatentBatches:
    """Windows as latents, with what makes them look imagined."""

    def __init__(self, config: LatentTrainConfig, frozen: FrozenWorldModel, allowed_E: Tensor) -> None:
        self.config, self.frozen, self.allowed_E = config, frozen, allowed_E

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(latents [B,C,F,h,w], drive targets now [B,A], targets [B,P,A])."""
        c, windows = self.config, self.frozen.windows
        places = windows.store.draw(
            c.fit.batch, allowed_E=self.allowed_E, start_share=c.start_share, generator=generator
        )
        latents, rows = self.real(*places), windows.rows(*places)
        made = round(c.fit.batch * c.denoised_share)
        device = latents.device
        scale = c.latent_noise * torch.rand(len(latents) - made, generator=generator, device=generator.device)
        rest = latents[made:]
        noise = torch.randn(rest.shape, generator=generator, device=generator.device).to(device)
        noise[:, :, 0] = 0
        parts = [rest + scale.to(device).view(-1, 1, 1, 1, 1) * noise]
        if made:
            sigma = c.denoised_sigma * torch.rand(made, generator=generator, device=generator.device).to(device)
            episode, start = places[0][:made], places[1][:made]
            parts.insert(0, self.frozen.one_step(latents[:made], episode, start, sigma, generator))
        return torch.cat(parts), rows[:, 0], rows[:, 1:]

    @torch.no_grad()
    def real(self, episode_B: Tensor, start_B: Tensor) -> Tensor:
        """The codec's latents of windows, float32."""
        return self.frozen.model.codec.encode(self.frozen.windows.pictures(episode_B, start_B)).float()


def train_latent_decoder(
    config: LatentTrainConfig,
    frozen: FrozenWorldModel,
    *,
    folder: Path,
    resume: bool = False,
    log: Log = lambda row: None,
) -> tuple[LatentInverseDynamics, dict[str, Any]]:
    """Train on the windows of ``frozen``. Returns the averaged weights and the held-out errors."""
    check_shares(config)
    check_geometry(config.model, frozen)
    store = frozen.windows.store
    train_E, validation_E = split_episodes(store, share=config.validation_share)
    torch.manual_seed(config.fit.seed)
    model = LatentInverseDynamics(config.model).to(store.first_E.device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.set_statistics(*statistics(store, train_E, chunk=config.model.chunk, floor=config.delta_floor))
    batches = LatentBatches(config, frozen, train_E)

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        latents, now, targets = batches.draw(generator)
        mean, log_variance = model(latents, noisy_start(now, config.state_noise, generator))
        fit, spread = loss_terms(mean, log_variance, targets, model.delta_std_A, beta=config.huber_beta)
        return {"loss": fit + config.spread_weight * spread, "loss_fit": fit, "loss_spread": spread}

    steps = Fit(model, loss, config.fit, folder=folder, resume=resume, settings=config).run(log)
    held_out = LatentBatches(config, frozen, validation_E)
    metrics = evaluate_latents(model, held_out, windows=config.validation_windows, seed=config.fit.seed + 2)
    metrics |= {"steps": steps, "episodes": episode_counts(store, train_E, validation_E)}
    return model, metrics


@torch.no_grad()
def evaluate_latents(
    model: LatentInverseDynamics, batches: LatentBatches, *, windows: int, seed: int, together: int = 32
) -> dict[str, Any]:
    """Held-out errors (``chunk_errors``) at the start of every episode once and at ``windows`` random frames: of ``real`` latents, of
    ``denoised`` ones (one step from noise level 0.5), of ``frozen`` ones (the first latent repeated) and of ``hold`` (the start joints
    repeated); ``real_measured`` is against measured joints, ``drive_measured`` the drive targets against those. ``spread_deg``: mean spread on real and on one-step latents."""
    frozen, device = batches.frozen, batches.allowed_E.device
    generator = torch.Generator(device).manual_seed(seed)
    anywhere = frozen.windows.store.draw(windows, allowed_E=batches.allowed_E, start_share=0.0, generator=generator)
    places = {"start": (batches.allowed_E, torch.zeros_like(batches.allowed_E)), "anywhere": anywhere}
    out: dict[str, Any] = {"windows": {place: len(episode) for place, (episode, _) in places.items()}}
    for place, (episode, start) in places.items():
        made: dict[str, list[Tensor]] = {"real": [], "denoised": [], "frozen": [], "hold": []}
        spreads: dict[str, list[Tensor]] = {"real": [], "denoised": []}
        wanted = []
        for rows in torch.arange(len(episode), device=device).split(together):
            at, when = episode[rows], start[rows]
            targets, latents = frozen.windows.rows(at, when), batches.real(at, when)
            sigma = torch.full((len(at),), HELD_OUT_SIGMA, device=device)
            kinds = {
                "real": latents,
                "denoised": frozen.one_step(latents, at, when, sigma, generator),
                "frozen": latents[:, :, :1].expand_as(latents),
            }
            for name, read in kinds.items():
                mean, log_variance = model(read, targets[:, 0])
                made[name].append(mean)
                if name in spreads:
                    spreads[name].append((log_variance.exp() * model.delta_std_A**2).mean(-1).sqrt())
            made["hold"].append(targets[:, :1].expand(-1, targets.shape[1] - 1, -1))
            wanted.append(targets[:, 1:])
        target = torch.cat(wanted).cpu().numpy()
        found = {name: torch.cat(parts).cpu().numpy() for name, parts in made.items()}
        out[place] = {name: chunk_errors(value, target) for name, value in found.items()}
        if frozen.windows.store.measured_NA is not None:
            joints = frozen.windows.rows(episode, start, measured=True).cpu().numpy()[:, 1:]
            out[place]["real_measured"] = chunk_errors(found["real"], joints)
            out[place]["drive_measured"] = chunk_errors(target, joints)
        out.setdefault("spread_deg", {})[place] = {
            name: float(torch.rad2deg(torch.cat(parts).mean())) for name, parts in spreads.items()
        }
    return out


def check_geometry(config: LatentDecoderConfig, frozen: FrozenWorldModel) -> None:
    """``UserError`` where the decoder's sizes or its time base are not those of the world model's latents."""
    frozen.check_window(config.frames, config.steps_per_frame, field="latent.model")
    channels, height, width = frozen.latent_shape()
    found: dict[str, tuple[object, object]] = {
        "latent_channels": (config.latent_channels, channels),
        "grid": (tuple(config.grid), (height, width)),
        "action_dim": (config.action_dim, frozen.windows.store.states_NA.shape[1]),
    }
    for name, (got, wanted) in found.items():
        if got != wanted:
            fix = f"latent.model.{name}={list(wanted) if isinstance(wanted, tuple) else wanted}"
            raise UserError(f"latent.model.{name}", got=got, wanted=f"{wanted}, as the world model has", fix=fix)


def check_shares(config: LatentTrainConfig) -> None:
    """``UserError`` for shares and levels that are none."""
    if not 0 <= config.denoised_share <= 1 or not 0 < config.denoised_sigma <= 1:
        got = (config.denoised_share, config.denoised_sigma)
        raise UserError("denoised_share, denoised_sigma", got=got, wanted="0..1", fix="0.5 and 0.8")
    if config.latent_noise < 0:
        raise UserError("latent_noise", got=config.latent_noise, wanted="0 or more", fix="latent_noise=0.2")
