"""What a teacher is: a frozen network or algorithm that says where points go, how far they are, or what looks alike.

Teachers see pictures as uint8 and answer in the units that the physics losses take; resizing and normalisation are their own
business. They never download or run anything by themselves: weights and sources come from the user's disk, by path and checksum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

#: SPDX names of licences under which weights may be used for anything, products included.
PERMISSIVE = ("Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause")


@dataclass(slots=True, kw_only=True, frozen=True)
class TeacherInfo:
    """Identity of a teacher, stored with every target it makes.

    ``version`` covers the adapter's preprocessing, ``licence`` is that of the weights (SPDX; of the code where there are none) and
    ``checksum`` their SHA-256 (empty where there are none).
    """

    name: str
    version: str
    licence: str
    checksum: str = ""

    @property
    def permissive(self) -> bool:
        return self.licence in PERMISSIVE

    @property
    def key(self) -> str:
        """Part of every cache key: changes with the weights and with the preprocessing."""
        return "/".join(part for part in (self.name, self.version, self.checksum[:12]) if part)


@dataclass(slots=True, kw_only=True)
class Tracks:
    """Where N points go over T frames.

    ``points_BTN2``: float32 pixels (x, y) of the video given, integers at pixel centres, also where a point is hidden.
    ``visible_BTN``: bool. ``confidence_BTN``: float32 in [0,1], ones where the tracker has none.
    """

    points_BTN2: Tensor
    visible_BTN: Tensor
    confidence_BTN: Tensor


@runtime_checkable
class PointTracker(Protocol):
    """Tracks points of the first frame."""

    @property
    def info(self) -> TeacherInfo: ...

    def track(self, video_BTHWC: Tensor, queries_BN2: Tensor) -> Tracks:
        """``video_BTHWC`` uint8; ``queries_BN2`` float32 pixels of frame 0. Frame 0 of the answer holds the queries."""
        ...


@runtime_checkable
class DepthEstimator(Protocol):
    """Depth of single pictures, up to scale."""

    @property
    def info(self) -> TeacherInfo: ...

    @property
    def kind(self) -> str:
        """``metric`` (larger is farther) or ``disparity`` (larger is nearer): what ``foreground_weight`` has to be told."""
        ...

    def depth(self, frames_BHWC: Tensor) -> Tensor:
        """uint8 [B,H,W,3] -> float32 [B,H,W]."""
        ...


@runtime_checkable
class VideoEncoder(Protocol):
    """Features of a video on the token grid of the denoiser."""

    @property
    def info(self) -> TeacherInfo: ...

    @property
    def channels(self) -> int: ...

    @property
    def per_frame(self) -> bool:
        """Whether the features of a latent frame depend on its last picture alone, so that windows which overlap share them."""
        ...

    def encode(self, video_BTHWC: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """uint8 [B,T,H,W,3] with T = 1 + 4 (F - 1) -> float32 [B,F,h,w,C] for ``grid`` (F, h, w)."""
        ...
