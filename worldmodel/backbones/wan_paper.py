"""Wan2.2-I2V-A14B, Wan2.2-TI2V-5B and other Wan-shaped transformers of diffusers as video backbones.

The forward is the small models' (``wan.py``): the stock sub-modules with modulations once a latent frame. A14B differs in 20 more
input channels (mask and latents of the first picture) and, with ``first_latent="mask"``, in one timestep a sample.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from physisforcing.core.errors import UserError, unknown_name

from .protocol import FIRST_LATENT, call_block, check_tap, pin, to_timesteps
from .sequence import SequenceSplit, SplitAttention
from .wan import WAN_LORA_TARGETS, Embedded, OverWan, block_forward, embed, unembed

#: Channels that say which pixel frames of a latent frame are given: as many as a latent frame has pixel frames.
MASK_CHANNELS = 4


class WanBackbone(OverWan, nn.Module):
    """A stock ``WanTransformer3DModel`` behind the ``VideoBackbone`` protocol.

    ``first_latent``: ``mask`` or ``pinned`` where the transformer has conditioning channels (36 in, 16 out), ``pinned`` where it has
    none. ``stride``: that of its autoencoder. ``exact_times``: modulations once a token, as in the stock forward, instead of once a latent
    frame: slower, with more memory, and bit-equal to it in float32, where a matrix product with fewer rows may round differently.

    Raises ``UserError`` for a transformer with an image encoder's branch (Wan2.1 image-to-video), for patches deeper than one latent
    frame, and for channels that are neither kind.
    """

    lora_targets = WAN_LORA_TARGETS

    def __init__(
        self,
        transformer: Any,
        *,
        stride: tuple[int, int, int],
        first_latent: str = "pinned",
        tap: int | None = None,
        exact_times: bool = False,
    ) -> None:
        super().__init__()
        config = transformer.config
        self.latent_channels = int(config.out_channels)
        self.conditioned = has_condition(config)
        if first_latent not in FIRST_LATENT:
            raise unknown_name("first_latent", first_latent, FIRST_LATENT, see="docs/paper_scale.md")
        if first_latent == "mask" and not self.conditioned:
            wanted = f"pinned: {config.in_channels} input channels have no place for a mask"
            raise UserError("first_latent", got=first_latent, wanted=wanted, fix="first_latent=pinned")
        self.transformer = transformer
        self.first_latent, self.exact_times = first_latent, exact_times
        self.tap = check_tap(tap, len(transformer.blocks))
        self.stride = stride
        self.run_block: Callable[..., Tensor] = call_block
        self.split: SequenceSplit | None = None
        for block in transformer.blocks:
            block.__class__ = frame_block()

    def conditions(
        self, first_BC1hw: Tensor, text: Tensor, frames: int, *, condition_BCFhw: Tensor | None = None
    ) -> dict[str, Tensor]:
        """See ``VideoBackbone``; ``text`` is not read. The mask is put before the conditioning latents here."""
        made = {"first_BC1hw": first_BC1hw}
        if not self.conditioned:
            assert condition_BCFhw is None, "this transformer has no conditioning channels"
            return made
        if condition_BCFhw is None:
            wanted = f"latents of the first picture and grey, {frames} frames: {self.transformer.config.in_channels} channels"
            raise UserError("condition_BCFhw", got=None, wanted=wanted, fix="PipelineVae.encode_first, cached once")
        batch, _, _, height, width = condition_BCFhw.shape
        assert condition_BCFhw.shape[:3] == (batch, self.latent_channels, frames)
        mask = condition_BCFhw.new_zeros(batch, MASK_CHANNELS, frames, height, width)
        mask[:, :, 0] = 1.0
        return made | {"condition_BCFhw": torch.cat([mask, condition_BCFhw], dim=1)}

    def forward(
        self,
        x_BCFhw: Tensor,
        sigma_B: Tensor,
        text_BLD: Tensor,
        conditions: Mapping[str, Tensor],
        *,
        need_tap: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``VideoBackbone``."""
        model = self.transformer
        if self.first_latent == "pinned":
            x_BCFhw = pin(x_BCFhw, conditions["first_BC1hw"])
        if self.conditioned:
            x_BCFhw = torch.cat([x_BCFhw, conditions["condition_BCFhw"].to(x_BCFhw.dtype)], dim=1)
        at = self._embed(x_BCFhw, to_timesteps(sigma_B), text_BLD)
        x, rotary, tapped, split, frames = at.x_BLD, at.rotary, None, self.split, x_BCFhw.shape[2]
        if split is not None:
            x, rotary = split.share(x, frames), tuple(split.share(part, frames) for part in rotary)
        for index, block in enumerate(model.blocks, start=1):
            x = self.run_block(block, x, at.context_BLD, at.modulation_BF6D, rotary)
            if need_tap and index == self.tap:
                tapped = x
        if split is not None:
            x, tapped = split.whole(x, frames), None if tapped is None else split.whole(tapped, frames)
        return unembed(model, x, at.temb_BFD, x_BCFhw.shape), tapped

    def share_samples(self, split: SequenceSplit) -> None:
        """From here on a sample is computed by the processes of ``split`` together, whose number divides the heads and the tokens of a frame."""
        assert self.transformer.config.num_attention_heads % split.count == 0
        assert not self.exact_times, "modulations of whole frames alone are shared"
        self.split = split
        for block in self.transformer.blocks:
            block.attn1.set_processor(SplitAttention(split))

    def _embed(self, x_BCFhw: Tensor, timestep_B: Tensor, text_BLD: Tensor) -> Embedded:
        """What the blocks read, in the precision of the transformer."""
        model, dtype = self.transformer, self.transformer.patch_embedding.weight.dtype
        x, text = x_BCFhw.to(dtype), text_BLD.to(dtype)
        times = timestep_B[:, None]
        if self.first_latent == "mask":
            return embed(model, x, times, text)
        times = times.repeat(1, x.shape[2])
        times[:, 0] = 0.0
        if not self.exact_times:
            return embed(model, x, times, text)
        tokens = x.shape[3] // self.patch[1] * (x.shape[4] // self.patch[2])
        # A row a token to the end: some libraries round equal rows of one product differently.
        return embed(model, x, times.repeat_interleave(tokens, dim=1), text)


