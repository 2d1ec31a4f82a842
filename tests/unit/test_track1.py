"""Track 1 submissions: what the packer writes is valid, and each thing that can be wrong is named."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from physisforcing import cli
from physisforcing.core.errors import UserError
from physisforcing.core.video import write_mp4
from physisforcing.planner.track1 import check_archive
from physisforcing.planner.track1_names import ReadmeError, episode_of, front_matter, read_summary
from physisforcing.planner.track1_pack import pack, readme_text
from physisforcing.planner.track1_report import Track1Rules
from track1_fields import FIELDS


def clip(path: Path, *, frames: int = 5, size: tuple[int, int] = (480, 640), fps: float = 24.0) -> Path:
    pictures = np.zeros((frames, *size, 3), np.uint8)
    pictures[:, :, : size[1] // 2] = np.arange(frames, dtype=np.uint8)[:, None, None, None] * 40
    write_mp4(path, pictures, fps, preset="ultrafast")
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good clips of five frames."""
    folder = tmp_path_factory.mktemp("videos")
    first = clip(folder / "click_bell_episode40.mp4")
    for name in ("click_bell_episode41.mp4", "adjust_bottle_episode40.mp4"):
        (folder / name).write_bytes(first.read_bytes())
    return folder


def summary(path: Path, names: list[str]) -> Path:
    rows = [{"gt_path": name, "image": "x.png", "prompt": ["do it"]} for name in names]
    path.write_text(json.dumps(rows))
    return path


def demo(task: str, number: int) -> str:
    return f"data/{task}/aloha-agilex_clean_50/aloha-agilex_clean_50/video/episode{number}.mp4"


THREE = [demo("click_bell", 40), demo("click_bell", 41), demo("adjust_bottle", 40)]


def repacked(source: Path, to: Path, change) -> Path:
    """The archive again, with what ``change`` makes of its list of (name, bytes)."""
    with tarfile.open(source) as archive:
        entries = [(m.name, archive.extractfile(m).read()) for m in archive if m.isreg()]
    with tarfile.open(to, "w:gz") as archive:
        for name, content in change(entries):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return to


def codes(report) -> list[str]:
    return [finding.code for finding in report.findings if finding.level == "error"]


