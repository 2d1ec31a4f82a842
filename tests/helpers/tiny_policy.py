"""A world-action model of a few thousand weights, with every layer away from zero."""

from __future__ import annotations

from typing import Any

import torch

from physisforcing.policy.config import PolicyModelConfig
from physisforcing.policy.model import WorldActionModel

#: Latents [B,C,F,h,w] of the tiny model: 3 latent frames of 2x3 tokens.
SHAPE = (2, 4, 3, 4, 6)
TEXT = (2, 5, 12)


def tiny_transformer(seed: int = 0, **sizes: Any) -> Any:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    torch.manual_seed(seed)
    options = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4,
        "text_dim": 12, "freq_dim": 16, "ffn_dim": 64, "num_layers": 3,
    }  # fmt: skip
    return WanTransformer3DModel(**(options | sizes))


def tiny_policy(mode: str = "first_frame", *, seed: int = 0, **settings: Any) -> WorldActionModel:
    """Random weights everywhere, the head's too, which a new model has zero."""
    options = {"action_dim": 3, "state_dim": 3, "chunk": 8, "steps_per_latent": 4.0, "width": 16, "ffn_dim": 24}
    model = WorldActionModel(tiny_transformer(seed), PolicyModelConfig(mode=mode, **(options | settings)))
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.expert.proj_out.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def tiny_batch(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    batch: dict[str, torch.Tensor] = {"latents_BCFhw": normal(*SHAPE), "text": normal(*TEXT), "state_BA": normal(2, 3)}
    batch["actions_BPA"] = normal(2, 8, 3)
    batch["action_valid_BP"] = torch.ones(2, 8, dtype=torch.bool)
    batch["frame_valid_BF"] = torch.ones(2, 3, dtype=torch.bool)
    return batch
