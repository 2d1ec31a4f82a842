"""Frames by time, windows of 4k + 1, and what is refused; every frame carries its number as its brightness."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.video import write_mp4
from physisforcing.worldmodel.data.clips.decode import Span, SpanReader, cover, sample
from physisforcing.worldmodel.data.clips.manifest import ClipManifest, ClipRecord, read_records, write_records

FPS = 50 / 3


def numbered(count: int, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    frames = np.zeros((count, *size, 3), np.uint8)
    frames += (4 * np.arange(count, dtype=np.uint8))[:, None, None, None]
    return frames


def numbers(frames: np.ndarray) -> list[int]:
    return np.rint(frames.mean((1, 2, 3)) / 4).astype(int).tolist()


def write_as(path: Path, frames: np.ndarray, fps: int, codec: str) -> Path:
    """A video in the container that its name says."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "a.mp4"
    write_mp4(path, numbered(60), FPS, gop=7)
    return path


@pytest.mark.parametrize("start", [0, 1, 13, 41])
def test_a_piece_has_exactly_its_frames(video: Path, start: int) -> None:
    times = [k / FPS for k in range(12)]
    assert numbers(sample(Span(path=video, start=start / FPS, seconds=12 / FPS), times)) == list(
        range(start, start + 12)
    )
    with SpanReader(Span(path=video, start=start / FPS, seconds=12 / FPS)) as reader:
        assert len(list(reader.frames())) == 12 and (reader.header.height, reader.header.width) == (32, 48)


def test_the_nearest_frame_is_taken_at_any_rate(video: Path) -> None:
    for fps in (5.0, 13.0, 23.0, 41.0):
        times = np.arange(0, 59 / FPS, 1 / fps)
        wanted = np.abs(np.arange(60)[None] / FPS - times[:, None]).argmin(1)
        assert numbers(sample(Span(path=video), times.tolist())) == wanted.tolist()


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "libx264"), ("a.mov", "libx264"), ("a.avi", "mpeg4")])
def test_other_containers(tmp_path: Path, name: str, codec: str) -> None:
    path = write_as(tmp_path / name, 3 * numbered(20), 20, codec)  # brightness in large steps, which any encoder keeps
    assert [round(n / 3) for n in numbers(sample(Span(path=path), [0.0, 0.25, 0.8]))] == [0, 5, 16]
    piece = Span(path=path, start=0.5, seconds=0.25)
    assert [round(n / 3) for n in numbers(sample(piece, [0.0, 0.2]))] == [10, 14]


def trimmed(source: Path, path: Path, frames: int) -> Path:
    """``source`` from a frame on, its packets copied: those before it stay in the file, and its edit list hides them."""
    import av

    with av.open(str(source)) as read, av.open(str(path), "w") as container:
        stream = read.streams.video[0]
        copy, gone = container.add_stream_from_template(stream), round(frames / FPS / stream.time_base)
        for packet in read.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - gone, packet.dts - gone, copy
                container.mux(packet)
    return path


def test_a_video_cut_without_encoding_it_again_is_whole(video: Path, tmp_path: Path) -> None:
    path = trimmed(video, tmp_path / "b.mp4", 10)
    with SpanReader(Span(path=path)) as reader:
        times, frames = zip(*reader.frames(), strict=True)
    shown = numbers(np.stack([frame.to_ndarray(format="rgb24") for frame in frames]))
    assert shown == list(range(shown[0], 60)) and 1 <= shown[0] <= 10 and times[0] == 0
    half = tmp_path / "half.mp4"
    half.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(DatasetError, match=r"half\.mp4"):
        sample(Span(path=half), [0.0, 2.5])


def test_a_file_of_matroska_that_was_cut_off_is_named(tmp_path: Path) -> None:
    path = write_as(tmp_path / "a.mkv", numbered(60), 20, "libx264")
    half = tmp_path / "half.mkv"
    half.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(DatasetError, match=r"half\.mkv: got '\d\d frames and an end at 1\.\d+ s', wanted the 3\.000 s"):
        with SpanReader(Span(path=half)) as reader:
            list(reader.frames())


