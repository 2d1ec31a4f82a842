"""What is measured of each clip, in one pass over its frames, and the file that remembers it.

``measurements.jsonl`` has a line a clip, keyed by the clip's content and by what was measured; a killed run loses the clip it was at.
Thresholds are not part of the key: deciding anew with others measures nothing again.
"""

from __future__ import annotations

import base64
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from physisforcing.core.digests import file_sha256
from physisforcing.core.errors import DatasetError
from physisforcing.core.results import ResultKey, ResultsFile, config_hash
from physisforcing.core.video import PixelConverter

from ...teachers.frame_encoder import FINGERPRINT, FrameEncoder
from .alignment import LooksItself, TextAlignment
from .decode import Span, SpanReader, cover
from .motion import cut_score, motion_score, sharpness
from .sources import ClipSource

#: Part of the key: raise it when a measure changes.
VERSION = 2
#: Pictures a second that motion and appearance are read from, and the most of them: half a minute.
RATE, MOST = 4.0, 120
#: Height of those pictures, and the sides of the thumbnails that cuts are found in.
HEIGHT, THUMBNAIL = 128, 32
#: Appearance is pooled over this many rows and columns of the picture.
GRID = (2, 3)
NAME = "measurements.jsonl"


@dataclass(slots=True, kw_only=True)
class Measured:
    """A measured clip. ``appearance`` float32 [6*112]: mean features of the frame encoder by part of the picture. ``scene`` float32
    [1280]: the last features of its classifier for the first picture. ``picture``: what a ``TextAlignment`` with a model of its own
    sees, or None. ``error``: why the clip cannot be read; everything else is then empty."""

    id: str
    frames: int = 0
    fps: float = 0.0
    height: int = 0
    width: int = 0
    motion: float = 0.0
    cut: float = 0.0
    sharpness: float = 0.0
    appearance: NDArray[np.float32] | None = None
    scene: NDArray[np.float32] | None = None
    picture: NDArray[np.float32] | None = None
    error: str = ""


def clip_id(span: Span) -> str:
    """32 hexadecimal digits of the SHA-256 of the file's SHA-256 and the piece. ``DatasetError`` where there is no such file."""
    if not os.path.isfile(span.path):  # Path.is_file raises for a name that is too long
        raise DatasetError(
            str(span.path), got="no such file", wanted="a video", fix="correct the path, or copy the file"
        )
    piece = f"{file_sha256(Path(os.path.realpath(span.path)))} {span.start:.6f} {'' if span.seconds is None else f'{span.seconds:.6f}'}"
    return hashlib.sha256(piece.encode()).hexdigest()[:32]


