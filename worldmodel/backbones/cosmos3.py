"""Cosmos3 (diffusers' ``Cosmos3OmniTransformer``) as a video backbone: pictures and sentence, no sound and no actions.

Two streams of tokens run through every layer: text (causal) and pictures, which read both. A sample is one packed sequence without a
batch axis, so samples of a batch are computed one after the other. The first latent frame is the clean picture: its tokens get no
embedding of the time, all others get the same one added. The tap is the stream of the pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from physisforcing.core.errors import UserError

from .protocol import call_block, check_tap, pin, to_timesteps

#: Attention of the pictures' stream, as in the framework that the model comes from.
COSMOS3_LORA_TARGETS = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
#: Frames a second of the model's own videos.
COSMOS3_FPS = 24.0
#: Pixel frames of a latent frame, which positions in time are counted in.
TEMPORAL_STRIDE = 4


@dataclass(slots=True, kw_only=True)
class _Packed:
    """A sample on its way through the layers: text and picture tokens, their rotary positions, (F,h,w) tokens, sizes of the latents."""

    und: Tensor
    gen: Tensor
    rotary: tuple[Tensor, Tensor, Tensor, Tensor]
    grid: tuple[int, int, int]
    sizes: list[tuple[int, ...]]


class Cosmos3Backbone(nn.Module):
    """A stock ``Cosmos3OmniTransformer`` behind the ``VideoBackbone`` protocol.

    ``fps``: frames a second of the videos; positions in time depend on it. ``exact_times``: embed the time once a token, as the stock
    forward does, instead of once: slower, and bit-equal to it in float32.

    Raises ``UserError`` for ``first_latent="mask"``, which the model does not have.
    """

    lora_targets = COSMOS3_LORA_TARGETS

    def __init__(
        self,
        transformer: Any,
        *,
        stride: tuple[int, int, int] = (TEMPORAL_STRIDE, 16, 16),
        first_latent: str = "pinned",
        tap: int | None = None,
        fps: float = COSMOS3_FPS,
        exact_times: bool = False,
    ) -> None:
        super().__init__()
        if first_latent != "pinned":
            wanted = "pinned: Cosmos3 has no conditioning channels"
            raise UserError("first_latent", got=first_latent, wanted=wanted, fix="first_latent=pinned")
        config = transformer.config
        self.transformer = transformer
        self.first_latent, self.fps, self.exact_times = first_latent, fps, exact_times
        self.tap = check_tap(tap, len(transformer.layers))
        self.latent_channels = int(config.latent_channel)
        self.stride, self.patch = stride, (1, int(config.latent_patch_size), int(config.latent_patch_size))
        self.run_block: Callable[..., tuple[Tensor, Tensor]] = call_block
        self._positions: dict[tuple[Any, ...], Tensor] = {}

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.layers

    @property
    def width(self) -> int:
        return int(self.transformer.config.hidden_size)

    def conditions(
        self, first_BC1hw: Tensor, text: Tensor, frames: int, *, condition_BCFhw: Tensor | None = None
    ) -> dict[str, Tensor]:
        """See ``VideoBackbone``: the clean latent and the numbers of text tokens, on the CPU."""
        assert condition_BCFhw is None, "Cosmos3 has no conditioning channels"
        return {"first_BC1hw": first_BC1hw, "text_length_B": (text >= 0).sum(1).cpu()}

    def forward(
        self,
        x_BCFhw: Tensor,
        sigma_B: Tensor,
        text_BL: Tensor,
        conditions: Mapping[str, Tensor],
        *,
        need_tap: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``VideoBackbone``; the velocity of latent frame 0 is zero."""
        x_BCFhw = pin(x_BCFhw, conditions["first_BC1hw"])
        timesteps, lengths = to_timesteps(sigma_B), conditions["text_length_B"].tolist()
        packed = [
            self._pack(x_BCFhw[row : row + 1], timesteps[row], text_BL[row, :length])
            for row, length in enumerate(lengths)
        ]
        layers, tapped = list(self.blocks), None
        if need_tap:
            for sample in packed:
                self._run(layers[: self.tap], sample)
            # the rest of the network reads this very tensor, so that both losses have gradients at it
            tapped = torch.stack([sample.gen for sample in packed])
            for row, sample in enumerate(packed):
                sample.gen = tapped[row]
            layers = layers[self.tap :]
        velocities = []
        for sample in packed:
            self._run(layers, sample)
            velocities.append(self._velocity(sample))
        return torch.cat(velocities), tapped

    def _pack(self, x_1CFhw: Tensor, timestep: Tensor, text_L: Tensor) -> _Packed:
        """One sample as the packed sequence that the layers read."""
        model = self.transformer
        und = model.embed_tokens(text_L)
        packed, sizes = model._patchify_and_pack_latents([x_1CFhw.to(model.proj_in.weight.dtype)])
        frames, high, wide = sizes[0][0], *(-(-side // self.patch[1]) for side in sizes[0][1:])
        clean = high * wide
        tokens = model.proj_in(packed)
        tokens = torch.cat([tokens[:clean], tokens[clean:] + self._time(timestep, len(tokens) - clean).to(und.dtype)])
        grid = (frames, high, wide)
        rotary = self._rotary(len(text_L), grid, und)
        return _Packed(und=und, gen=tokens.to(und.dtype), rotary=rotary, grid=grid, sizes=sizes)

    def _run(self, layers: list[nn.Module], sample: _Packed) -> None:
        for layer in layers:
            sample.und, sample.gen = self.run_block(layer, sample.und, sample.gen, sample.rotary)

    def _velocity(self, sample: _Packed) -> Tensor:
        """The stock forward after its last layer: [1,C,F,h,w], zero in latent frame 0."""
        model, (frames, high, wide) = self.transformer, sample.grid
        noisy = torch.arange(1, frames, device=sample.gen.device)
        predicted = model.proj_out(model.norm_moe_gen(sample.gen)[high * wide :])
        return model._unpatchify_and_unpack_latents(
            predicted,
            token_shapes_vision=[sample.grid],
            noisy_frame_indexes_vision=[noisy],
            original_latent_shapes=sample.sizes,
        )[0]

    def _time(self, timestep: Tensor, tokens: int) -> Tensor:
        """Embedding of the time: one row for all noisy tokens, or one each."""
        model = self.transformer
        scaled = timestep.expand(tokens if self.exact_times else 1) * model.config.timestep_scale
        dtype = next(model.time_embedder.parameters()).dtype
        return model.time_embedder(model.time_proj(scaled).to(dtype))

    def _rotary(self, text: int, grid: tuple[int, int, int], like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cosine and sine of the text's positions and of the pictures', in the precision of ``like``."""
        positions = self._position_ids(text, grid).to(like.device)
        cos, sin = self.transformer.rotary_emb(
            position_ids=positions.unsqueeze(1), device=like.device, dtype=like.dtype
        )
        cos, sin = cos.squeeze(0), sin.squeeze(0)
        return cos[:text], sin[:text], cos[text:], sin[text:]

    def _position_ids(self, text: int, grid: tuple[int, int, int]) -> Tensor:
        """Positions [3,L] of the packed sequence on the CPU, by diffusers' own functions; the last few kept."""
        from diffusers.pipelines.cosmos import pipeline_cosmos3_omni as stock

        key = (text, grid, self.fps)
        if key not in self._positions:
            config = self.transformer.config
            scaled = bool(config.enable_fps_modulation)
            with torch.device("cpu"):  # whatever the default device is
                words, after = stock.get_3d_mrope_ids_text_tokens(text, temporal_offset=0, use_float_positions=scaled)
                cells, _ = stock.get_3d_mrope_ids_vae_tokens(
                    *grid,
                    temporal_offset=after + config.unified_3d_mrope_temporal_modality_margin,
                    reset_spatial_indices=config.unified_3d_mrope_reset_spatial_ids,
                    fps=self.fps if scaled else None,
                    base_fps=float(config.base_fps),
                    temporal_compression_factor=self.stride[0],
                )
            if len(self._positions) >= 64:
                del self._positions[next(iter(self._positions))]
            self._positions[key] = torch.cat([words, cells], dim=1)
        return self._positions[key]
