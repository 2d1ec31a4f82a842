"""A policy of the shipped world model with a freshly drawn action expert: as fast as a trained one, and as large."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from physisforcing.core.paths import weights_root
from physisforcing.policy.checkpoint import PolicyInfo, save_policy
from physisforcing.policy.config import PolicyModelConfig
from physisforcing.policy.model import WorldActionModel
from physisforcing.policy.normalization import ActionStatistics
from physisforcing.worldmodel.backbones.wan import load_denoiser
from physisforcing.worldmodel.storage import latents_fingerprint
from physisforcing.worldmodel.text import ENCODER, MAX_TOKENS, TEXT_WIDTH


def write_pico_policy(folder: Path, mode: str = "first_frame", *, width: int = 96, ffn_dim: int = 384) -> Path:
    """The head is drawn as well, which a new policy has zero."""
    torch.manual_seed(0)
    denoiser = load_denoiser(weights_root() / "worldmodel")
    config = PolicyModelConfig(
        mode=mode, width=width, ffn_dim=ffn_dim, steps_per_latent=8.0, proprioception="backbone", initial="random"
    )
    model = WorldActionModel(denoiser.transformer, config, tap=denoiser.tap, conditioner=denoiser.conditioner)
    with torch.no_grad():
        model.expert.proj_out.weight.normal_(std=0.02)
    text = {"encoder": ENCODER, "tokens": MAX_TOKENS, "width": TEXT_WIDTH}
    info = PolicyInfo(text=text, latents=latents_fingerprint(weights_root() / "vae"))
    save_policy(folder, model, info)
    draw = np.random.default_rng(0)
    ActionStatistics.of([draw.normal(size=(64, 14))], [draw.normal(size=(64, 14))]).save(folder)
    return folder
