"""A toy in which a picture tells the joints: demonstrations, a frozen world model of them, and decoders small enough to train."""

from __future__ import annotations

import numpy as np
import torch

from physisforcing.core.types import DT, Rollout
from physisforcing.planner.decoder_fit import FitConfig
from physisforcing.planner.decoder_windows import DecoderWindows, FrozenWorldModel
from physisforcing.planner.feature_decoder.config import (
    ActionHeadConfig,
    FeatureDecoderConfig,
    ResamplerConfig,
    SamplingConfig,
)
from physisforcing.planner.feature_decoder.training import FeatureTrainConfig
from physisforcing.planner.frame_store import make_store
from physisforcing.planner.latent_decoder import LatentDecoderConfig
from physisforcing.worldmodel.backbones.wan import ConditionerConfig, WanConfig, build_denoiser
from physisforcing.worldmodel.model import FlowWorldModel

HEIGHT, WIDTH, FRAMES = 24, 32, 9


class Words:
    """Embeds a sentence by its length."""

    def batch(self, sentences):
        rows = [torch.full((32, 384), 0.01 * len(sentence)) for sentence in sentences]
        mask = torch.zeros(len(rows), 32, dtype=torch.bool)
        mask[:, :3] = True
        return torch.stack(rows) * mask.unsqueeze(-1), mask


class CellCodec:
    """Latents that need no autoencoder: 4x4 means of a picture's brightness in 4x4 cells of 8x8; latent k holds frames 4k-3..4k."""

    latent_channels = 4

    def encode(self, frames_BTHWC):
        x = frames_BTHWC[..., 0].float() / 64 - 2
        x = torch.cat([x[:, :1].expand(-1, 3, -1, -1), x], dim=1)
        cells = torch.nn.functional.avg_pool2d(x, (8, 8))
        return cells.unflatten(1, (-1, 4)).transpose(1, 2)


def demonstrations(episodes=24, length=24, seed=0, instruction=None):
    """A bright square follows joint 0 (sideways) and the left gripper (up and down); the measured joints are a step behind."""
    rng = np.random.default_rng(seed)
    frames, states, measured, said = [], [], [], []
    for number in range(episodes):
        start, goal = rng.uniform(-1, 1, (2, 2))
        path = start + (goal - start) * (0.5 - 0.5 * np.cos(np.linspace(0, np.pi, length)))[:, None]
        state = np.zeros((length, 14), np.float32)
        state[:, 0], state[:, 6] = path[:, 0], 0.5 + 0.5 * path[:, 1]
        ys, xs = np.mgrid[0:HEIGHT, 0:WIDTH]
        x, y = 16 + 10 * path[:, 0, None, None], 12 + 7 * path[:, 1, None, None]
        blob = np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / 18)
        frames.append(np.repeat((40 + 200 * blob)[..., None], 3, -1).astype(np.uint8))
        states.append(state)
        measured.append(np.concatenate([state[:1], state[:-1]]))
        said.append(instruction or ("up" if number % 2 else "down and back"))
    return make_store(
        np.concatenate(frames),
        np.concatenate(states),
        [length] * episodes,
        list(range(episodes)),
        measured_NA=np.concatenate(measured),
        instructions_E=said,
        tasks_E=["toy"] * episodes,
    )


def frozen_world_model() -> FrozenWorldModel:
    """Random weights, with windows of the demonstrations."""
    torch.manual_seed(0)
    size = WanConfig(latent_channels=4, num_heads=2, head_dim=12, num_layers=4, ffn_dim=48, tap=2)
    denoiser = build_denoiser(size, ConditionerConfig(hidden=16))
    torch.nn.init.normal_(denoiser.transformer.proj_out.weight, std=0.1)
    settings = {"name": "toy", "frames": FRAMES, "frame_stride": 2, "sample_shift": 3.0, "denoising_steps": 1}
    model = FlowWorldModel(denoiser, CellCodec(), settings, weights_fingerprint="x", text=Words())
    store = demonstrations()
    windows = DecoderWindows.build(store, Words(), frames=FRAMES, stride=2, tokens=4, prompt="{instruction}")
    return FrozenWorldModel(model, windows)


def feature_config(**changes) -> FeatureDecoderConfig:
    values = {
        "taps": (1, 3),
        "feature_dim": 24,
        "latent_frames": 3,
        "grid": (3, 4),
        "frames": FRAMES,
        "goal_tokens": 4,
        "resampler": ResamplerConfig(width=48, depth=2, heads=2, head_dim=24, latents_per_frame=4),
        "head": ActionHeadConfig(
            width=48, encoder_layers=1, decoder_layers=2, heads=4, attention_dropout=0.0, residual_dropout=0.0
        ),
        "sampling": SamplingConfig(steps=12, draws=3),
    }
    return FeatureDecoderConfig(**(values | changes))


def feature_run(**fit) -> FeatureTrainConfig:
    values = {"steps": 6, "batch": 8, "lr": 3e-3, "ema": 0.9, "log_every": 2}
    return FeatureTrainConfig(model=feature_config(), fit=FitConfig(**(values | fit)), validation_windows=6)


LATENT = LatentDecoderConfig(
    latent_channels=4, grid=(3, 4), frames=FRAMES, channels=24, blocks=1, keypoints=4, flat_channels=4, dim=48, layers=1, heads=2
)  # fmt: skip


def latent_rollout(frozen, episodes=(0, 1), starts=(0, 2)):
    """Two imaginations of each of two windows, in latents, with the joints where they begin."""
    windows = frozen.windows
    z = frozen.model.codec.encode(windows.pictures(torch.tensor(episodes), torch.tensor(starts))).numpy()
    state = windows.rows(torch.tensor(episodes), torch.tensor(starts))[:, 0].numpy()
    both = np.stack([z, z + 0.1], axis=1)
    return Rollout(times_T=np.arange(FRAMES) * 2 * DT, latents_BSCFhw=both), state
