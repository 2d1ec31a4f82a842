"""Features of the denoiser: one forward pass from pure noise that ends at the last block asked for.

Nothing is denoised: the first latent frame is the encoded picture, all others are noise, and what the blocks say about them is what
a decoder reads (Video Prediction Policy; WorldArena's planner). Works on the transformer of ``WanDenoiser`` and on any stock
``WanTransformer3DModel`` whose patches are one latent frame deep, such as Wan2.2-TI2V-5B's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.types import FeatureRequest, RolloutRequest

from .backbones.wan import Embedded, block_forward, embed
from .flow_matching import frame_timesteps

#: Where the clean picture goes. ``worldarena_compat`` repeats the mistake of WorldArena's released code: its mask is made for tensors
#: [C,F,h,w] but given [B,C,F,h,w], so that index 0 of the second axis is channel 0 instead of frame 0.
FIRST_FRAME_MASKS = ("correct", "worldarena_compat")


def check_features(request: FeatureRequest | None, blocks: int) -> FeatureRequest:
    """``request`` if a model of so many ``blocks`` can answer it; raises ``UserError`` or ``MissingCapabilityError`` if not."""
    if request is None:
        raise UserError("features", got=None, wanted="which blocks to read", fix="features=FeatureRequest(taps=(...))")
    taps = request.taps
    if not taps or list(taps) != sorted(set(taps)):
        fix = "for instance taps=(2, 4, 6)"
        raise UserError("features.taps", got=taps, wanted="rising numbers of blocks, counted from 1", fix=fix)
    if taps[0] < 1 or taps[-1] > blocks:
        wanted = f"blocks 1..{blocks}"
        raise MissingCapabilityError("features.taps", got=taps, wanted=wanted, fix="read other blocks")
    if not 0.0 < request.sigma <= 1.0:
        fix = "1.0 is where a sampler starts"
        raise UserError("features.sigma", got=request.sigma, wanted="a noise level in (0, 1]", fix=fix)
    if request.first_frame_mask not in FIRST_FRAME_MASKS:
        wanted = f"one of {', '.join(FIRST_FRAME_MASKS)}"
        raise UserError("features.first_frame_mask", got=request.first_frame_mask, wanted=wanted, fix="use correct")
    return request


def check_asked(request: RolloutRequest, blocks: int) -> None:
    """Raise where features are wanted that a model of so many ``blocks`` cannot give, or named and not wanted."""
    if "features" in request.returns:
        check_features(request.features, blocks)
    elif request.features is not None:
        fix = "add features to returns, or leave features out"
        raise UserError("features", got=request.features, wanted="features among returns", fix=fix)


def first_pass(first_BC1hw: Tensor, noise_BCFhw: Tensor, request: FeatureRequest) -> tuple[Tensor, Tensor]:
    """What the transformer is shown: (latents [B,C,F,h,w], timesteps [B,F]).

    ``correct``: frame 0 is the clean latent with timestep 0; the others are the noise with timestep ``1000 sigma``.
    ``worldarena_compat``: channel 0 of every frame is channel 0 of the clean latent, the other channels are noise in every frame, and
    every timestep is 0. Frames are pure noise at any ``sigma``: their content is not known before something is denoised.
    """
    assert first_BC1hw.shape[2] == 1 and first_BC1hw.shape[:2] == noise_BCFhw.shape[:2]
    batch, _, frames = noise_BCFhw.shape[:3]
    if request.first_frame_mask == "worldarena_compat":
        channel = first_BC1hw[:, :1].expand(-1, -1, frames, -1, -1)
        return torch.cat([channel, noise_BCFhw[:, 1:]], dim=1), noise_BCFhw.new_zeros(batch, frames)
    sigma = torch.full((batch,), request.sigma, dtype=torch.float32, device=noise_BCFhw.device)
    latents = torch.cat([first_BC1hw, noise_BCFhw[:, :, 1:]], dim=2)
    return latents, frame_timesteps(sigma, frames)


def block_outputs(blocks: Sequence[Any], embedded: Embedded, taps: Sequence[int]) -> list[Tensor]:
    """Outputs [B,L,D] of the blocks ``taps`` (rising, counted from 1). Blocks behind the last tap are not computed."""
    x, found = embedded.x_BLD, []
    for number, block in enumerate(blocks[: taps[-1]], start=1):
        x = block_forward(block, x, embedded.context_BLD, embedded.modulation_BF6D, embedded.rotary)
        if number in taps:
            found.append(x)
    return found


def partial_forward(
    transformer: Any,
    latents_BCFhw: Tensor,
    timesteps_BF: Tensor,
    context_BLD: Tensor,
    taps: Sequence[int],
    *,
    action_BFD: Tensor | None = None,
) -> Tensor:
    """Block outputs of a ``WanTransformer3DModel`` on a token grid, [B,K,F,h,w,D] in the transformer's precision.

    ``timesteps_BF``: one a latent frame, as TI2V-5B has them; ``context_BLD``: text tokens, padded as in the model's training;
    ``action_BFD``: what an action model adds to its time embedding.
    """
    weight = transformer.patch_embedding.weight
    latents, context = latents_BCFhw.to(weight.dtype), context_BLD.to(weight.dtype)
    embedded = embed(transformer, latents, timesteps_BF, context, action_BFD)
    _, high, wide = transformer.config.patch_size
    grid = (latents_BCFhw.shape[2], latents_BCFhw.shape[3] // high, latents_BCFhw.shape[4] // wide)
    found = block_outputs(transformer.blocks, embedded, taps)
    return torch.stack([x.unflatten(1, grid) for x in found], dim=1)


def denoiser_features(
    transformer: Any,
    first_BC1hw: Tensor,
    noise_BCFhw: Tensor,
    context_BLD: Tensor,
    request: FeatureRequest,
    *,
    action_BFD: Tensor | None = None,
) -> Tensor:
    """Features [B,K,F,h,w,D] that ``request`` names, from the clean first latent and the noise of each sample."""
    check_features(request, len(transformer.blocks))
    latents, timesteps = first_pass(first_BC1hw, noise_BCFhw, request)
    return partial_forward(transformer, latents, timesteps, context_BLD, request.taps, action_BFD=action_BFD)
