"""The policy's training objective: flow matching of video and actions with noise levels of their own (reference sections 2.1 and 2.2)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from physisforcing.worldmodel.flow_matching import TIMESTEP_SCALE, add_noise, sample_train_sigma, shift_sigma

from .config import PolicyModelConfig
from .model import Copy, WorldActionModel

#: Points of the grid that the published weights are normalised on.
GRID = 1000


class Drawn(NamedTuple):
    """Random numbers of a batch: noise and levels of video and actions; for ``idm`` of the copy, and which samples' actions see it."""

    noise_BCFhw: Tensor
    sigma_B: Tensor
    action_noise_BPA: Tensor
    action_sigma_B: Tensor
    copy_noise_BCFhw: Tensor | None
    copy_sigma_B: Tensor | None
    copy_seen_B: Tensor | None


def draw(shape: tuple[int, ...], config: PolicyModelConfig, generator: torch.Generator) -> Drawn:
    """For latents [B,C,F,h,w] of this ``shape``, on the generator's device."""
    batch, device = shape[0], generator.device
    noise = torch.randn(shape, generator=generator, device=device)
    sigma = _levels(batch, config.video_shift, config, generator)
    actions = torch.randn(batch, config.chunk, config.action_dim, generator=generator, device=device)
    action_sigma = _levels(batch, config.action_shift, config, generator)
    if config.mode not in ("idm", "optional_idm"):
        return Drawn(noise, sigma, actions, action_sigma, None, None, None)
    copied = torch.randn(shape, generator=generator, device=device)
    level = _levels(batch, config.video_shift, config, generator)
    noised = torch.rand(batch, generator=generator, device=device) < config.condition_noise
    seen = None
    if config.mode == "optional_idm":
        seen = torch.rand(batch, generator=generator, device=device) < config.idm_share
    return Drawn(noise, sigma, actions, action_sigma, copied, torch.where(noised, level, torch.zeros_like(level)), seen)


def _levels(count: int, shift: float, config: PolicyModelConfig, generator: torch.Generator) -> Tensor:
    """Noise levels [count]. With ``coarse_times`` those whose timesteps bfloat16 holds: what is mixed is what the model is told, as published."""
    sigma = sample_train_sigma(count, shift, generator)
    return (TIMESTEP_SCALE * sigma).bfloat16().float() / TIMESTEP_SCALE if config.coarse_times else sigma


@functools.lru_cache(maxsize=8)
def _bell(shift: float) -> tuple[float, float]:
    """-> (smallest value, mean above it) of the bell over the shifted grid."""
    levels = shift_sigma(torch.arange(1, GRID + 1, dtype=torch.float64) / GRID, shift)
    bell = torch.exp(-2.0 * (levels - 0.5).square())
    low = float(bell.min())
    return low, float((bell - low).mean())


def level_weights(sigma_B: Tensor, shift: float, weighting: str) -> Tensor:
    """Weight of each sample's loss, [B] float32. ``bell``: ``exp(-2 (s - 1/2)^2)`` less its smallest value, mean 1 over the shifted grid."""
    if weighting == "uniform":
        return torch.ones_like(sigma_B, dtype=torch.float32)
    low, mean = _bell(shift)
    return ((torch.exp(-2.0 * (sigma_B.double() - 0.5).square()) - low) / mean).clamp(min=0.0).float()


def masked_mean(error_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """Mean over what is valid, [B]; 0 where nothing is."""
    valid = valid_BN.to(error_BN.dtype)
    return (error_BN * valid).sum(1) / valid.sum(1).clamp(min=1.0)


def video_loss(velocity: Tensor, x0: Tensor, noise: Tensor, valid_BF: Tensor, weight_B: Tensor) -> Tensor:
    """Weighted squared error over the latent frames behind the first that are no padding, a float32 scalar. [B,C,F,h,w] each."""
    error = (velocity.float() - (noise.float() - x0.float())).square()[:, :, 1:].mean((1, 3, 4))
    return (masked_mean(error, valid_BF[:, 1:]) * weight_B).mean()


def action_loss(velocity: Tensor, x0: Tensor, noise: Tensor, valid_BP: Tensor, weight_B: Tensor) -> Tensor:
    """Weighted squared error over the actions within the episode, a float32 scalar. [B,P,A] each."""
    error = (velocity.float() - (noise.float() - x0.float())).square().mean(2)
    return (masked_mean(error, valid_BP) * weight_B).mean()


def predict(
    model: WorldActionModel, batch: Mapping[str, Any], drawn: Drawn, *, video: bool = True, need_tap: bool = False
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Velocities of a noised batch: see ``WorldActionModel.forward``. Without ``video`` the video's is None, and the future tokens are not computed
    where neither the actions see them nor the tap is read."""
    x0, actions, copy = batch["latents_BCFhw"], batch["actions_BPA"], None
    alone = not video and not need_tap and model.config.mode != "joint"
    # the first frame is clean
    noisy = x0[:, :, :1].float() if alone else add_noise(x0, drawn.noise_BCFhw, drawn.sigma_B)
    if drawn.copy_sigma_B is not None:
        assert drawn.copy_noise_BCFhw is not None
        copy = Copy(add_noise(x0, drawn.copy_noise_BCFhw, drawn.copy_sigma_B), drawn.copy_sigma_B, drawn.copy_seen_B)
    level = drawn.action_sigma_B.view(-1, 1, 1)
    noised = (1.0 - level) * actions + level * drawn.action_noise_BPA
    state = batch["proprioception_BKA"] if model.config.proprioception == "backbone" else batch["state_BA"]
    context = model.context(batch["text"], state)
    velocity, acted, tapped = model(
        noisy, drawn.sigma_B, noised, drawn.action_sigma_B, context, copy=copy, need_tap=need_tap, need_velocity=video
    )
    assert acted is not None
    return velocity, acted, tapped


def policy_losses(
    model: WorldActionModel,
    batch: Mapping[str, Any],
    drawn: Drawn,
    *,
    video_weight: float = 1.0,
    need_tap: bool = False,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """-> ({loss, video, action}, tapped tokens or None). The loss is ``video_weight * video + action``; both terms are float32 scalars.

    A batch has ``latents_BCFhw``, ``text`` [B,L,D], ``state_BA`` (or ``proprioception_BKA``), ``actions_BPA``, ``action_valid_BP`` and
    ``frame_valid_BF``.
    """
    config = model.config
    velocity, acted, tapped = predict(model, batch, drawn, video=video_weight > 0.0, need_tap=need_tap)
    weight = level_weights(drawn.action_sigma_B, config.action_shift, config.weighting)
    action = action_loss(acted, batch["actions_BPA"], drawn.action_noise_BPA, batch["action_valid_BP"], weight)
    terms = {"action": action.detach()}
    loss = action
    if video_weight > 0.0:
        assert velocity is not None
        weight = level_weights(drawn.sigma_B, config.video_shift, config.weighting)
        video = video_loss(velocity, batch["latents_BCFhw"], drawn.noise_BCFhw, batch["frame_valid_BF"], weight)
        loss, terms["video"] = loss + video_weight * video, video.detach()
    return {"loss": loss, **terms}, tapped
