"""``physis data prepare`` on planted clips: what it finds, that it continues after a kill, and what it says of videos that are broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import drawn_clips
from physisforcing import cli
from physisforcing.core.errors import UserError
from physisforcing.worldmodel.data.clips.command import prepare_clips
from physisforcing.worldmodel.data.clips.config import ClipsConfig
from physisforcing.worldmodel.data.clips.manifest import ClipManifest
from ranks import fork, kill_once

COUNTS = {"static": 5, "duplicate": 5, "misaligned": 5, "cut": 3, "clean": 22}
OUTPUTS = ("clips.jsonl", "report.json", "report.md", "dropped.png")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return drawn_clips.script()


@pytest.fixture(scope="module")
def planted(benchmark: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """40 drawn clips with their table, and what they are."""
    folder = tmp_path_factory.mktemp("planted")
    takes = drawn_clips.takes(sum(COUNTS.values()) + COUNTS["cut"] - COUNTS["duplicate"], seed=0)
    return folder, benchmark.plant(takes, folder, COUNTS, np.random.default_rng(0))


@pytest.fixture(scope="module")
def prepared(planted: tuple[Path, list[Any]]) -> Path:
    folder, _ = planted
    prepare_clips(folder / "out", folder / "manifest.csv")
    return folder / "out"


def test_planted_clips_are_found(benchmark: ModuleType, planted: tuple[Path, list[Any]], prepared: Path) -> None:
    counts, more = benchmark.score(planted[1], ClipManifest(prepared).everything)
    told = {kind: (count.recall, count.precision) for kind, count in counts.items()}
    assert counts["all"].planted == 18 and counts["all"].recall >= 0.95 and counts["all"].precision >= 0.9, (told, more)
    for kind in ("static", "cut", "duplicate"):
        assert counts[kind].recall == 1, (kind, told, more)


def test_the_report_says_what_was_dropped_and_why(planted: tuple[Path, list[Any]], prepared: Path) -> None:
    report = json.loads((prepared / "report.json").read_text())
    manifest = ClipManifest(prepared)
    assert report["clips"] == 40 and report["kept"] == len(manifest) and report["fingerprint"] == manifest.fingerprint()
    dropped = [record for record in manifest.everything if not record.kept]
    assert sum(report["dropped"].values()) == len(dropped) == len(report["dropped_clips"])
    ids = {record.id for record in manifest.clips}
    for one in report["dropped_clips"]:
        if one["reason"] == "duplicate":
            assert one["detail"].removeprefix("repeats ") in ids and one["scores"]["likeness"] >= 0.97
    page = (prepared / "report.md").read_text()
    assert f"| static | {report['dropped']['static']} |" in page and "![Dropped clips](dropped.png)" in page
    window = manifest.frames(0, fps=5, size=(32, 48), num_frames=5)
    assert window.shape == (5, 32, 48, 3)


def test_new_thresholds_measure_nothing_again(planted: tuple[Path, list[Any]], prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(prepared, folder)
    before = (folder / "measurements.jsonl").read_bytes()
    config = ClipsConfig(filters=["motion"], min_seconds=2.3)
    summary = prepare_clips(folder, planted[0] / "manifest.csv", config)
    assert (folder / "measurements.jsonl").read_bytes() == before
    short = [r for r in ClipManifest(folder).everything if r.reason == "short"]
    assert short and all(r.seconds < 2.3 for r in short) and "duplicate" not in summary["dropped"]
    again = prepare_clips(folder, planted[0] / "manifest.csv", ClipsConfig(duplicates=ClipsConfig().duplicates))
    assert again["fingerprint"] == ClipManifest(prepared).fingerprint()


def test_at_most_so_many_clips_of_a_task(planted: tuple[Path, list[Any]], prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(prepared, folder)
    config = ClipsConfig(filters=["motion", "duplicates"])
    config.duplicates.per_task = 2
    prepare_clips(folder, planted[0] / "manifest.csv", config)
    kept = [record.caption for record in ClipManifest(folder).clips]
    full = [record.detail for record in ClipManifest(folder).everything if record.reason == "task_full"]
    assert full and max(map(kept.count, kept)) == 2 and all(kept.count(caption) == 2 for caption in full)


def test_a_killed_run_continues_to_the_same_bytes(planted: tuple[Path, list[Any]], tmp_path: Path) -> None:
    table, count = tmp_path / "part.csv", 6
    table.write_text("\n".join((planted[0] / "manifest.csv").read_text().splitlines()[: count + 1]) + "\n")
    config = ClipsConfig(videos=str(planted[0]))
    prepare_clips(tmp_path / "whole", table, config)
    output, log = tmp_path / "killed", tmp_path / "killed" / "measurements.jsonl"
    words = ["data", "prepare", str(output), str(table), f"videos={planted[0]}"]
    process = fork(lambda: cli.main(words), "the copy")
    kill_once(process, lambda: log.is_file() and log.read_bytes().count(b"\n") >= 2, within_s=60)
    done = log.read_bytes()
    assert 2 <= done.count(b"\n") < count and not (output / "clips.jsonl").exists()
    log.write_bytes(done + b'{"manifest": "cli')  # and half a line, as a full disk leaves it
    prepare_clips(output, table, config)
    assert log.read_bytes().startswith(done), "what was measured stays"
    for name in OUTPUTS:
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_broken_videos_are_named_and_the_rest_is_done(
    planted: tuple[Path, list[Any]], prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = planted[0]
    whole = sorted(source.glob("clip0*.mp4"))[:3]
    (tmp_path / "half.mp4").write_bytes(whole[0].read_bytes()[:3000])
    for path in whole:
        shutil.copy(path, tmp_path / path.name)
    rows = [{"video": p.name, "caption": "press"} for p in whole]
    rows += [{"video": "half.mp4", "caption": "a"}, {"video": "gone.mp4", "caption": "b"}, {"video": whole[0].name}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shutil.copytree(prepared, tmp_path / "out")
    words = ["data", "prepare", str(tmp_path / "out"), str(tmp_path / "t.jsonl"), "filters=[]", "--json"]
    assert cli.main(words) == 3
    told = capsys.readouterr()
    summary = json.loads(told.out)
    assert summary["kept"] == 3 and summary["dropped"] == {"no_caption": 1, "unreadable": 2}
    assert "half.mp4" in told.err and "gone.mp4" in told.err
    page = (tmp_path / "out" / "report.md").read_text()
    assert "row 4, `../half.mp4`: got" in page and "row 5, `../gone.mp4`: got no such file" in page


def test_paths_that_lead_nowhere_are_unreadable(tmp_path: Path) -> None:
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    rows = [{"video": name, "caption": "press"} for name in ("loop.mp4", f"{'long' * 99}.mp4", "gone.mp4")]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    summary = prepare_clips(tmp_path / "out", tmp_path / "t.jsonl")
    assert summary["dropped"] == {"unreadable": 3}
    assert [Path(name).name for name in summary["unreadable"]] == [row["video"] for row in rows]
    (tmp_path / "t.jsonl").write_text(json.dumps({"video": "x\0.mp4", "caption": "press"}))
    with pytest.raises(UserError, match=r"row 1: got 'x\\x00\.mp4', wanted a path"):
        prepare_clips(tmp_path / "out", tmp_path / "t.jsonl")


def test_shards_measure_their_part(planted: tuple[Path, list[Any]], prepared: Path, tmp_path: Path) -> None:
    lines = (planted[0] / "manifest.csv").read_text().splitlines()
    (tmp_path / "part.csv").write_text("\n".join(lines[:3]) + "\n")
    told = []
    for shard in ("0/2", "1/2"):
        config = ClipsConfig(shard=shard, videos=str(planted[0]), filters=["motion"])
        told.append(prepare_clips(tmp_path / "out", tmp_path / "part.csv", config))
    assert told[0]["unmeasured"] == 1 and told[1]["clips"] == 2 and "unmeasured" not in told[1]


def test_shards_compare_their_part_once_all_is_measured(
    planted: tuple[Path, list[Any]], prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = planted[0] / "shared"  # beside the other: paths in it are relative
    pairs = out / "pairs.jsonl"
    shutil.copytree(prepared, out)  # everything is measured
    wanted = {name: (out / name).read_bytes() for name in OUTPUTS}
    whole = sorted(pairs.read_text().splitlines())
    pairs.unlink()
    for name in OUTPUTS:
        (out / name).unlink()
    words = ["data", "prepare", str(out), str(planted[0] / "manifest.csv")]
    assert cli.main([*words, "shard=1/3"]) == 0
    first = pairs.read_text().splitlines()
    assert len(whole) / 3 - 1 < len(first) < len(whole) / 3 + 1 and not (out / "clips.jsonl").exists()
    assert f"{len(whole) - len(first)} pairs of clips are not compared yet" in capsys.readouterr().out
    assert cli.main([*words, "shard=1/3"]) == cli.main([*words, "shard=0/3"]) == 0
    assert len(pairs.read_text().splitlines()) < len(whole) and not (out / "clips.jsonl").exists()
    assert cli.main([*words, "shard=2/3"]) == 0

    def likeness(lines: list[str]) -> dict[str, float]:
        return {row["episode"]: row["likeness"] for row in map(json.loads, lines)}

    assert likeness(pairs.read_text().splitlines()) == likeness(whole)
    assert {name: (out / name).read_bytes() for name in OUTPUTS} == wanted


def test_the_input_says_what_is_made_of_it(planted: tuple[Path, list[Any]], tmp_path: Path) -> None:
    from physisforcing.data_prepare import holds_clips, main

    (tmp_path / "empty").mkdir()
    assert holds_clips(planted[0]) and holds_clips(planted[0] / "manifest.csv") and not holds_clips(tmp_path / "empty")
    with pytest.raises(UserError, match="to=clips or to=dataset"):
        main([str(tmp_path / "x"), str(planted[0]), "to=clip"])
    with pytest.raises(UserError, match=r"motion\.least"):
        main([str(tmp_path / "x"), str(planted[0]), "motion.last=1"])
