"""Real windows as the video codec gives them back: what an imagined video would look like if the imagination were perfect.

The decoder reads decoded latents at run time, so half of its training pictures went through the codec. Encoding and decoding
a window costs more than a training step of the decoder; therefore a pool of round-trip windows is filled once and a few of
its entries are replaced in every step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from physisforcing.worldmodel.codec import VideoCodec, to_uint8

from .frame_store import FrameStore


@torch.no_grad()
def round_trip(codec: VideoCodec, frames_BTHWC: Tensor, *, latent_noise: float, generator: torch.Generator) -> Tensor:
    """uint8 [B,T,H,W,3] -> encode, add Gaussian noise of standard deviation U(0, ``latent_noise``) a window, decode -> uint8.

    Latents are normalised by the codec, so that the noise is relative to a unit scale.
    """
    kind = frames_BTHWC.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        latents = codec.encode(frames_BTHWC)
        if latent_noise > 0:
            shape = (len(latents),) + (1,) * (latents.ndim - 1)
            scale = latent_noise * torch.rand(shape, generator=generator, device=latents.device)
            noise = torch.randn(latents.shape, generator=generator, device=latents.device)
            latents = latents + (scale * noise).to(latents.dtype)
        return to_uint8(codec.decode(latents))


class RoundTripPool:
    """``size`` round-trip windows of random episodes on the device, refreshed a few at a time in ring order."""

    def __init__(
        self,
        store: FrameStore,
        codec: VideoCodec,
        *,
        size: int,
        allowed_E: Tensor,
        frames: int,
        stride: int,
        start_share: float,
        latent_noise: float,
        generator: torch.Generator,
        batch: int = 32,
    ) -> None:
        self.store, self.codec, self.allowed_E = store, codec, allowed_E
        self.frames, self.stride, self.start_share, self.latent_noise = frames, stride, start_share, latent_noise
        self.generator, self.position = generator, 0
        first = self._make(min(batch, size))
        self.pictures, self.now, self.targets = (t.new_empty((size, *t.shape[1:])) for t in first)
        self._put(first)
        filled = len(first[0])
        while filled < size:
            part = self._make(min(batch, size - filled))
            self._put(part)
            filled += len(part[0])

    def refresh(self, count: int) -> None:
        """Replace the ``count`` oldest windows."""
        if count:
            self._put(self._make(count))

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random entries as ``FrameStore.windows`` returns them."""
        rows = torch.randint(len(self.now), (count,), generator=self.generator, device=self.now.device)
        return self.pictures[rows], self.now[rows], self.targets[rows]

    def _make(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        episode, start = self.store.draw(
            count, allowed_E=self.allowed_E, start_share=self.start_share, generator=self.generator
        )
        pictures, now, targets = self.store.windows(episode, start, frames=self.frames, stride=self.stride)
        return round_trip(self.codec, pictures, latent_noise=self.latent_noise, generator=self.generator), now, targets

    def _put(self, part: tuple[Tensor, Tensor, Tensor]) -> None:
        rows = (torch.arange(len(part[0]), device=self.now.device) + self.position) % len(self.now)
        for whole, new in zip((self.pictures, self.now, self.targets), part, strict=True):
            whole[rows] = new
        self.position = (self.position + len(part[0])) % len(self.now)
