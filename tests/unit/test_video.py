"""Videos come back with the colours, the times and the bytes they were written with."""

from fractions import Fraction

import av
import numpy as np
import pytest

from physisforcing.core.errors import DatasetError
from physisforcing.core.types import FPS
from physisforcing.core.video import count_frames, probe_mp4, read_mp4, write_mp4


def smooth_frames(count=40, height=240, width=320):
    """Slow gradients over the whole colour range, drifting."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    frames = []
    for t in range(count):
        channels = [
            128 + 110 * np.sin(x / 70 + t / 40),
            128 + 110 * np.cos(y / 60 + x / 150 - t / 50),
            128 + 110 * np.sin((x + y) / 90 + t / 60),
        ]
        frames.append(np.clip(np.stack(channels, -1).round(), 0, 255))
    return np.stack(frames).astype(np.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    frames = smooth_frames()
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    write_mp4(path, frames, FPS, {"comment": "generated", "seed": "7"})
    return path, frames


def test_colours_come_back(clip):
    path, frames = clip
    error = read_mp4(path).astype(int) - frames
    assert np.abs(error.mean(axis=(0, 1, 2))).max() < 0.3, "a wrong matrix or range shifts whole channels"
    assert np.abs(error).mean() < 1.0
    assert np.percentile(np.abs(error), 95) <= 2


def test_flat_colours_do_not_shift(tmp_path):
    colours = np.array([[200, 30, 30], [30, 160, 40], [20, 50, 200], [255, 255, 255], [0, 0, 0], [120, 120, 120]])
    frames = np.repeat(np.repeat(colours[:, None, None, :], 64, 1), 96, 2).astype(np.uint8)
    write_mp4(tmp_path / "flat.mp4", frames, FPS)
    assert np.abs(read_mp4(tmp_path / "flat.mp4").astype(int) - frames).max() <= 2


def test_times_and_tags(clip):
    path, frames = clip
    info = probe_mp4(path)
    assert (info.frames, info.height, info.width, info.codec) == (len(frames), 240, 320, "h264")
    assert info.fps == pytest.approx(50 / 3)
    assert info.metadata["comment"] == "generated" and info.metadata["seed"] == "7"
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.time_base == Fraction(1, 50)
        assert [frame.pts for frame in container.decode(stream)] == [3 * i for i in range(len(frames))]
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (1, 1)


@pytest.mark.parametrize("fps", [25.0, 50 / 3, 25 / 3, 30000 / 1001])
def test_frame_rates_are_kept(tmp_path, fps):
    write_mp4(tmp_path / "v.mp4", smooth_frames(7, 32, 48), fps)
    assert probe_mp4(tmp_path / "v.mp4").fps == pytest.approx(fps, rel=1e-9)
    assert len(read_mp4(tmp_path / "v.mp4")) == 7


def test_same_bytes_twice(clip, tmp_path):
    path, frames = clip
    write_mp4(tmp_path / "again.mp4", iter(frames), FPS, {"comment": "generated", "seed": "7"})
    assert (tmp_path / "again.mp4").read_bytes() == path.read_bytes()


def test_random_access_equals_full_read(tmp_path):
    frames = smooth_frames(40, 64, 96)
    write_mp4(tmp_path / "v.mp4", frames, FPS, gop=8)
    full = read_mp4(tmp_path / "v.mp4")
    for wanted in ([0], [39], [17, 3, 3, 30], range(20, 37, 2)):
        np.testing.assert_array_equal(read_mp4(tmp_path / "v.mp4", wanted), full[list(wanted)])
    with pytest.raises(IndexError):
        read_mp4(tmp_path / "v.mp4", [40])
    with pytest.raises(IndexError):
        read_mp4(tmp_path / "v.mp4", [])


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.3, 0.6, 0.97])
def test_truncation_is_named(clip, tmp_path, keep):
    path, _ = clip
    cut = tmp_path / "cut.mp4"
    data = path.read_bytes()
    cut.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(DatasetError, match=r"cut\.mp4.*truncated or damaged"):
        read_mp4(cut)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"nothing\.mp4"):
        count_frames(tmp_path / "nothing.mp4")


@pytest.mark.parametrize("shape", [(4, 31, 48, 3), (4, 32, 48, 4), (4, 32, 48)])
def test_wrong_shapes_leave_no_file(tmp_path, shape):
    with pytest.raises(ValueError):
        write_mp4(tmp_path / "v.mp4", np.zeros(shape, np.uint8), FPS)
    with pytest.raises(ValueError, match="no frames"):
        write_mp4(tmp_path / "v.mp4", [], FPS)
    assert list(tmp_path.iterdir()) == []
