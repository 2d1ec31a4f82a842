"""Frames of a piece of a video file, by time: MP4, MOV, Matroska, WebM and AVI through PyAV."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.video import PixelConverter

#: Ending of a file's name -> FFmpeg's reader. Named, because its other readers (playlists) open files that the file names.
CONTAINERS = {
    ".mp4": "mp4",
    ".m4v": "mp4",
    ".mov": "mp4",
    ".mkv": "matroska",
    ".webm": "matroska",
    ".avi": "avi",
}
#: Seconds that the last frame of a Matroska file may last beyond its time, which such files need not say.
SLACK = 0.5


@dataclass(slots=True, kw_only=True, frozen=True)
class Span:
    """A piece of a video: from ``start`` s on, ``seconds`` long (None: to the end of the file)."""

    path: Path
    start: float = 0.0
    seconds: float | None = None


@dataclass(slots=True, kw_only=True, frozen=True)
class Header:
    """What the file says: frames a second (the file's own average), and pixels."""

    fps: float
    height: int
    width: int


class SpanReader:
    """An opened ``Span``: ``header``, then ``frames()`` once. A context manager.

    ``DatasetError`` names a file that is missing, of another kind, damaged, or that ends before the span does.
    """

    def __init__(self, span: Span) -> None:
        self.span = span
        self._container = _open(span.path)
        stream = self._container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            self._container.close()
            raise _damaged(span.path, "no frame rate in its header")
        self.header = Header(fps=float(rate), height=stream.codec_context.height, width=stream.codec_context.width)

    def __enter__(self) -> SpanReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def frames(self) -> Iterator[tuple[float, Any]]:
        """(seconds since the start of the span, ``av.VideoFrame``), in the order shown."""
        import av

        stream = self._container.streams.video[0]
        stream.codec_context.thread_count = 1
        origin = float((stream.start_time or 0) * stream.time_base)
        half = 0.5 / self.header.fps
        start, end = self.span.start, float("inf")
        if self.span.seconds is not None:
            end = start + self.span.seconds
        if start > half:
            self._container.seek(
                int((origin + max(start - half, 0.0)) / stream.time_base), stream=stream, backward=True
            )
        last, seen = None, _Seen()
        try:
            for packet in self._container.demux(stream):
                seen.add(packet)
                for frame in packet.decode():
                    if frame.pts is None:
                        raise _damaged(self.span.path, "a frame without a time")
                    time = float(frame.pts * stream.time_base) - origin
                    if time >= end - half:
                        return
                    last = time
                    if time >= start - half:
                        seen.frames += 1
                        yield time - start, frame
        except av.FFmpegError as error:
            raise _damaged(self.span.path, str(error)) from error
        self._check_end(last, end, seen)

    def _check_end(self, last: float | None, end: float, seen: _Seen) -> None:
        """The file is over: ``DatasetError`` where it should not be yet."""
        step, stream = 1 / self.header.fps, self._container.streams.video[0]
        if last is None or not seen.frames:
            raise _damaged(self.span.path, f"no frame from {self.span.start:g} s on")
        if end < float("inf") and last + 2.5 * step < end:
            raise _damaged(self.span.path, f"an end at {last + step:.3f} s", wanted=f"video up to {end:g} s")
        if self.span.start > 0.5 * step or end < float("inf"):
            return
        announced, shown = stream.frames, seen.packets - seen.hidden
        if seen.frames < min(announced - seen.hidden, shown):
            raise _damaged(self.span.path, f"{seen.frames} of {announced} frames, the others cannot be decoded")
        seconds = self._announced_seconds()
        if seen.frames < announced - seen.hidden or not announced:
            missing = seconds - seen.end
            if missing > (1.5 * step if announced else max(1.5 * step, SLACK)):
                got = f"{seen.frames} frames and an end at {seen.end:.3f} s"
                raise _damaged(self.span.path, got, wanted=f"the {seconds:.3f} s that its header announces")

    def _announced_seconds(self) -> float:
        """How long the header says the video is; 0 where it does not. Matroska tells the length of all streams together."""
        stream = self._container.streams.video[0]
        if stream.duration is not None:
            return float(stream.duration * stream.time_base)
        alone = len(self._container.streams) == 1
        return self._container.duration / 1e6 if alone and self._container.duration else 0.0


@dataclass(slots=True)
class _Seen:
    """What was read of a file: frames of the span, packets, those among them that an edit list hides (a video that was cut without
    encoding it again begins with some), and when the last one ends."""

    frames: int = 0
    packets: int = 0
    hidden: int = 0
    end: float = 0.0

    def add(self, packet: Any) -> None:
        if packet.size and packet.pts is not None:
            self.packets += 1
            self.hidden += packet.is_discard
            self.end = max(self.end, float((packet.pts + (packet.duration or 0)) * packet.time_base))


def sample(span: Span, times: Sequence[float], size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """RGB uint8 [T,H,W,3]: of each time (seconds since the start, ascending) the frame shown nearest to it.

    ``size`` (H, W): pictures are scaled to cover it, by area where they shrink and bicubic where they grow, and cut at the centre.
    The same file gives the same numbers on every machine with the same versions of FFmpeg and OpenCV. ``DatasetError`` as in
    ``SpanReader``; ``UserError`` for times outside the span.
    """
    if not len(times) or min(times) < 0 or any(b < a for a, b in zip(times, times[1:], strict=False)):
        raise UserError("times", got=list(times)[:4], wanted="ascending seconds from 0 on", fix="sort them")
    to_rgb, out = PixelConverter("rgb24"), []
    with SpanReader(span) as reader:
        before: tuple[float, Any] | None = None
        made: tuple[float, NDArray[np.uint8]] | None = None

        def take(shown: tuple[float, Any]) -> NDArray[np.uint8]:
            nonlocal made
            if made is None or made[0] != shown[0]:
                picture = np.asarray(to_rgb(shown[1]).to_ndarray(), dtype=np.uint8)
                made = shown[0], picture if size is None else cover(picture, size)
            return made[1]

        for time, frame in reader.frames():
            while len(out) < len(times) and before is not None and times[len(out)] <= (before[0] + time) / 2:
                out.append(take(before))
            before = time, frame
            if len(out) == len(times):
                break
        assert before is not None
        while len(out) < len(times) and times[len(out)] <= before[0] + 0.75 / reader.header.fps:
            out.append(take(before))
        if len(out) < len(times):
            got, wanted = f"{times[len(out)]:g} s", f"at most {before[0]:.3f} s, its last frame"
            raise UserError("times", got=got, wanted=wanted, fix=f"ask for less of {span.path.name}")
    return np.stack(out)


def cover(picture_HWC: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """A picture scaled until it covers ``size`` (H, W), the rest cut off evenly on both sides."""
    import cv2

    height, width = picture_HWC.shape[:2]
    if (height, width) == tuple(size):
        return picture_HWC
    scale = max(size[0] / height, size[1] / width)
    scaled = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    bigger = cv2.resize(picture_HWC, scaled[::-1], interpolation=way)
    top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    return np.ascontiguousarray(bigger[top : top + size[0], left : left + size[1]])


def _open(path: Path) -> Any:
    import av

    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise DatasetError(str(path), got="no such file", wanted="a video", fix="correct the path, or copy the file")
    kind = CONTAINERS.get(path.suffix.lower())
    if kind is None:
        known = ", ".join(CONTAINERS)
        raise DatasetError(str(path), got=path.suffix, wanted=f"one of {known}", fix="convert the video")
    try:
        container = av.open(str(path), format=kind)
    except av.FFmpegError as error:
        raise _damaged(path, f"{path.stat().st_size} bytes that do not open ({error})") from error
    if not container.streams.video or container.streams.video[0].codec_context is None:
        container.close()
        raise _damaged(path, "no readable video stream")
    return container


def _damaged(path: Path, got: str, wanted: str = "a complete video") -> DatasetError:
    return DatasetError(str(path), got=got, wanted=wanted, fix="copy the file again from its source")
