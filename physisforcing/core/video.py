"""MP4 in and out through PyAV, with colours that come back as they went in.

H.264 4:2:0, BT.709, limited range, and tagged so: an untagged file is read with whatever matrix the player guesses, which
shifts the pictures a model was trained on by several grey levels against those a simulator renders at test time. Both
conversions here use the same matrix, round accurately and interpolate chroma at full resolution. Equal frames give equal
bytes: one thread, and SSE2 code paths only, because x264's AVX-512 path gave other bytes at every call (seen with its
macroblock tree on, PyAV 18.1) while SSE2 equals its plain C twin and is as fast at this size.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import DatasetError

if TYPE_CHECKING:
    import av

#: Constant rate factor of x264: 18 is visually lossless; its error stays below that of 4:2:0 chroma.
DEFAULT_CRF = 18
#: Frames between key frames: one GOP for most episodes, because episodes are decoded from their start.
DEFAULT_GOP = 250


@dataclass(slots=True, kw_only=True, frozen=True)
class VideoInfo:
    """What the header of an MP4 says. ``frames`` counts the samples in its index, read or not."""

    frames: int
    height: int
    width: int
    fps: float
    codec: str
    metadata: dict[str, str] = field(default_factory=dict)


def write_mp4(
    path: str | Path,
    frames_THWC: NDArray[np.uint8] | Iterable[NDArray[np.uint8]],
    fps: float,
    metadata: dict[str, str] | None = None,
    *,
    crf: int = DEFAULT_CRF,
    gop: int = DEFAULT_GOP,
    preset: str = "medium",
) -> int:
    """Write RGB frames (uint8 [T,H,W,3], H and W even) and return how many.

    ``fps`` is kept exactly as a fraction: 50/3 becomes a time base of 1/50 with a step of 3. ``metadata``: strings stored in
    the file. The file appears under its name only when it is complete. ``ValueError`` for wrong shapes or no frames.
    """
    import av

    rate = Fraction(fps).limit_denominator(1001)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    options = {"video_track_timescale": str(rate.numerator), "movflags": "use_metadata_tags+faststart"}
    try:
        with av.open(str(partial), "w", format="mp4", options=options) as container:
            container.metadata.update({str(k): str(v) for k, v in (metadata or {}).items()})
            count = _encode(container, frames_THWC, rate, crf=crf, gop=gop, preset=preset)
        if count == 0:
            raise ValueError(f"no frames to write to {path}")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _encode(
    container: Any, frames: Iterable[NDArray[np.uint8]], rate: Fraction, *, crf: int, gop: int, preset: str
) -> int:
    import av

    stream: Any = None
    count = 0
    size: tuple[int, ...] = ()
    to_yuv = PixelConverter("yuv420p")
    for count, frame in enumerate(frames, start=1):
        _check_frame(frame, size)
        if stream is None:
            size = frame.shape
            stream = _add_stream(container, size, rate, crf=crf, gop=gop, preset=preset)
        picture = to_yuv(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"))
        picture.pts = (count - 1) * rate.denominator
        picture.time_base = Fraction(1, rate.numerator)
        container.mux(stream.encode(picture))
    if stream is not None:
        container.mux(stream.encode())
    return count


def _check_frame(frame: NDArray[np.uint8], size: tuple[int, ...]) -> None:
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(f"frames must be uint8 [H,W,3], got {frame.dtype} {list(frame.shape)}")
    if frame.shape[0] % 2 or frame.shape[1] % 2:
        raise ValueError(f"4:2:0 video needs an even height and width, got {frame.shape[0]}x{frame.shape[1]}")
    if size and frame.shape != size:
        raise ValueError(f"all frames of a video have one size, got {list(frame.shape)} after {list(size)}")


def _add_stream(container: Any, size: tuple[int, ...], rate: Fraction, *, crf: int, gop: int, preset: str) -> Any:
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    x264 = "threads=1:lookahead-threads=1"
    if platform.machine().lower() in ("x86_64", "amd64"):
        x264 += ":asm=SSE2"
    options = {"crf": str(crf), "preset": preset, "g": str(gop), "x264-params": x264}
    stream = container.add_stream("libx264", rate=rate, options=options)
    stream.height, stream.width, stream.pix_fmt = size[0], size[1], "yuv420p"
    stream.time_base = Fraction(1, rate.numerator)
    context = stream.codec_context
    context.time_base, context.thread_count = stream.time_base, 1
    context.colorspace, context.color_range = Colorspace.ITU709.value, ColorRange.MPEG.value
    context.color_trc, context.color_primaries = ColorTrc.BT709.value, ColorPrimaries.BT709.value
    return stream


class PixelConverter:
    """RGB full range <-> YUV, matrix and range from the tags of the frame (BT.709 limited where it has none)."""

    def __init__(self, target: str) -> None:
        from av.video.reformatter import Interpolation, VideoReformatter

        self.target = target
        self.reformatter = VideoReformatter()
        flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
        self.flags = flags | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        from av.video.reformatter import ColorRange, Colorspace

        if self.target == "rgb24":
            # The H.264 tag for "unspecified" is 2; swscale has no such matrix.
            matrix = int(frame.colorspace) if int(frame.colorspace) in (1, 4, 5, 6, 7, 9) else Colorspace.ITU709.value
            ranges = (ColorRange.JPEG if int(frame.color_range) == 2 else ColorRange.MPEG, ColorRange.JPEG)
        else:
            matrix, ranges = Colorspace.ITU709.value, (ColorRange.JPEG, ColorRange.MPEG)
        return self.reformatter.reformat(
            frame,
            format=self.target,
            src_colorspace=matrix,
            dst_colorspace=matrix,
            src_color_range=ranges[0],
            dst_color_range=ranges[1],
            interpolation=self.flags,
            threads=1,
        )


def probe_mp4(path: str | Path) -> VideoInfo:
    """Header of a video. ``DatasetError`` names a file that is missing or cannot be opened."""
    with _open(Path(path)) as container:
        stream = container.streams.video[0]
        return VideoInfo(
            frames=stream.frames,
            height=stream.codec_context.height,
            width=stream.codec_context.width,
            fps=float(stream.average_rate or 0),
            codec=stream.codec_context.name,
            metadata=dict(container.metadata),
        )


@dataclass(slots=True, kw_only=True, frozen=True)
class VideoBounds:
    """The most that is decoded of a video from anywhere: frames, pixels of one, seconds for all of it."""

    frames: int
    pixels: int
    seconds: float


def count_frames(path: str | Path, bounds: VideoBounds | None = None) -> int:
    """Decodable frames of a video, by decoding it (about 1 ms a frame at 240x320). ``DatasetError`` beyond ``bounds``, too."""
    path, begun, count = Path(path), time.monotonic(), 0
    with _open(path) as container:
        if bounds is not None:  # FFmpeg's own bound, for a stream that grows after its header, counts margins too
            container.streams.video[0].codec_context.options = {"max_pixels": str(2 * bounds.pixels + 2**20)}
        for _, frame in _decode(container, path, None):
            count += 1
            if bounds is None:
                continue
            for beyond, got in (
                (count > bounds.frames, f"more than {bounds.frames} frames"),
                (frame.width * frame.height > bounds.pixels, f"a frame of {frame.width}x{frame.height} pixels"),
                (time.monotonic() - begun > bounds.seconds, f"over {bounds.seconds:g} s of decoding"),
            ):
                if beyond:
                    raise DatasetError(str(path), got=got, wanted="a video within the bounds", fix="cut it")
    return count


def read_mp4(path: str | Path, indices: Sequence[int] | None = None) -> NDArray[np.uint8]:
    """RGB frames uint8 [T,H,W,3]: all of them, or those at ``indices`` (any order, repeats allowed), decoded in one pass.

    Decoding starts at the key frame before the first index wanted. ``DatasetError`` names a missing or truncated file;
    ``IndexError`` for an index outside the video.
    """
    path = Path(path)
    with _open(path) as container:
        total = container.streams.video[0].frames
        if indices is not None:
            wanted = np.asarray(indices, dtype=np.int64)
            if wanted.size == 0 or wanted.min() < 0 or (total and wanted.max() >= total):
                raise IndexError(f"frames {_span(wanted)} of {path} which has {total}")
            keep = set(wanted.tolist())
        else:
            keep = None
        to_rgb = PixelConverter("rgb24")
        found: dict[int, NDArray[np.uint8]] = {}
        for number, frame in _decode(container, path, keep):
            if keep is None or number in keep:
                found[number] = np.asarray(to_rgb(frame).to_ndarray(), dtype=np.uint8)
    expected = total if keep is None else len(keep)
    if len(found) < expected or not found:
        raise _truncated(path, got=f"{len(found)} of {expected} frames")
    order = sorted(found) if keep is None else wanted.tolist()
    return np.stack([found[i] for i in order])


def _span(wanted: NDArray[np.int64]) -> str:
    return f"{wanted.min()}..{wanted.max()}" if wanted.size else "(none)"


def _decode(container: Any, path: Path, keep: set[int] | None) -> Iterator[tuple[int, av.VideoFrame]]:
    """(frame number, frame) in display order; with ``keep``, from the key frame before its first to its last."""
    import av

    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1
    step = 1 / (stream.average_rate * stream.time_base) if stream.average_rate else Fraction(1)
    start = stream.start_time or 0
    if keep and min(keep) > 0:
        container.seek(int(start + min(keep) * step), stream=stream, backward=True)
    last = max(keep) if keep else None
    try:
        for frame in container.decode(stream):
            if frame.pts is None:
                raise _truncated(path, got="a frame without a time")
            number = round((frame.pts - start) / step)
            yield number, frame
            if last is not None and number >= last:
                return
    except av.FFmpegError as error:
        raise _truncated(path, got=str(error)) from error


def _open(path: Path) -> Any:
    import av

    if not path.is_file():
        raise DatasetError(
            str(path), got="no such file", wanted="an MP4 video", fix="collect or copy this episode again"
        )
    try:
        container = av.open(str(path), format="mp4")  # no other of FFmpeg's readers for a file from anywhere
    except av.FFmpegError as error:
        raise _truncated(path, got=f"{path.stat().st_size} bytes that do not open ({error})") from error
    if not container.streams.video or container.streams.video[0].codec_context is None:
        container.close()
        raise _truncated(path, got="no readable video stream")
    return container


def _truncated(path: Path, *, got: str) -> DatasetError:
    fix = "the file is truncated or damaged: copy it again from its source, or delete the episode and collect it again"
    return DatasetError(str(path), got=got, wanted="a complete video", fix=fix)
