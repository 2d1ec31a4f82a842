"""A policy training that takes seconds: the random windows of ``tiny_training`` with their actions, and a network of two blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import tiny_training
from physisforcing.policy.config import PolicyModelConfig
from physisforcing.policy.training import PolicyTrainer
from physisforcing.policy.training_config import TrainPolicyConfig
from physisforcing.policy.training_start import adopt
from physisforcing.policy.windows import PolicyBank, episode_statistics
from physisforcing.worldmodel.backbones.wan import ConditionerConfig, WanConfig
from physisforcing.worldmodel.data.windows import Episode
from physisforcing.worldmodel.physics.config import PhysicsConfig

#: Actions of a chunk; a window of ``tiny_training`` has twice as many.
CHUNK = 8


def episodes(seed: int, *, far: float = 0.0) -> list[Episode]:
    """Those of ``tiny_training.bank``, without pictures. ``far``: added to all states."""
    generator = np.random.default_rng(seed)
    states = [generator.normal(size=(40, 14)).astype(np.float32) + np.float32(far) for _ in range(4)]
    frames = np.zeros((0, 120, 160, 3), np.uint8)
    return [
        Episode(frames=frames, states_TA=rows, instruction="go", task="t", index=place, seed=place, success=True)
        for place, rows in enumerate(states)
    ]


def banks(*, physics: bool = False) -> tuple[PolicyBank, PolicyBank]:
    """(training windows, held-out ones)"""
    parts = [episodes(0), episodes(1)]
    statistics, made = episode_statistics(parts[0], "zscore"), []
    for seed, part in enumerate(parts):
        bank = tiny_training.bank(seed)
        if not physics:
            bank.targets = None
        made.append(PolicyBank.of(bank, part, statistics, CHUNK))
    return made[0], made[1]


def config(folder: Path, name: str, steps: int = 10, *, physics: bool = False) -> TrainPolicyConfig:
    plain = tiny_training.config(folder, name, steps)
    made = TrainPolicyConfig(codec=plain.codec, heldout_windows=4)
    made.policy = PolicyModelConfig(
        chunk=CHUNK, width=16, ffn_dim=24, steps_per_latent=8.0, proprioception="backbone", video_shift=3.0
    )
    made.run, made.backbone, made.conditioner = plain.run, plain.backbone, plain.conditioner
    made.optim.warmup, made.optim.lr, made.run.batch, made.run.log_every = 3, 1e-2, 4, 1
    if physics:
        made.physics = PhysicsConfig(phi_hidden=16, psi_hidden=16, feature_dim=16)
    return made


def as_usual(made: TrainPolicyConfig, init: Path, out: Path) -> TrainPolicyConfig:
    """A run from ``init`` whose config says nothing about the model."""
    made.run.init, made.run.out = str(init), str(out)
    made.backbone, made.conditioner = WanConfig(), ConditionerConfig()
    made.policy = TrainPolicyConfig().policy
    return made


def trainer(made: TrainPolicyConfig, *, physics: bool = False) -> PolicyTrainer:
    """With the last layers away from zero, below which nothing has a gradient at first."""
    adopt(made)
    found = PolicyTrainer(made, banks(physics=physics)[0], torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    for layer in (found.policy.expert.proj_out, found.policy.transformer.proj_out):
        layer.weight.data.normal_(std=0.3, generator=generator)
    return found
