"""Shapes that windows are cut to: frames, rows and columns of pixels, such as ``81x480x640``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from physisforcing.core.errors import UserError


@dataclass(slots=True, frozen=True, order=True)
class Bucket:
    """``frames`` of ``rows`` x ``columns`` pixels."""

    frames: int
    rows: int
    columns: int

    @classmethod
    def parse(cls, text: str, stride: Sequence[int], patch: Sequence[int], prefix: str = "") -> Bucket:
        """``81x480x640``. ``stride``: pixel frames, rows and columns of a latent cell; ``patch``: latent cells of a token; ``prefix``: before the
        name of the setting in messages.

        ``UserError`` for other text, and for a shape that is not a whole number of tokens, with the nearest one that is.
        """
        try:
            frames, rows, columns = (int(part) for part in text.lower().split("x"))
        except ValueError as error:
            fix = f"{prefix}buckets=[81x480x640]"
            raise UserError(f"{prefix}buckets", got=text, wanted="FRAMESxROWSxCOLUMNS", fix=fix) from error
        near = [1 + stride[0] * max(1, round((frames - 1) / stride[0]))]
        for side, cell, cells in zip((rows, columns), stride[1:], patch[1:], strict=True):
            near.append(cell * cells * max(1, round(side / (cell * cells))))
        if [frames, rows, columns] != near:
            wanted = (
                f"1 + {stride[0]}k frames, multiples of {stride[1] * patch[1]} rows and {stride[2] * patch[2]} columns"
            )
            fix = f"{prefix}buckets=[{'x'.join(map(str, near))}]"
            raise UserError(f"{prefix}buckets", got=text, wanted=wanted, fix=fix)
        return cls(frames, rows, columns)

    @property
    def name(self) -> str:
        return f"{self.frames}x{self.rows}x{self.columns}"

    @property
    def size(self) -> tuple[int, int]:
        return self.rows, self.columns


def choose(buckets: Sequence[Bucket], frames: int, size: tuple[int, int]) -> Bucket | None:
    """The bucket of a video of so many frames of ``size`` (H, W): of those that it fills the longest, of these the one with the nearest
    ratio of its sides, then the largest. None where it fills none."""
    fitting = [bucket for bucket in buckets if bucket.frames <= frames]
    if not fitting:
        return None
    longest = max(bucket.frames for bucket in fitting)
    ratio = math.log(size[1] / size[0])

    def badness(bucket: Bucket) -> tuple[float, int]:
        return round(abs(math.log(bucket.columns / bucket.rows) - ratio), 6), -bucket.rows * bucket.columns

    return min((bucket for bucket in fitting if bucket.frames == longest), key=badness)