class Measurer:
    """Measures clips and remembers them in ``folder``/``measurements.jsonl``. ``alignment``: what else to see of their pictures."""

    def __init__(self, folder: Path, alignment: TextAlignment | None = None, device: str = "cpu") -> None:
        self.file = ResultsFile(folder / NAME)
        self.looker = alignment if isinstance(alignment, LooksItself) else None
        self.device = device
        self.key = config_hash(
            {
                "version": VERSION,
                "encoder": FINGERPRINT,
                "alignment": "" if self.looker is None else self.looker.key,
                "sampling": [RATE, MOST, HEIGHT, THUMBNAIL, *GRID],
            }
        )
        self._encoder: FrameEncoder | None = None
        self._ids: dict[Span, str] = {}

    def known(self, source: ClipSource) -> Measured | None:
        """What the file says of a clip, None where it says nothing. A clip whose file is gone is measured as such."""
        try:
            key = self._key(source)
        except DatasetError as error:
            return Measured(id="", error=_why(error))
        row = self.file.get(key)
        return None if row is None else _from_row(row)

    def measure(self, source: ClipSource) -> Measured:
        """Measure a clip and write it down. A clip that cannot be read gets a line that says why."""
        key = self._key(source)
        try:
            values = self._look(source.span)
        except DatasetError as error:
            return _from_row(self.file.append(key, "error", why=_why(error)))
        return _from_row(self.file.append(key, "success", **values))

    def run(self, sources: Sequence[ClipSource], *, part: tuple[int, int] = (0, 1), progress: bool = False) -> None:
        """Measure what is missing of every ``part[1]``-th clip from ``part[0]`` on. Copies of a clip are measured once."""
        from tqdm import tqdm

        mine = sources[part[0] :: part[1]]
        for source in tqdm(mine, desc="clips", unit="clip", disable=not progress, file=sys.stderr):
            if self.known(source) is None:
                self.measure(source)

    def _key(self, source: ClipSource) -> ResultKey:
        if source.span not in self._ids:  # reading all of a file for its digest takes as long as decoding some
            self._ids[source.span] = clip_id(source.span)
        return ResultKey(manifest="clips", episode=self._ids[source.span], fingerprint=self.key, config="")

    def _look(self, span: Span) -> dict[str, Any]:
        with SpanReader(span) as reader:
            header = reader.header
            count, pictures, thumbnails = _pictures(reader.frames(), (header.height, header.width))
        seconds = 1 / min(RATE, header.fps)
        seen = {
            "frames": count,
            "fps": header.fps,
            "height": header.height,
            "width": header.width,
            "motion": motion_score(pictures, seconds),
            "cut": cut_score(thumbnails),
            "sharpness": sharpness(pictures),
        }
        seen |= dict(zip(("appearance", "scene"), map(_packed, self._features(pictures)), strict=True))
        if self.looker is not None:
            seen["picture"] = _packed(self.looker.look(pictures))
        return seen

    @torch.no_grad()
    def _features(self, pictures_THWC: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """``appearance`` and ``scene``; every second picture will do for the mean."""
        if self._encoder is None:
            self._encoder = FrameEncoder().to(self.device)
        chosen = pictures_THWC[::2]
        height, width = chosen.shape[1:3]
        size = 16 * GRID[0] * round(height / 16 / GRID[0]), 16 * GRID[1] * max(1, round(width / 16 / GRID[1]))
        scaled = torch.from_numpy(_even(np.stack([_stretch(picture, size) for picture in chosen])))
        grids = torch.cat([self._encoder(part.to(self.device)) for part in scaled.split(32)])
        pooled = torch.nn.functional.adaptive_avg_pool2d(grids, GRID).mean(0)
        scene = self._encoder.network.semantic(grids[:1]).mean((2, 3))
        return pooled.flatten().cpu().numpy(), scene.flatten().cpu().numpy()


def _pictures(frames: Iterator[tuple[float, Any]], size: tuple[int, int]) -> tuple[int, NDArray[np.uint8], list[Any]]:
    """Number of frames, pictures at ``RATE`` a second (the first ``MOST``), thumbnails of all frames."""
    from av.video.reformatter import Interpolation, VideoReformatter

    to_rgb, count, pictures, thumbnails = PixelConverter("rgb24"), 0, [], []
    reformatter, area = VideoReformatter(), Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
    tiny = {"width": THUMBNAIL, "height": THUMBNAIL, "format": "rgb24", "interpolation": area, "threads": 1}
    small = HEIGHT, max(16, round(HEIGHT * size[1] / size[0]))
    for time, frame in frames:
        count += 1
        thumbnails.append(np.asarray(reformatter.reformat(frame, **tiny).to_ndarray()))
        if len(pictures) < MOST and time >= len(pictures) / RATE - 1e-3:
            pictures.append(cover(np.asarray(to_rgb(frame).to_ndarray(), dtype=np.uint8), small))
    return count, np.stack(pictures), thumbnails


def _stretch(picture_HWC: NDArray[np.uint8], size: tuple[int, int]) -> Any:
    import cv2

    if picture_HWC.shape[:2] == size:
        return picture_HWC
    return cv2.resize(picture_HWC, size[::-1], interpolation=cv2.INTER_AREA)


def _even(pictures_THWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The clip at a common brightness and contrast: a darker copy looks like its original."""
    values = pictures_THWC.astype(np.float32)
    scaled = (values - values.mean()) / max(float(values.std()), 1.0) * 48 + 128
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def _packed(values: NDArray[np.float32]) -> str:
    return base64.b64encode(values.astype("<f2").tobytes()).decode()


def _unpacked(text: str) -> NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(text), dtype="<f2").astype(np.float32)


def _from_row(row: dict[str, Any]) -> Measured:
    if row["status"] == "error":
        return Measured(id=row["episode"], error=row["why"])
    names = ("frames", "fps", "height", "width", "motion", "cut", "sharpness")
    vectors = {name: _unpacked(row[name]) for name in ("appearance", "scene", "picture") if name in row}
    return Measured(id=row["episode"], **vectors, **{name: row[name] for name in names})


def _why(error: DatasetError) -> str:
    return f"got {error.got}, wanted {error.wanted}"


def stacked(measured: Iterable[Measured], name: str) -> NDArray[np.float32]:
    """[N,D]: ``appearance``, ``scene`` or ``picture`` of clips that were read."""
    return np.stack([getattr(one, name) for one in measured])
