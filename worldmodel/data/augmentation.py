"""A crop or mirror image of a clip, replayed on its targets instead of computing them again.

Coordinates are exact. Features of a frozen encoder are resampled from the tokens of the whole picture, which an encoder that had seen
the crop alone would not give exactly. Mirroring exchanges left and right arm: instructions that name a side, and joints, are then wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor

from physisforcing.core.errors import UserError


@dataclass(slots=True, kw_only=True, frozen=True)
class Crop:
    """A part of a picture, in its pixels, and whether it is mirrored left to right afterwards."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False

    def check(self, size: tuple[int, int]) -> None:
        """``UserError`` unless the crop lies inside a picture of ``size`` (H, W)."""
        bottom, right = self.top + self.height, self.left + self.width
        if min(self.top, self.left) < 0 or min(self.height, self.width) < 1 or bottom > size[0] or right > size[1]:
            got = f"rows {self.top} to {bottom}, columns {self.left} to {right}"
            raise UserError("crop", got=got, wanted=f"a part of a {size[0]}x{size[1]} picture", fix="move or shrink it")

    def frames(self, video_THWC: Tensor, size: tuple[int, int]) -> Tensor:
        """The clip as a model sees it: cropped, resized to ``size`` (antialiased bilinear), mirrored; uint8."""
        self.check((int(video_THWC.shape[1]), int(video_THWC.shape[2])))
        part = video_THWC[:, self.top : self.top + self.height, self.left : self.left + self.width]
        pictures = rearrange(part, "t h w c -> t c h w").float()
        pictures = nnf.interpolate(pictures, size, mode="bilinear", align_corners=False, antialias=True)
        pictures = pictures.flip(-1) if self.flip else pictures
        return rearrange(pictures.round().clamp(0, 255).to(torch.uint8), "t c h w -> t h w c").contiguous()

    def points(self, points: Tensor, size: tuple[int, int]) -> Tensor:
        """Points [...,2] in [0,1] of the whole picture of ``size`` (H, W) -> in [0,1] of the crop; others are outside [0,1)."""
        x = (points[..., 0] * size[1] - self.left) / self.width
        y = (points[..., 1] * size[0] - self.top) / self.height
        return torch.stack([1 - x if self.flip else x, y], -1)

    def features(self, features_FhwC: Tensor, size: tuple[int, int]) -> Tensor:
        """Features on the tokens of the whole picture -> on as many tokens of the crop, bilinear."""
        height, width = features_FhwC.shape[1:3]
        u = (torch.arange(width, device=features_FhwC.device) + 0.5) / width
        v = (torch.arange(height, device=features_FhwC.device) + 0.5) / height
        x = (self.left + self.width * (1 - u if self.flip else u)) / size[1]
        y = (self.top + self.height * v) / size[0]
        place = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1) * 2 - 1
        maps = rearrange(features_FhwC, "f h w c -> f c h w").float()
        found = nnf.grid_sample(
            maps, place.float().expand(len(maps), -1, -1, -1), padding_mode="border", align_corners=False
        )
        return rearrange(found, "f c h w -> f h w c").to(features_FhwC.dtype).contiguous()
