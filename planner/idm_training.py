"""Training of the pixel inverse dynamics model: data, augmentation, loss, loop, held-out errors.

Imports no configuration library and no simulator, so that it runs wherever torch does. A run takes about two minutes on one
data-centre GPU; it is repeated rather than resumed.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from physisforcing.core.errors import UserError
from physisforcing.worldmodel.codec import VideoCodec

from .frame_store import FIRST_TEST_SEED, FrameStore, episode_counts, split_episodes
from .inverse_dynamics import InverseDynamicsConfig, PictureDecoder, PixelInverseDynamics, chunk_errors
from .roundtrip import RoundTripPool, round_trip

Log = Callable[[dict[str, Any]], None]


@dataclass(slots=True, kw_only=True)
class IdmTrainConfig:
    """``roundtrip_share`` of every batch are windows that went through the codec, the others are real pictures.

    ``state_noise``: largest standard deviation (radians; gripper opening) of the noise on the start joints, drawn for half of
    the windows, so that the decoder reads joints from pixels and chained windows do not drift. ``delta_floor``: smallest
    scale (radians) by which a joint's motion is divided; each of the 14 numbers weighs the same after that division.
    ``time_limit_s``: end after so many seconds of steps (0: none); the learning rate then falls with time, so that a shorter run
    is a complete one. ``compile``: fuse the network with torch.compile (a GPU run of minutes gains more than it costs).
    """

    model: InverseDynamicsConfig = field(default_factory=InverseDynamicsConfig)
    steps: int = 2500
    time_limit_s: float = 0.0
    compile: bool = False
    batch: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: int = 100
    grad_clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    validation_share: float = 0.05
    start_share: float = 0.15
    roundtrip_share: float = 0.5
    roundtrip_pool: int = 4096
    roundtrip_refresh: int = 8
    latent_noise: float = 0.1
    augment_share: float = 0.5
    state_noise: float = 0.03
    delta_floor: float = 0.05
    huber_beta: float = 0.05
    spread_weight: float = 0.05
    log_every: int = 50
    validation_windows: int = 128


def statistics(store: FrameStore, allowed_E: Tensor, *, chunk: int, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and deviation of the drive targets, and the RMS of their change over the rows of a chunk, per element [A]."""
    values, changes = [], []
    for episode in allowed_E.tolist():
        first, length = int(store.first_E[episode]), int(store.length_E[episode])
        states = store.states_NA[first : first + length]
        values.append(states)
        for lag in (chunk // 4, chunk // 2, chunk):
            changes.append(states[lag:] - states[:-lag] if length > lag else states[-1:] - states[:1])
    every = torch.cat(values)
    return every.mean(0), every.std(0).clamp_min(floor), torch.cat(changes).pow(2).mean(0).sqrt().clamp_min(floor)


def augment(frames_BTHWC: Tensor, *, share: float, generator: torch.Generator) -> Tensor:
    """Brightness gain +-8 % and offset +-6 levels, blur, and pixel noise up to 4 levels, each constant over a window.

    Applied to a ``share`` of the windows; uint8 in and out.
    """
    b, t, h, w, _ = frames_BTHWC.shape
    device = frames_BTHWC.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(b, 1, 1, 1, 1, generator=generator, device=device)

    gain, offset, blur, noise, chosen = uniform(0.92, 1.08), uniform(-6, 6), uniform(0, 1), uniform(0, 4), uniform(0, 1)
    x = frames_BTHWC.float()
    planes = x.permute(0, 1, 4, 2, 3).reshape(-1, 1, h, w)
    padded = F.pad(planes, (1, 1, 1, 1), mode="replicate")
    kernel = torch.tensor([1.0, 2.0, 1.0], device=device) / 4
    soft = F.conv2d(padded, (kernel[:, None] * kernel)[None, None]).reshape(b, t, 3, h, w).permute(0, 1, 3, 4, 2)
    y = (x + blur * (soft - x)) * gain + offset
    y = y + noise * torch.randn(y.shape, generator=generator, device=device)
    y = y.round().clamp(0, 255).to(torch.uint8)
    return torch.where(chosen < share, y, frames_BTHWC)


def loss_terms(
    mean_BPA: Tensor, log_variance_BPA: Tensor, target_BPA: Tensor, delta_std_A: Tensor, *, beta: float
) -> tuple[Tensor, Tensor]:
    """(Huber loss of the normalised error, Gaussian negative log likelihood of the spread).

    The likelihood sees the error detached: a free variance would otherwise let hard windows count less.
    """
    error = (mean_BPA - target_BPA) / delta_std_A
    fit = F.smooth_l1_loss(error, torch.zeros_like(error), beta=beta)
    likelihood = 0.5 * (error.detach() ** 2 * torch.exp(-log_variance_BPA) + log_variance_BPA).mean()
    return fit, likelihood


def train_inverse_dynamics(
    config: IdmTrainConfig,
    store: FrameStore,
    codec: VideoCodec | None,
    *,
    device: str = "cpu",
    log: Log | None = None,
    build: Callable[[InverseDynamicsConfig], PictureDecoder] = PixelInverseDynamics,
    init: PictureDecoder | None = None,
) -> tuple[PictureDecoder, dict[str, Any]]:
    """Train what ``build`` makes on ``store``; ``codec`` gives the round-trip half. Returns the averaged weights and the held-out
    errors. ``init``: a trained decoder of the same sizes to go on from, with its weights and its normalisation."""
    _check(config, store, codec)
    if init is not None and init.config != config.model:
        fix = "leave train.model.* out, or train from nothing"
        raise UserError("init", got="a decoder of other sizes", wanted="the sizes of train.model", fix=fix)
    torch.manual_seed(config.seed)
    model = build(config.model).to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    store = store.to(device)
    train_E, validation_E = split_episodes(store, share=config.validation_share)
    if init is None:
        model.set_statistics(*statistics(store, train_E, chunk=config.model.chunk, floor=config.delta_floor))
    else:
        model.load_state_dict(init.state_dict())
    generator = torch.Generator(device).manual_seed(config.seed + 1)
    steps = _fit(config, model, store, codec, train_E, generator, log or (lambda row: None))
    metrics = evaluate_decoder(
        model, store, codec, allowed_E=validation_E, windows=config.validation_windows, seed=config.seed + 2
    )
    metrics["steps"] = steps
    metrics["episodes"] = episode_counts(store, train_E, validation_E)
    return model, metrics


def _fit(
    config: IdmTrainConfig,
    model: PictureDecoder,
    store: FrameStore,
    codec: VideoCodec | None,
    train_E: Tensor,
    generator: torch.Generator,
    log: Log,
) -> int:
    """The loop; leaves the exponential average of the weights in ``model`` and returns the number of steps."""
    device = generator.device
    draws: dict[str, Any] = {"allowed_E": train_E, "start_share": config.start_share, "generator": generator}
    window: dict[str, Any] = {"frames": config.model.frames, "stride": config.model.steps_per_frame}
    decoded = round(config.batch * config.roundtrip_share)
    began = time.perf_counter()
    pool = None
    if decoded:
        assert codec is not None
        pool = RoundTripPool(
            store, codec, size=config.roundtrip_pool, latent_noise=config.latent_noise, **draws, **window
        )
        log({"event": "round_trip_pool", "windows": config.roundtrip_pool, "seconds": time.perf_counter() - began})
    optimizer = _optimizer(model, config, fused=device.type == "cuda")
    average = copy.deepcopy(model).requires_grad_(False)
    network = torch.compile(model, dynamic=False) if config.compile else model
    began, step, done = time.perf_counter(), 0, 0.0
    while done < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = config.lr * _schedule(step, done, config)
        parts = [store.windows(*store.draw(config.batch - decoded, **draws), **window)]
        if pool is not None:
            pool.refresh(config.roundtrip_refresh)
            parts.append(pool.draw(decoded))
        frames, now, targets = (torch.cat(p) for p in zip(*parts, strict=True))
        frames = augment(frames, share=config.augment_share, generator=generator)
        now = noisy_start(now, config.state_noise, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            mean, log_variance = network(frames, now)
        fit, likelihood = loss_terms(mean, log_variance, targets, model.delta_std_A, beta=config.huber_beta)
        optimizer.zero_grad(set_to_none=True)
        (fit + config.spread_weight * likelihood).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        _update_average(average, model, min(config.ema, (1 + step) / (10 + step)))
        elapsed, step = time.perf_counter() - began, step + 1
        done = step / config.steps
        if config.time_limit_s:
            done = max(done, elapsed / config.time_limit_s)
        if step % config.log_every == 0 or step == 1 or done >= 1.0:
            row = {"step": step, "loss_fit": fit.item(), "loss_spread": likelihood.item(), "grad_norm": norm.item()}
            if not math.isfinite(row["loss_fit"]):
                raise FloatingPointError(f"the loss is not finite at step {step}")
            row |= {"lr": optimizer.param_groups[0]["lr"], "step_ms": 1e3 * elapsed / step}
            row |= {"windows_s": config.batch * step / elapsed, "eta_s": elapsed * (1 - done) / done}
            if device.type == "cuda":
                row["memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
            log(row)
    model.load_state_dict(average.state_dict())
    model.eval()
    return step


def _optimizer(model: PictureDecoder, config: IdmTrainConfig, *, fused: bool) -> torch.optim.Optimizer:
    """AdamW; matrices and kernels decay, biases and norms do not."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), fused=fused)


@torch.no_grad()
def evaluate_decoder(
    model: PictureDecoder,
    store: FrameStore,
    codec: VideoCodec | None,
    *,
    allowed_E: Tensor,
    windows: int,
    seed: int,
    batch: int = 32,
) -> dict[str, Any]:
    """Held-out errors (``chunk_errors``) for real, round-trip and frozen pictures, at the start of every allowed episode once and
    at ``windows`` random frames (with replacement); ``windows`` of the result says how many each are.

    ``frozen`` repeats the first picture: what a decoder that only knows the start would say. ``hold`` repeats the start
    joints. The start joints are exact here. Errors are against drive targets; ``real_measured`` is against the joints as measured, and
    ``drive_measured`` the drive targets themselves against those, where the demonstrations hold them.
    """
    config = model.config
    generator = torch.Generator(store.first_E.device).manual_seed(seed)
    places = {
        "start": (allowed_E, torch.zeros_like(allowed_E)),
        "anywhere": store.draw(windows, allowed_E=allowed_E, start_share=0.0, generator=generator),
    }
    out: dict[str, Any] = {"windows": {place: len(episode) for place, (episode, _) in places.items()}}
    for place, (episode, start) in places.items():
        predictions: dict[str, list[Tensor]] = {"real": [], "roundtrip": [], "frozen": [], "hold": []}
        wanted = []
        for rows in torch.arange(len(episode), device=episode.device).split(batch):
            frames, now, targets = store.windows(
                episode[rows], start[rows], frames=config.frames, stride=config.steps_per_frame
            )
            wanted.append(targets)
            predictions["real"].append(model(frames, now)[0])
            predictions["frozen"].append(model(frames[:, :1].expand_as(frames), now)[0])
            predictions["hold"].append(now[:, None].expand_as(targets))
            if codec is not None:
                passed = round_trip(codec, frames, latent_noise=0.0, generator=generator)
                predictions["roundtrip"].append(model(passed, now)[0])
        target = torch.cat(wanted).cpu().numpy()
        out[place] = {
            name: chunk_errors(torch.cat(parts).cpu().numpy(), target) for name, parts in predictions.items() if parts
        }
        measured = store.measured(episode, start, steps=config.chunk)
        if measured is not None:
            joints = measured.cpu().numpy()
            out[place]["real_measured"] = chunk_errors(torch.cat(predictions["real"]).cpu().numpy(), joints)
            out[place]["drive_measured"] = chunk_errors(target, joints)
    return out


def print_row(row: dict[str, Any]) -> None:
    """One structured line."""
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}), flush=True)


def _schedule(step: int, done: float, config: IdmTrainConfig) -> float:
    """Linear warm-up, then a cosine over the share of the run that is ``done``."""
    return min(1.0, (step + 1) / max(1, config.warmup)) * 0.5 * (1 + math.cos(math.pi * done))


def noisy_start(now_BA: Tensor, largest: float, generator: torch.Generator) -> Tensor:
    """Start joints with noise of deviation U(0, ``largest``) on half of the windows, so that a decoder looks at the pictures too."""
    uniform = torch.rand(2, len(now_BA), 1, generator=generator, device=now_BA.device)
    noise = torch.randn(now_BA.shape, generator=generator, device=now_BA.device)
    return now_BA + noise * largest * uniform[0] * (uniform[1] < 0.5)


@torch.no_grad()
def _update_average(average: PictureDecoder, model: PictureDecoder, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def _check(config: IdmTrainConfig, store: FrameStore, codec: VideoCodec | None) -> None:
    if not 0 <= config.roundtrip_share <= 1:
        raise UserError("roundtrip_share", got=config.roundtrip_share, wanted="0..1", fix="0.5 is the measured default")
    if config.roundtrip_share > 0 and codec is None:
        raise UserError(
            "codec", got=None, wanted="a video codec for round-trip pictures", fix="give codec=... or roundtrip_share=0"
        )
    if store.seeds_E.max(initial=0) >= FIRST_TEST_SEED:
        raise UserError(
            "data",
            got=int(store.seeds_E.max()),
            wanted=f"training seeds below {FIRST_TEST_SEED}",
            fix="use a training dataset",
        )