def test_the_packer_writes_a_valid_archive_and_the_same_bytes_again(videos: Path, tmp_path: Path) -> None:
    rules = Track1Rules(summary=summary(tmp_path / "summary.json", THREE), frames="5", decode=True)
    digests = []
    for name in ("one.tar.gz", "two.tar.gz"):
        report = pack(videos, tmp_path / name, readme_text(FIELDS), rules)
        assert report.valid and report.videos == 3 and not report.findings
        assert report.model == FIELDS and report.layout == "wa2"
        digests.append(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert digests[0] == digests[1]
    with tarfile.open(tmp_path / "one.tar.gz") as archive:
        assert archive.getnames() == ["model_readme.md", *sorted(f"videos/{p.name}" for p in videos.iterdir())]
        assert {(m.uid, m.mtime, m.uname) for m in archive} == {(0, 0, "")}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.tar.gz", "summary.json", "two.tar.gz"]


def test_a_parent_folder_and_the_official_names_are_allowed(videos: Path, tmp_path: Path) -> None:
    pack(videos, tmp_path / "a.tar.gz", readme_text(FIELDS), Track1Rules())

    def official(entries):
        clips = iter(range(1, 9))
        for name, content in entries:
            name = f"videos/episode_{next(clips):06d}.mp4" if name.endswith(".mp4") else name
            yield f"./Pico_eval/{name}", content

    flat = summary(tmp_path / "s.json", [f"gt_video/fixed_scene_task/episode{i}.mp4" for i in (1, 2, 3)])
    report = check_archive(repacked(tmp_path / "a.tar.gz", tmp_path / "b.tgz", official), Track1Rules(summary=flat))
    assert report.valid and report.videos == 3 and not report.findings


def test_the_older_layout_needs_all_three_folders_and_121_frames(videos: Path, tmp_path: Path) -> None:
    for suffix in ("_test", "_test_1", "_test_2"):
        folder = tmp_path / "clips" / f"example{suffix}"
        folder.mkdir(parents=True)
        (folder / "click_bell_episode40.mp4").write_bytes((videos / "click_bell_episode40.mp4").read_bytes())
    rules = Track1Rules(layout="v1", frames="5")
    assert pack(tmp_path / "clips", tmp_path / "Pico_eval.tar.gz", readme_text(FIELDS), rules).valid
    report = check_archive(tmp_path / "Pico_eval.tar.gz")
    assert report.layout == "v1" and codes(report) == ["video_length"] * 3
    assert report.findings[0].words == "5 frames, wanted 121"

    def without_one(entries):
        return [(name, content) for name, content in entries if "_test_2" not in name]

    cut = repacked(tmp_path / "Pico_eval.tar.gz", tmp_path / "cut.tar.gz", without_one)
    assert codes(check_archive(cut, Track1Rules(frames="5"))) == ["missing_videos"]


def test_episodes_are_held_against_the_summary(videos: Path, tmp_path: Path) -> None:
    pack(videos, tmp_path / "a.tar.gz", readme_text(FIELDS), Track1Rules())
    other = [demo("click_bell", 40), demo("click_bell", 41), demo("adjust_bottle", 41), demo("open_laptop", 3)]
    report = check_archive(tmp_path / "a.tar.gz", Track1Rules(summary=summary(tmp_path / "s.json", other)))
    told = {finding.code: finding.words for finding in report.findings}
    assert told == {
        "missing_episodes": "2: adjust_bottle_episode41, open_laptop_episode3",
        "unknown_episodes": "1: adjust_bottle_episode40",
    }


def test_lengths_are_those_of_the_real_videos(videos: Path, tmp_path: Path) -> None:
    for name, frames in zip(THREE, (5, 5, 7)):
        clip(tmp_path / name, frames=frames, size=(48, 64))
    rules = Track1Rules(summary=summary(tmp_path / "s.json", THREE), frames="gt")
    report = pack(videos, tmp_path / "a.tar.gz", readme_text(FIELDS), rules)
    assert [(f.code, f.words) for f in report.findings] == [("video_length", "5 frames, wanted 7")]
    assert not (tmp_path / "a.tar.gz").exists()
    with pytest.raises(UserError, match="--summary"):
        check_archive(videos, Track1Rules(frames="gt"))


def test_sizes_rates_and_damaged_videos_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "v"
    clip(folder / "a_episode1.mp4", size=(240, 320))
    clip(folder / "a_episode2.mp4", fps=50 / 3)
    clip(folder / "a_episode3.mp4", size=(720, 960))
    whole = clip(folder / "a_episode4.mp4", frames=40).read_bytes()
    (folder / "a_episode4.mp4").write_bytes(whole[: int(len(whole) * 0.8)])
    (folder / "a_episode5.mp4").write_bytes(b"no video")
    report = pack(folder, tmp_path / "a.tar.gz", readme_text(FIELDS), Track1Rules())
    found = {(f.level, f.code, f.where.rsplit("/", 1)[-1]) for f in report.findings}
    assert found == {
        ("warning", "video_size", "a_episode1.mp4"),
        ("warning", "video_fps", "a_episode2.mp4"),
        ("error", "video_unreadable", "a_episode4.mp4"),
        ("error", "video_unreadable", "a_episode5.mp4"),
    }
    assert not report.valid and not (tmp_path / "a.tar.gz").exists()


def test_what_is_missing_or_misplaced_has_the_documented_name(videos: Path, tmp_path: Path) -> None:
    pack(videos, tmp_path / "a.tar.gz", readme_text(FIELDS), Track1Rules())

    def found(change) -> list[str]:
        return codes(check_archive(repacked(tmp_path / "a.tar.gz", tmp_path / "b.tar.gz", change)))

    assert found(lambda e: e[1:]) == ["missing_model_readme"]
    assert found(lambda e: e[:1]) == ["empty_video_dir"]
    assert found(lambda e: [*e, ("other/model_readme.md", e[0][1])]) == ["metadata_invalid"]
    assert found(lambda e: [("model_readme.md", b"# no front matter"), *e[1:]]) == ["metadata_invalid"]
    assert found(lambda e: [(n.replace("videos/", ""), c) for n, c in e])[0] == "misplaced_videos"
    assert found(lambda e: [*e, ("videos/click_bell_episode040.mp4", e[1][1])]) == ["duplicate_episode"]
    assert found(lambda e: [*e, ("videos/clip.mp4", e[1][1])]) == ["video_name"]
    (tmp_path / "c.tar.gz").write_bytes((tmp_path / "a.tar.gz").read_bytes()[:-200])
    assert codes(check_archive(tmp_path / "c.tar.gz"))[0] == "extract_failed"
    (tmp_path / "d.zip").write_bytes(b"PK\3\4" + bytes(100))
    assert codes(check_archive(tmp_path / "d.zip")) == ["missing_tar_gz", "extract_failed"]


def test_names_and_front_matter() -> None:
    assert [
        (e.task, e.number) for e in map(episode_of, ["click_bell_episode07", "a_b_episode_7", "episode_000007"])
    ] == [
        ("click_bell", 7),
        ("a_b", 7),
        (None, 7),
    ]
    assert episode_of("clip") is None and episode_of("a_episode") is None
    good = readme_text(FIELDS).decode()
    assert front_matter(good.encode()) == FIELDS
    for old, new, word in (
        ("release_year: 2026", "release_year: 26", "release_year"),
        ("open_source", "open", "source_type"),
        ("version: v1\n", "", "version"),
        ("---\n\n", "\n\n", "no end"),
        ("model_name: pico", "model_name: [pico]", "model_name"),
        ("model_name: pico", "model_name: !!python/object/apply:os.system [ls]", "no YAML"),
    ):
        with pytest.raises(ReadmeError, match=word):
            front_matter(good.replace(old, new, 1).encode())


def test_a_summary_that_is_none_is_refused(tmp_path: Path) -> None:
    for content in ("", "{}", "[]", '[{"image": 1}]', '[{"gt_path": "video.mp4"}]'):
        (tmp_path / "s.json").write_text(content)
        with pytest.raises(UserError):
            read_summary(tmp_path / "s.json")
    with pytest.raises(UserError, match="once"):
        read_summary(summary(tmp_path / "s.json", [demo("a", 1), demo("a", 1)]))


def test_the_commands(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in FIELDS.items()]
    archive = str(tmp_path / "a.tar.gz")
    assert cli.main(["pack", "track1", str(videos), archive, *options]) == 0
    assert "valid: layout wa2, 3 videos" in capsys.readouterr().out
    assert cli.main(["check", "track1", archive, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["valid"] is True
    assert cli.main(["check", "track1", archive, "--frames", "121"]) == 1
    assert "NOT valid" in capsys.readouterr().out
    assert cli.main(["pack", "track1", str(videos), archive]) == 2
    assert "--model-name" in capsys.readouterr().err
    assert cli.main(["check", "track1", str(tmp_path / "none.tar.gz")]) == 2
    assert gzip.decompress(Path(archive).read_bytes()).startswith(b"model_readme.md")
