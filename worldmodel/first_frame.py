"""The latent of a single picture with a third of the work: a causal autoencoder without the frames before the first, which are zeros.

A causal convolution of three frames over one picture multiplies two thirds of its weights with padding. Here it is one of two axes with the last
frame's weights, which gives the same sums; and nothing is kept for pictures that would come next.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pipeline_vae import PipelineVae


class FirstFrameEncoder:
    """``PipelineVae.encode`` of single pictures, by the weights of ``vae`` where they lie now; ``vae`` itself stays as it is.

    ``compiled``: the encoder as one function; ``backend``: what compiles it.
    """

    def __init__(
        self, vae: PipelineVae, *, compiled: bool = False, backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        self._vae = vae
        self._encoder = flat_encoder(vae.vae.encoder)
        if compiled:
            self._encoder = torch.compile(self._encoder, dynamic=False, fullgraph=True, backend=backend)  # type: ignore[assignment]

    @torch.no_grad()
    def __call__(self, picture_B3HW: Tensor) -> Tensor:
        """Pictures in [-1,1] -> normalised latents float32 [B,C,1,h,w]; the mode of the encoder's distribution. ``UserError`` as there."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

        vae = self._vae.vae
        self._vae.check_size(1, *picture_B3HW.shape[2:])
        x = picture_B3HW.unsqueeze(2).to(vae.device, vae.dtype)
        if vae.config.patch_size is not None:
            x = patchify(x, patch_size=vae.config.patch_size)
        mean, _ = vae.quant_conv(self._encoder(x)).chunk(2, 1)
        return self._vae.scale.normalised(mean.float())


def flat_encoder(encoder: nn.Module) -> nn.Module:
    """The encoder of videos for single pictures alone: causal convolutions without what comes before. Weights that it uses as they are it shares;
    of the convolutions it has the last frame's, channels last, as the kernels of two axes read them."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    shared = {id(tensor): tensor for tensor in encoder.parameters()}
    made = copy.deepcopy(encoder, shared)
    for name, layer in list(made.named_modules()):
        if isinstance(layer, WanCausalConv3d) and layer.stride[0] == 1:
            made.set_submodule(name, FlatConvolution(layer))
    return made


class FlatConvolution(nn.Module):
    """A causal convolution over one picture [B,C,1,H,W]."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        left, right, top, bottom = layer._padding[:4]
        assert left == right and top == bottom, "padded alike on both sides"
        self.stride, self.padding, self.bias = layer.stride[1:], (top, left), layer.bias
        last = layer.weight.detach()[:, :, -1].contiguous(memory_format=torch.channels_last)
        self.register_buffer("weight", last, persistent=False)

    def forward(self, x_BC1HW: Tensor) -> Tensor:
        made = F.conv2d(x_BC1HW.squeeze(2), self.weight, self.bias, self.stride, self.padding)  # type: ignore[arg-type]
        return made.unsqueeze(2)
