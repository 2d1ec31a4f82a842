"""A policy's folder that acts on RoboTwin's robot: random weights, the package's autoencoder and sentence encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from physisforcing.core.paths import weights_root
from physisforcing.policy.checkpoint import PolicyInfo, save_policy
from physisforcing.policy.config import PolicyModelConfig
from physisforcing.policy.model import WorldActionModel
from physisforcing.policy.normalization import ActionStatistics
from physisforcing.worldmodel.storage import latents_fingerprint
from physisforcing.worldmodel.text import TEXT_WIDTH
from tiny_policy import tiny_transformer


def acting_policy(folder: Path, *, seed: int = 0, mode: str = "first_frame") -> Path:
    """Chunks of 16 rows around the mean of its (made up) training actions. Returns ``folder``."""
    sizes = {"patch_size": (1, 1, 1), "in_channels": 16, "out_channels": 16, "text_dim": TEXT_WIDTH, "num_layers": 2}
    transformer = tiny_transformer(seed, **sizes)
    config = PolicyModelConfig(mode=mode, chunk=16, steps_per_latent=8.0, width=16, ffn_dim=24)
    model = WorldActionModel(transformer, config)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.expert.proj_out.parameters():
            parameter.normal_(std=0.3)
    info = PolicyInfo(latents=latents_fingerprint(weights_root() / "vae"), tasks=("click_bell",))
    save_policy(folder, model, info)
    values_ND = np.random.default_rng(0).normal(0.3, 0.05, (50, 14))
    ActionStatistics.of([values_ND], [values_ND]).save(folder)
    return folder
