"""Joint targets from the latents of a rollout, without decoding them to pictures.

Latent k holds four pictures; it is read together with the latent before it and the first one. A convolutional encoder whose pooling
keeps positions, a small transformer over the latent frames with the start joints as one more token, and a head that gives every latent
frame after the first the targets of the control steps that lead up to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn

from physisforcing.core.errors import MissingCapabilityError
from physisforcing.core.types import DT, ActionChunk, DecoderNeeds, Rollout
from physisforcing.worldmodel.codec import STRIDE

from .decoder_checks import check_state, check_times, check_trained, present
from .decoder_files import config_of, load_weights, read_config, save_decoder
from .inverse_dynamics import GRIPPERS, HEAT_SCALE, JOINTS, STATISTICS, Residual


@dataclass(slots=True, kw_only=True)
class LatentDecoderConfig:
    """Geometry and size. ``latents_fingerprint``: of the codec whose latents it was trained on."""

    latent_channels: int = 16
    grid: tuple[int, int] = (15, 20)
    frames: int = 17
    steps_per_frame: int = 2
    action_dim: int = 14
    channels: int = 128
    blocks: int = 3
    keypoints: int = 32
    flat_channels: int = 8
    dim: int = 192
    layers: int = 2
    heads: int = 6
    latents_fingerprint: str = ""

    @property
    def latent_frames(self) -> int:
        return 1 + (self.frames - 1) // STRIDE[0]

    @property
    def rows_per_latent(self) -> int:
        """Control steps that lead up to a latent frame."""
        return STRIDE[0] * self.steps_per_frame

    @property
    def chunk(self) -> int:
        return (self.latent_frames - 1) * self.rows_per_latent


class LatentEncoder(nn.Module):
    """Latent maps [N,3C,h,w] -> one vector each [N,dim], positions kept: soft-argmax keypoints and a flattened narrow map."""

    grid: Tensor

    def __init__(self, config: LatentDecoderConfig) -> None:
        super().__init__()
        c, (h, w) = config, config.grid
        self.stem = nn.Conv2d(3 * c.latent_channels, c.channels, 3, padding=1)
        self.blocks = nn.Sequential(*[Residual(c.channels) for _ in range(c.blocks)])
        self.heat = nn.Conv2d(c.channels, c.keypoints, 1)
        self.flat = nn.Conv2d(c.channels, c.flat_channels, 1)
        self.project = nn.Linear(3 * c.keypoints + c.flat_channels * h * w, c.dim)
        self.norm = nn.LayerNorm(c.dim)
        ys, xs = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
        self.register_buffer("grid", torch.stack([xs.flatten(), ys.flatten()], -1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.blocks(self.stem(x)))
        heat, flat = self.heat(hidden).flatten(2), self.flat(hidden).flatten(1)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round positions
            heat = heat.float()
            weights = (HEAT_SCALE * heat).softmax(-1)
            level = (weights * heat).sum(-1)
            read = torch.cat([(weights @ self.grid).flatten(1), level, flat.float()], dim=-1)
            return self.norm(self.project(read))


class LatentInverseDynamics(nn.Module):
    """``forward(latents_BCFhw, state_BA)`` gives ``(targets_BPA, log_variance_BPA)`` as the pixel decoder's does: absolute targets made
    as start + scale * network, log variance of the target divided by ``delta_std_A``. ``core.protocols.InverseDynamics``."""

    state_mean_A: Tensor
    state_std_A: Tensor
    delta_std_A: Tensor

    def __init__(self, config: LatentDecoderConfig | None = None) -> None:
        super().__init__()
        self.config = config or LatentDecoderConfig()
        c = self.config
        self.encoder = LatentEncoder(c)
        self.state_token = nn.Linear(c.action_dim, c.dim)
        self.position = nn.Parameter(0.02 * torch.randn(c.latent_frames + 1, c.dim))
        layer = nn.TransformerEncoderLayer(
            c.dim, c.heads, 4 * c.dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.temporal = nn.TransformerEncoder(layer, c.layers, norm=nn.LayerNorm(c.dim), enable_nested_tensor=False)
        last = nn.Linear(c.dim, 2 * c.rows_per_latent * c.action_dim)
        nn.init.trunc_normal_(last.weight, std=0.02)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(nn.Linear(c.dim + c.action_dim, c.dim), nn.GELU(), last)
        for name in STATISTICS:
            self.register_buffer(name, torch.full((c.action_dim,), float("nan")))
        self.fingerprint = "untrained"

    def set_statistics(self, mean_A: Tensor, std_A: Tensor, delta_std_A: Tensor) -> None:
        """Normalisation of the training data; part of the weights."""
        for name, value in zip(STATISTICS, (mean_A, std_A, delta_std_A), strict=True):
            getattr(self, name).copy_(value)

    def forward(self, latents_BCFhw: Tensor, state_BA: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        z = rearrange(latents_BCFhw, "B C F h w -> B F C h w")
        before = torch.cat([z[:, :1], z[:, :-1]], dim=1)
        x = torch.cat([z, before, z[:, :1].expand_as(z)], dim=2).flatten(0, 1)
        read = self.encoder(x.contiguous(memory_format=torch.channels_last)).unflatten(0, z.shape[:2])
        with torch.autocast(read.device.type, enabled=False):
            state = (state_BA - self.state_mean_A) / self.state_std_A
            tokens = torch.cat([self.state_token(state)[:, None], read], dim=1)
            hidden = self.temporal(tokens + self.position)[:, 2:]
            out = self.head(torch.cat([hidden, state[:, None].expand(-1, hidden.shape[1], -1)], dim=-1))
        mean, log_variance = rearrange(out, "B F (Q P A) -> Q B (F P) A", Q=2, P=c.rows_per_latent, A=c.action_dim)
        return state_BA[:, None] + mean * self.delta_std_A, log_variance.clamp(-12.0, 4.0)

    @property
    def needs(self) -> DecoderNeeds:
        c = self.config
        return DecoderNeeds(
            returns=frozenset({"latents"}),
            horizons=(c.frames,),
            frame_dt=c.steps_per_frame * DT,
            latents_fingerprint=c.latents_fingerprint,
        )

    @torch.inference_mode()
    def decode(
        self, rollout: Rollout, state_BA: NDArray[np.float32], instructions: Sequence[str] = ()
    ) -> list[list[ActionChunk]]:
        """See ``core.protocols.InverseDynamics``; instructions are not read. Grippers are clipped to [0, 1]. On a CPU candidates are
        computed one by one, so that a chunk is bit-equal wherever its rollout stands in a batch."""
        c, latents = self.config, present(rollout.latents_BSCFhw, "latents")
        check_trained(self.delta_std_A, "latent")
        wanted = (c.latent_channels, c.latent_frames, *c.grid)
        if latents.ndim != 6 or latents.shape[2:] != wanted:
            fix = "use the codec and horizon that the decoder was trained with"
            raise MissingCapabilityError("latents_BSCFhw", got=latents.shape, wanted=f"[B,S,{wanted}]", fix=fix)
        check_times(rollout, self.needs)
        batch, samples = latents.shape[:2]
        check_state(state_BA, batch, c.action_dim)
        device = self.delta_std_A.device
        flat = torch.from_numpy(np.ascontiguousarray(latents, np.float32)).flatten(0, 1)
        state = torch.from_numpy(np.array(state_BA, np.float32)).repeat_interleave(samples, dim=0)
        chunks: list[ActionChunk] = []
        for rows in torch.arange(len(flat)).split(1 if device.type == "cpu" else 64):
            targets, log_variance = self(flat[rows].to(device), state[rows].to(device))
            actions = targets.cpu().numpy()
            actions[..., GRIPPERS] = actions[..., GRIPPERS].clip(0.0, 1.0)
            variance = log_variance.exp() * self.delta_std_A**2
            spread = variance[..., JOINTS].mean(-1).sqrt().cpu().numpy()
            chunks += [ActionChunk(actions_PA=a, spread_P=s) for a, s in zip(actions, spread, strict=True)]
        return [chunks[b * samples : (b + 1) * samples] for b in range(batch)]


def save_latent_decoder(model: LatentInverseDynamics, folder: str | Path, *, card: str | None = None) -> Path:
    """Network float16, statistics float32, configuration and card."""
    return save_decoder(model, folder, kind="latent", exact=STATISTICS, card=card)


def load_latent_decoder(folder: str | Path, device: str = "cpu") -> LatentInverseDynamics:
    """What ``save_latent_decoder`` wrote."""
    model = LatentInverseDynamics(config_of(LatentDecoderConfig, read_config(folder), "latent"))
    model.fingerprint = load_weights(model, folder, device)
    return model
