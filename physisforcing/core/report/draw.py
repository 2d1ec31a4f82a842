"""Draw tracks and masks on video with numpy alone, and put videos side by side."""

from __future__ import annotations

import colorsys
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]


def upscale(frames_THWC: Frames, factor: int) -> Frames:
    """Enlarge by an integer, bilinear between pixel centres; (x, y) becomes ((x + .5) * factor - .5, ...)."""
    out = frames_THWC.astype(np.float32)
    for axis in (1, 2):
        size = out.shape[axis]
        at = np.clip((np.arange(size * factor) + 0.5) / factor - 0.5, 0, size - 1)
        low = np.floor(at).astype(np.int64)
        high = np.minimum(low + 1, size - 1)
        weight = (at - low).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(4)])
        out = np.take(out, low, axis) * (1 - weight) + np.take(out, high, axis) * weight
    return np.rint(out).astype(np.uint8)


def draw_tracks(
    frames_THWC: Frames,
    points_TN2: NDArray[np.floating],
    visible_TN: NDArray[np.bool_],
    selected_N: NDArray[np.bool_],
    *,
    trail: int = 8,
) -> Frames:
    """Selected points as coloured dots with their path of the last ``trail`` frames, others as faint dots, hidden not.

    Points are (x, y) pixels of these frames, integers at pixel centres. Colour tells where a point was in the first
    frame (hue from left to right), so that one point keeps its colour.
    """
    out = frames_THWC.astype(np.float32) * 0.8
    width = frames_THWC.shape[2]
    hues = np.clip(points_TN2[0, :, 0] / width, 0, 1)
    colours_N3 = (
        np.array([colorsys.hsv_to_rgb(0.9 * float(h), 0.75, 1.0) for h in hues], np.float32).reshape(-1, 3) * 255
    )
    for t in range(len(out)):
        faint = visible_TN[t] & ~selected_N
        _dots(out[t], points_TN2[t, faint], np.full((int(faint.sum()), 3), 235, np.float32), radius=0.8, alpha=0.45)
        for s in range(max(t - trail, 0), t):
            on = selected_N & visible_TN[s] & visible_TN[s + 1]
            ends = np.linspace(points_TN2[s, on], points_TN2[s + 1, on], 8)
            alpha = 0.15 + 0.45 * (s + 1 - (t - trail)) / (trail + 1)
            _dots(out[t], ends.reshape(-1, 2), np.tile(colours_N3[on], (8, 1)), radius=0.6, alpha=alpha)
        strong = visible_TN[t] & selected_N
        _dots(out[t], points_TN2[t, strong], colours_N3[strong], radius=2.2, alpha=1.0)
    return np.rint(out).clip(0, 255).astype(np.uint8)


def _dots(
    image_HWC: NDArray[np.float32], points_N2: NDArray, colours_N3: NDArray, *, radius: float, alpha: float
) -> None:
    """Blend round dots with soft edges into the image, in place."""
    reach = int(np.ceil(radius))
    height, width = image_HWC.shape[:2]
    centre = np.rint(points_N2).astype(np.int64)
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            cover = alpha * min(max(radius + 0.5 - float(np.hypot(dx, dy)), 0.0), 1.0)
            if cover <= 0:
                continue
            x, y = centre[:, 0] + dx, centre[:, 1] + dy
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            x, y = x[inside], y[inside]
            image_HWC[y, x] = image_HWC[y, x] * (1 - cover) + colours_N3[inside] * cover


def draw_mask(frames_THWC: Frames, mask_Thw: NDArray[np.bool_], *, dim: float = 0.3) -> Frames:
    """Frames at full brightness inside the mask, dimmed and grey outside. Its cells must tile the picture exactly."""
    rows, columns = frames_THWC.shape[1] // mask_Thw.shape[1], frames_THWC.shape[2] // mask_Thw.shape[2]
    assert rows * mask_Thw.shape[1] == frames_THWC.shape[1] and columns * mask_Thw.shape[2] == frames_THWC.shape[2]
    full = np.repeat(np.repeat(mask_Thw, rows, axis=1), columns, axis=2)[..., None]
    grey = frames_THWC.mean(axis=-1, keepdims=True) * dim
    return np.rint(np.where(full, frames_THWC.astype(np.float32), grey)).astype(np.uint8)


def side_by_side(videos: Sequence[Frames], *, gap: int = 6) -> Frames:
    """Videos of equal height and length in a row, a neutral gap between them; width made even for 4:2:0."""
    length, height = videos[0].shape[:2]
    assert all(video.shape[:2] == (length, height) for video in videos), [video.shape for video in videos]
    bar = np.full((length, height, gap, 3), 127, np.uint8)
    parts: list[Frames] = []
    for video in videos:
        parts += [video, bar]
    row = np.concatenate(parts[:-1], axis=2)
    return row[:, : height - height % 2, : row.shape[2] - row.shape[2] % 2]


def write_png(path: str | Path, image_HWC: Frames) -> None:
    """Write an 8-bit RGB PNG."""
    height, width = image_HWC.shape[:2]
    assert image_HWC.dtype == np.uint8 and image_HWC.shape == (height, width, 3)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image_HWC.reshape(height, width * 3)], axis=1)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 6)) + chunk(b"IEND", b"")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
