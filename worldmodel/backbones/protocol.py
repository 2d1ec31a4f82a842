"""What a trainer and a sampler ask of a video backbone, whatever its architecture: one protocol, and how the first latent frame is shown.

Conventions are those of ``flow_matching``: ``x_t = (1 - s) x0 + s eps``, velocity ``eps - x0``, timestep ``1000 s``. Latents are
normalised. Blocks count from 1, tapped tokens are row-major (F,h,w) on the patch grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from physisforcing.core.errors import UserError

#: ``mask``: every latent frame is noisy and predicted, the picture comes in through extra channels (Wan2.2-I2V-A14B as released).
#: ``pinned``: latent frame 0 is the clean picture with timestep 0, not predicted (TI2V-5B, Cosmos3, and PF_Wan on top of the mask).
FIRST_LATENT = ("mask", "pinned")


class VideoBackbone(Protocol):
    """A velocity predictor over a stock diffusers transformer; an ``nn.Module`` too.

    ``transformer``: the stock module, which is what is exported. ``tap``: the block, counted from 1, whose output the physics losses
    read. ``stride``: pixel frames, rows and columns of a latent cell; ``patch``: latent frames, rows and columns of a token.
    ``first_latent``: one of ``FIRST_LATENT``. ``lora_targets``: ends of the names of the modules that LoRA is put on by default.
    ``run_block(block, *inputs)`` calls a block; a trainer replaces it to recompute activations. Blocks are called as modules, so that
    FSDP, ``block.compile()`` and hooks work on each of them.
    """

    transformer: Any
    tap: int
    latent_channels: int
    stride: tuple[int, int, int]
    patch: tuple[int, int, int]
    first_latent: str
    lora_targets: tuple[str, ...]
    run_block: Callable[..., Any]

    @property
    def blocks(self) -> nn.ModuleList:
        """The repeated blocks, for compilation, recomputation and sharding."""
        ...

    @property
    def width(self) -> int:
        """Numbers of a tapped token."""
        ...

    def conditions(
        self, first_BC1hw: Tensor, text: Tensor, frames: int, *, condition_BCFhw: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What ``forward`` needs beside noise, noise level and text, fixed for a sample: computed once, cached, batched by stacking.

        ``first_BC1hw``: the clean latent of the first picture. ``frames``: latent frames. ``condition_BCFhw``: latents of the first
        picture followed by grey (``PipelineVae.encode_first``), for backbones with conditioning channels and for no others.
        """
        ...

    def __call__(
        self,
        x_BCFhw: Tensor,
        sigma_B: Tensor,
        text: Tensor,
        conditions: Mapping[str, Tensor],
        *,
        need_tap: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """-> (velocity like ``x_BCFhw``, output of block ``tap`` [B,F*h*w,D] or None).

        ``sigma_B``: noise levels in [0,1]. ``text``: embeddings [B,L,D] of an encoder, or token ids int64 [B,L] with -1 behind the
        last one. Where the first latent is pinned, frame 0 of ``x_BCFhw`` is replaced and its velocity means nothing.
        """
        ...


def first_predicted(backbone: VideoBackbone) -> int:
    """The first latent frame that is predicted: the flow-matching loss is over frames from here on."""
    return 1 if backbone.first_latent == "pinned" else 0


def pin(x_BCFhw: Tensor, first_BC1hw: Tensor) -> Tensor:
    """``x_BCFhw`` with the clean latent in frame 0."""
    return torch.cat([first_BC1hw.to(x_BCFhw.dtype), x_BCFhw[:, :, 1:]], dim=2)


def to_timesteps(sigma_B: Tensor) -> Tensor:
    """``1000 sigma`` as float32; a float64 level keeps a sampler's whole-numbered timestep exactly."""
    return (1000.0 * sigma_B).float()


def call_block(block: nn.Module, *inputs: Any) -> Any:
    """The plain ``run_block``."""
    return block(*inputs)


def check_tap(tap: int | None, blocks: int) -> int:
    """``tap``, or the middle block where it is None (15 of 30 in the paper's 5B, 20 of 40 in A14B). ``UserError`` for no block."""
    if tap is None:
        return blocks // 2
    if not 1 <= tap <= blocks:
        raise UserError("tap", got=tap, wanted=f"a block from 1 to {blocks}", fix=f"tap={blocks // 2}")
    return tap
