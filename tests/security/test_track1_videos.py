"""The Track 1 checker against hostile videos and front matter: findings instead of tracebacks, and bounds on what is read."""

from __future__ import annotations

import gzip
import io
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from physisforcing.core.errors import DatasetError
from physisforcing.core.video import VideoBounds, count_frames, read_mp4, write_mp4
from physisforcing.planner import track1
from physisforcing.planner.track1 import check_archive
from physisforcing.planner.track1_archive import ArchiveLimits
from physisforcing.planner.track1_names import ReadmeError, front_matter
from physisforcing.planner.track1_pack import readme_text
from physisforcing.planner.track1_report import Track1Report, Track1Rules
from track1_fields import FIELDS


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "click_bell_episode1.mp4"
    write_mp4(path, np.random.default_rng(0).integers(0, 256, (8, 64, 96, 3), dtype=np.uint8), 24, preset="ultrafast")
    return path


def raw_h264(video: Path) -> bytes:
    """The same pictures without a container: no frame has a time."""
    import av

    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        plain = av.BitStreamFilterContext("h264_mp4toannexb", stream)
        return b"".join(bytes(part) for packet in container.demux(stream) for part in plain.filter(packet))


def in_matroska(video: Path, to: Path) -> bytes:
    import av

    with av.open(str(video)) as source, av.open(str(to), "w", format="matroska") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    return to.read_bytes()


def checked(folder: Path, video: bytes, rules: Track1Rules, *, copies: int = 1) -> Track1Report:
    path = folder / "submission.tar.gz"
    entries = [("model_readme.md", readme_text(FIELDS))]
    entries += [(f"videos/click_bell_episode{i}.mp4", video) for i in range(copies)]
    with gzip.open(path, "wb") as file, tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return check_archive(path, rules)


def unreadable(report: Track1Report) -> list[str]:
    return [f.words for f in report.findings if f.level == "error" and f.code == "video_unreadable"]


@pytest.mark.parametrize("decode", [False, True])
def test_only_mp4_files_are_opened(decode: bool, good: Path, tmp_path: Path) -> None:
    rules = Track1Rules(decode=decode)
    assert unreadable(checked(tmp_path, good.read_bytes(), rules)) == []
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{good}\n#EXT-X-ENDLIST\n"
    concat = f"ffconcat version 1.0\nfile '{good}'\n"
    for content in (
        raw_h264(good),
        in_matroska(good, tmp_path / "a.mkv"),
        playlist.encode(),
        concat.encode(),
        b"",
        b"\0\0\0\x20ftypisom" + bytes(500),
        good.read_bytes()[:700],
    ):
        assert len(unreadable(checked(tmp_path, content, rules))) == 1, content[:40]


def test_the_reader_itself_opens_nothing_else(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "raw.mp4"
    path.write_bytes(raw_h264(good))
    for read in (count_frames, read_mp4):
        with pytest.raises(DatasetError, match="do not open"):
            read(path)


def test_what_is_read_of_a_video_is_bounded(good: Path, tmp_path: Path) -> None:
    for decode in (False, True):
        for limits, words in (
            (ArchiveLimits(video_frames=3), "more than 3 frames"),
            (ArchiveLimits(frame_pixels=1000), "96x64 pixels"),
            (ArchiveLimits(video_s=0.0), "0 s"),
        ):
            found = unreadable(checked(tmp_path, good.read_bytes(), Track1Rules(decode=decode, limits=limits)))
            assert len(found) == 1 and words in found[0], (decode, found)
    with pytest.raises(DatasetError):  # a stream that is larger than its bounds, whatever its container says
        count_frames(good, VideoBounds(frames=100, pixels=1000, seconds=10))
    assert count_frames(good, VideoBounds(frames=8, pixels=96 * 64, seconds=60)) == 8
    report = checked(tmp_path, good.read_bytes(), Track1Rules(limits=ArchiveLimits(reading_s=0.0)), copies=3)
    assert [f.code for f in report.findings if f.level == "error"] == ["not_checked"] * 2


def test_a_reader_that_breaks_is_a_finding(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise TypeError("unsupported operand")

    monkeypatch.setattr(track1, "_read", broken)
    assert unreadable(checked(tmp_path, good.read_bytes(), Track1Rules())) == ["TypeError: unsupported operand"]


def test_front_matter_that_grows_is_refused() -> None:
    text = readme_text(FIELDS).decode()
    line = next(line for line in text.splitlines() if line.startswith("release_year"))
    assert front_matter(text.encode())["release_year"] == "2026"
    for year in ("0x" + "F" * 5000, "9" * 5000, "0b" + "1" * 20000, ".inf", "-0x" + "F" * 5000):
        with pytest.raises(ReadmeError):
            front_matter(text.replace(line, f"release_year: {year}").encode())
    for name in FIELDS:  # the same in every other field
        old = next(line for line in text.splitlines() if line.startswith(name + ":"))
        with pytest.raises(ReadmeError):
            front_matter(text.replace(old, f"{name}: 0x{'F' * 5000}").encode())
    bomb = "a0: &a0 {k: v}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))
    begun = time.monotonic()
    with pytest.raises(ReadmeError, match="refer to each other"):
        front_matter(text.replace(line, f"{line}\n{bomb}").encode())
    assert time.monotonic() - begun < 2
