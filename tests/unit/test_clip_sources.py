"""Where clips come from: tables with any column names, folders, datasets; mistakes are named with their row."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.lerobot import HEAD, LeRobotWriter
from physisforcing.core.lerobot_format import video_feature
from physisforcing.core.video import write_mp4
from physisforcing.worldmodel.data.clips.decode import Span
from physisforcing.worldmodel.data.clips.manifest import ClipRecord, read_records, write_records
from physisforcing.worldmodel.data.clips.sources import list_clips

ROWS = [
    {"caption_short_list": "['press the bell', 'a robot']", "video_path": "a.mp4", "frames": 300, "task": "bell"},
    {"caption_short_list": '["lift it"]', "video_path": "sub/b.webm", "frames": 81, "task": ""},
]


def write(path: Path, rows: list[dict]) -> Path:
    kind = path.suffix
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind in (".csv", ".tsv"):
        import csv

        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if kind == ".jsonl" else json.dumps(rows))
    return path


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_a_table_with_rovid_x_columns(tmp_path: Path, ending: str) -> None:
    layout, clips = list_clips(write(tmp_path / f"robot{ending}", ROWS))
    assert layout == "manifest"
    assert [(c.caption, c.task, c.where) for c in clips] == [
        ("press the bell", "bell", "row 1"),
        ("lift it", "", "row 2"),
    ]
    # `frames` alone is how long the file is: all of it is wanted
    assert [c.span for c in clips] == [Span(path=tmp_path / "a.mp4"), Span(path=tmp_path / "sub/b.webm")]


def test_other_column_names_and_another_folder(tmp_path: Path) -> None:
    rows = [{"Clip": "x.mp4", "what": ["", "pour"], "Text": "not this"}]
    found = list_clips(
        write(tmp_path / "t.jsonl", rows), columns=["video:Clip", "caption:what"], videos=str(tmp_path / "films")
    )[1]
    assert found[0].caption == "pour" and found[0].span.path == tmp_path / "films" / "x.mp4"
    assert list_clips(write(tmp_path / "t.jsonl", [{"PATH": "x.mp4", "Text": "a\n b"}]))[1][0].caption == "a b"


@pytest.mark.parametrize(
    ("row", "piece"),
    [
        ({"start": 1.5, "end": 4}, (1.5, 2.5)),
        ({"start_time": "2"}, (2.0, None)),
        ({"start_frame": 10, "end_frame": 30, "fps": 20}, (0.5, 1.0)),
        ({"start_frame": 5, "num_frames": 10, "fps": 10}, (0.5, 1.0)),
        ({"start": 1, "num_frames": 10, "fps": 5}, (1.0, 2.0)),
        ({"end_frame": 4}, (0.0, 0.5)),  # at the 8 frames a second of the file
        ({"start": float("nan"), "end": ""}, (0.0, None)),
    ],
)
def test_pieces_of_videos(tmp_path: Path, row: dict, piece: tuple) -> None:
    write_mp4(tmp_path / "a.mp4", np.zeros((12, 16, 16, 3), np.uint8), 8)
    span = list_clips(write(tmp_path / "t.jsonl", [{"video": "a.mp4", **row}]))[1][0].span
    assert (span.start, span.seconds) == piece


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"video": "a.mp4", "start": 3, "end": 2}], "row 1"),
        ([{"video": "a.mp4"}, {"video": "a.mp4", "start": "soon"}], r"row 2: start: got 'soon'"),
        ([{"film": "a.mp4"}], r"columns=\[video:NAME\]"),
        ([{"video": "a.mp4"}, {"video": None}], "row 2: got 'no video'"),
    ],
)
def test_rows_that_say_nothing_sensible_are_named(tmp_path: Path, rows: list[dict], message: str) -> None:
    with pytest.raises(UserError, match=message):
        list_clips(write(tmp_path / "t.jsonl", rows))


def test_wrong_settings_offer_the_nearest_name(tmp_path: Path) -> None:
    table = write(tmp_path / "t.jsonl", [{"video": "a.mp4", "words": "x"}])
    with pytest.raises(UserError, match="did you mean 'caption'"):
        list_clips(table, columns=["captoin:words"])
    with pytest.raises(UserError, match="did you mean 'words'"):
        list_clips(table, columns=["caption:word"])
    with pytest.raises(UserError, match="leave camera out"):
        list_clips(table, camera="head")
    (tmp_path / "bad.jsonl").write_text('{"video": "a.mp4"}\n{"video": \n')
    with pytest.raises(DatasetError, match=r"bad.jsonl line 2"):
        list_clips(tmp_path / "bad.jsonl")


def test_a_folder_with_texts_and_one_with_a_table(tmp_path: Path) -> None:
    for name in ("b.mp4", "pour/a.MKV", "pour/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "b.txt").write_text("press\nthe bell ")
    layout, clips = list_clips(tmp_path)
    assert layout == "folder"
    found = [(c.where, c.caption, c.task) for c in clips]
    assert found == [("b.mp4", "press the bell", ""), ("pour/a.MKV", "", "pour")]
    write(tmp_path / "metadata.csv", [{"file_name": "b.mp4", "text": "ring"}])
    assert [(c.span.path.name, c.caption) for c in list_clips(tmp_path)[1]] == [("b.mp4", "ring"), ("a.MKV", "")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="no clip"):
        list_clips(tmp_path / "empty")


def test_episodes_of_a_dataset_are_pieces_of_its_videos(tmp_path: Path) -> None:
    writer = LeRobotWriter(tmp_path / "v3", {HEAD: video_feature(16, 16, 5.0)}, 5.0)
    for index, text in enumerate(("ring", "shake")):
        frames = np.full((7 + index, 16, 16, 3), 40 * index, np.uint8)
        writer.add_episode(
            columns={}, frames={HEAD: frames}, instruction=text, task_name=f"task{index}", seed=index, success=None
        )
    data = writer.finalize()
    layout, clips = list_clips(tmp_path / "v3")
    assert layout == "LeRobot v3"
    assert [(c.caption, c.task, c.where) for c in clips] == [
        ("ring", "task0", "episode 0"),
        ("shake", "task1", "episode 1"),
    ]
    assert [c.span.seconds for c in clips] == [7 / 5, 8 / 5] and clips[
        1
    ].span.path.parent.parent.parent == data / "videos"
    with pytest.raises(UserError, match="hed"):
        list_clips(tmp_path / "v3", camera="hed")


def test_episodes_of_an_older_dataset_have_a_video_each(tmp_path: Path) -> None:
    root, key = tmp_path / "v21", "observation.images.cam_high"
    (root / "meta").mkdir(parents=True)
    (root / "data" / "chunk-000").mkdir(parents=True)
    info = {"codebase_version": "v2.1", "fps": 5, "chunks_size": 1000, "total_episodes": 2}
    info |= {"features": {key: video_feature(16, 16, 5.0)}}
    (root / "meta" / "info.json").write_text(json.dumps(info))
    (root / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": "ring"}\n{"task_index": 1, "task": "pour"}\n')
    rows = [{"episode_index": i, "length": 6 + i, "tasks": [text]} for i, text in enumerate(("pour", "ring"))]
    (root / "meta" / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(2):
        pq.write_table(pa.table({"episode_index": [i]}), root / f"data/chunk-000/episode_{i:06d}.parquet")
        write_mp4(root / f"videos/chunk-000/{key}/episode_{i:06d}.mp4", np.zeros((6 + i, 16, 16, 3), np.uint8), 5)
    layout, clips = list_clips(root)
    assert layout == "LeRobot v2.1" and [(c.caption, c.span.seconds) for c in clips] == [
        ("pour", 6 / 5),
        ("ring", 7 / 5),
    ]
    assert clips[1].span.path.name == "episode_000001.mp4" and clips[1].span.start == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"video,caption\nx.mp4,pick, then place\n", "line 2: got '3 cells', wanted 2"),
        ("b.csv", "video,caption\nx.mp4,caf\u00e9\n".encode("latin1"), "byte 0xe9 at 23', wanted UTF-8"),
        ("c.csv", b'video,caption\nx.mp4,"open' + b"a" * 140_000 + b"\n", "field larger"),
        ("d.csv", b"video,caption,caption\nx.mp4,a,b\n", "columns: got 'caption twice'"),
        ("e.json", b"[" * 100_000, "line 1: got 'maximum recursion"),
        ("f.parquet", b"PAR1", "wanted a parquet file"),
        ("g.jsonl", b'{"video": {"path": "x.mp4"}}', "row 1: got {'path': 'x.mp4'}, wanted a path"),
        ("h.jsonl", b'{"video": "x.mp4", "caption": "cut \\ud83d"}', "caption of 'row 1': got 'cut \\\\ud83d'"),
    ],
)
def test_damaged_tables_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError) as raised:
        list_clips(tmp_path / name)
    assert message in str(raised.value)


def test_a_line_of_json_ends_at_a_newline_alone(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"video": "x.mp4", "caption": "one\u2028two\x85"}\n', encoding="utf-8")
    assert [clip.caption for clip in list_clips(tmp_path / "t.jsonl")[1]] == ["one two"]
    record = ClipRecord(
        id="1", path="a\u2028b.mp4", start=0.0, frames=1, fps=1.0, height=2, width=2, caption="c", task="x\x0cy"
    )
    write_records(tmp_path / "clips.jsonl", [record])
    assert read_records(tmp_path / "clips.jsonl") == [record]


def test_brackets_of_absurd_depth_are_text(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("video\tcaption\nx.mp4\t" + "[" * 90_000 + "\n")
    assert list_clips(tmp_path / "t.tsv")[1][0].caption == "[" * 90_000


def test_videos_that_a_folders_table_leaves_out_have_no_caption(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    write(tmp_path / "captions.csv", [{"video": "b.mp4", "caption": "pour"}])
    found = list_clips(tmp_path)[1]
    assert [(c.span.path.name, c.caption, c.where) for c in found] == [
        ("b.mp4", "pour", "row 1"),
        ("a.mp4", "", "a.mp4, in no row of captions.csv"),
    ]


def test_a_text_beside_a_video_is_utf_8(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DatasetError, match=r"a\.txt: got 'byte 0xe9 at 3', wanted UTF-8"):
        list_clips(tmp_path)
