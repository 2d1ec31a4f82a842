"""A text model and an action model small enough to run in tests, with a codec."""

from __future__ import annotations

import torch

from physisforcing.worldmodel.autoencoder import CausalVideoAutoencoder
from physisforcing.worldmodel.backbones.actions import ActionConfig
from physisforcing.worldmodel.backbones.wan import ConditionerConfig, WanConfig, build_denoiser
from physisforcing.worldmodel.model import FlowWorldModel

TINY = WanConfig(latent_channels=4, num_heads=2, head_dim=12, num_layers=3, ffn_dim=32, tap=2)
FRAMES, ROWS = 3, 8


def text_denoiser():
    torch.manual_seed(0)
    model = build_denoiser(TINY, ConditionerConfig(hidden=16))
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.1)
    return model


def action_denoiser(*, trained: bool = True):
    """A text model with actions; ``trained``: its projection is not zero any more."""
    model = text_denoiser()
    added = model.add_actions(ActionConfig(hidden=24))
    if trained:
        torch.nn.init.normal_(added.project.weight, std=0.5)
    return model


def inputs(batch: int = 2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, FRAMES, 4, 5, generator=generator)
    timesteps = torch.tensor([[0.0, 300.0, 300.0], [0.0, 900.0, 900.0]])[:batch]
    text, state = torch.randn(batch, 32, 384, generator=generator), torch.randn(batch, 3, 14, generator=generator)
    actions = torch.randn(batch, ROWS * (FRAMES - 1), 14, generator=generator)
    return x, timesteps, text, state, actions


class FixedText:
    def batch(self, sentences):
        rows = [torch.full((32, 384), 0.01 * len(sentence)) for sentence in sentences]
        return torch.stack(rows), torch.ones(len(rows), 32, dtype=torch.bool)


def tiny_codec():
    """A codec of few channels whose latents are taken as they are."""
    torch.manual_seed(0)
    made = CausalVideoAutoencoder(
        latent_channels=4, fine_channels=8, decoder_fine_channels=8, coarse_channels=8, group_channels=8
    )
    made.set_statistics(torch.zeros(4), torch.ones(4))
    return made.eval()


def world_model(denoiser, codec):
    settings = {
        "name": "x", "frames": 17, "frame_stride": 2, "sample_shift": 3.0, "denoising_steps": 2, "home_state": [0.0] * 14
    }  # fmt: skip
    return FlowWorldModel(denoiser, codec, settings, weights_fingerprint="w", text=FixedText())