def has_condition(config: Any) -> bool:
    """Whether a ``WanTransformer3DModel`` of this config reads a mask and latents beside the noisy latents. ``UserError`` for others."""
    if config.image_dim is not None or config.added_kv_proj_dim is not None:
        got = f"image_dim {config.image_dim}, added_kv_proj_dim {config.added_kv_proj_dim}"
        fix = "use Wan2.2-I2V-A14B or Wan2.2-TI2V-5B"
        raise UserError("transformer", got=got, wanted="a Wan transformer without an image encoder's branch", fix=fix)
    if config.patch_size[0] != 1:
        got = f"patch_size {list(config.patch_size)}"
        raise UserError("transformer", got=got, wanted="patches one latent frame deep", fix="use another transformer")
    extra = config.in_channels - config.out_channels
    if extra not in (0, MASK_CHANNELS + config.out_channels):
        got = f"{config.in_channels} channels in, {config.out_channels} out"
        wanted = f"as many in as out, or {2 * config.out_channels + MASK_CHANNELS}: noise, mask and first picture"
        raise UserError("transformer", got=got, wanted=wanted, fix="use an image-to-video or TI2V transformer")
    return extra > 0


@functools.cache
def frame_block() -> type[nn.Module]:
    """The stock block with a forward that also takes modulations once a latent frame.

    The class of the stock blocks is replaced, not the modules: names, parameters and exports stay, and a call of the block is still a
    call of the module, which sharding, compilation and hooks need. The stock transformer's own forward works as before.
    """
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    class WanFrameBlock(WanTransformerBlock):
        def forward(
            self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: tuple[Tensor, Tensor]
        ) -> Tensor:
            modulation = (
                temb.unsqueeze(1) if temb.ndim == 3 else temb
            )  # the stock forward gives one a sample without frames
            return block_forward(self, hidden_states, encoder_hidden_states, modulation, rotary_emb)

    # tools find repeated blocks by the stock name (``_no_split_modules``, ``_repeated_blocks``)
    WanFrameBlock.__name__ = WanFrameBlock.__qualname__ = WanTransformerBlock.__name__
    return WanFrameBlock