def test_pictures_cover_the_size_and_are_cut_at_the_centre() -> None:
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:, 30:50] = 200  # the middle of a picture twice as wide as high
    small = cover(picture, (20, 10))
    assert small.shape == (20, 10, 3) and (small == 200).all()
    wide = cover(picture, (20, 80))
    assert wide.shape == (20, 80, 3) and (wide[:, 32:48] == 200).all() and (wide[:, :28] == 0).all()
    assert cover(picture, (40, 80)) is picture


def test_what_cannot_be_read_is_named(video: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.mp4"
    half.write_bytes(video.read_bytes()[: video.stat().st_size * 2 // 3])
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n")
    (tmp_path / "text.mp4").write_text("no video")
    for path in (half, tmp_path / "list.m3u8", tmp_path / "text.mp4", tmp_path / "gone.mp4"):
        with pytest.raises(DatasetError, match=path.name):
            sample(Span(path=path), [0.0, 3.0])
    with pytest.raises(DatasetError, match=r"an end at 3\.600 s"):
        with SpanReader(Span(path=video, start=1.0, seconds=4.0)) as reader:
            list(reader.frames())
    with pytest.raises(DatasetError, match="no frame from 9 s on"):
        sample(Span(path=video, start=9.0), [0.0])
    with pytest.raises(UserError, match="times"):
        sample(Span(path=video), [1.0, 0.5])


def record(video: Path, folder: Path, **more: object) -> ClipRecord:
    path = Path("..") / video.relative_to(folder.parent) if video.is_relative_to(folder.parent) else video
    values = {"id": "1", "path": str(path), "start": 10 / FPS, "frames": 40, "fps": FPS, "height": 32, "width": 48}
    return ClipRecord(**{**values, "caption": "press", "task": "bell", **more})


def test_a_manifest_gives_windows_of_4k_plus_1(video: Path, tmp_path: Path) -> None:
    one = record(video, tmp_path)
    write_records(tmp_path / "clips.jsonl", [one, replace(one, id="2", kept=False, reason="static")])
    manifest = ClipManifest(tmp_path)
    assert len(manifest) == 1 and len(manifest.everything) == 2 and manifest[0] == one
    window = manifest.frames(0, fps=FPS / 2, size=(16, 24), num_frames=9, start=2 / FPS)
    assert window.shape == (9, 16, 24, 3) and window.dtype == np.uint8
    assert numbers(window) == list(range(12, 30, 2))
    again = manifest.frames(0, fps=FPS / 2, size=(16, 24), num_frames=9, start=2 / FPS)
    np.testing.assert_array_equal(window, again)
    with pytest.raises(UserError, match="num_frames=9"):
        manifest.frames(0, fps=FPS, size=(16, 24), num_frames=8)
    with pytest.raises(UserError, match="fps: got 0, wanted frames a second"):
        manifest.frames(0, fps=0, size=(16, 24), num_frames=9)
    assert manifest.holds(0, fps=FPS, num_frames=37) and not manifest.holds(0, fps=FPS, num_frames=41)
    assert numbers(manifest.frames(0, fps=FPS, size=(32, 48), num_frames=37, start=3 / FPS))[-1] == 49
    with pytest.raises(UserError, match=r"41 frames at 16.6667/s"):
        manifest.frames(0, fps=FPS, size=(32, 48), num_frames=41)


def test_the_fingerprint_is_of_what_was_kept(video: Path, tmp_path: Path) -> None:
    one = record(video, tmp_path)
    prints = []
    for k, rows in enumerate(
        [[one], [replace(one, scores={"motion": 1.0}, path="moved.mp4")], [replace(one, caption="lift")], [one, one]]
    ):
        write_records(tmp_path / f"{k}.jsonl", rows)
        prints.append(ClipManifest(tmp_path / f"{k}.jsonl").fingerprint())
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_a_line_that_is_no_clip_is_named(tmp_path: Path) -> None:
    (tmp_path / "clips.jsonl").write_text(json.dumps({"id": "1"}) + "\n")
    with pytest.raises(DatasetError, match="line 1"):
        read_records(tmp_path / "clips.jsonl")
    with pytest.raises(DatasetError, match="no such file"):
        ClipManifest(tmp_path / "nothing.jsonl")
