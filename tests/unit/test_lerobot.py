"""LeRobot v3 datasets: layout, exactness, atomic and parallel writing, refusals."""

import json
import multiprocessing
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from physisforcing.core import lerobot_writer
from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.lerobot import GROUND_TRUTH_PATH, HEAD, LeRobotDataset, LeRobotWriter, robot_features
from physisforcing.core.types import FPS

JOINTS = [f"joint{i}" for i in range(14)]
SIZE = {"height": 48, "width": 64}


def features(**kwargs):
    return robot_features(JOINTS, **(SIZE | kwargs))


def episode(seed, length=9):
    rng = np.random.default_rng(seed)
    state = rng.normal(size=(length, 14)).astype(np.float32)
    base = rng.integers(60, 200, size=3)
    ramp = np.linspace(0, 40, 64)[None, None, :, None] + np.arange(length)[:, None, None, None]
    frames = np.broadcast_to(base + ramp, (length, 48, 64, 3)).astype(np.uint8)
    success = np.zeros(length, bool)
    success[-1] = seed % 2 == 0
    columns = {
        "observation.state": state,
        "observation.state_measured": state + 0.01,
        "action": np.concatenate([state[1:], state[-1:]]),
        "next.success": success,
    }
    return columns, {HEAD: frames}


def add(writer, seed, length=9, task="click_bell", **kwargs):
    columns, frames = episode(seed, length)
    return writer.add_episode(
        columns=columns,
        frames=frames,
        instruction=f"do {task}",
        task_name=task,
        seed=seed,
        success=bool(columns["next.success"][-1]),
        scene_hash=f"hash{seed}",
        policy="expert",
        embodiment="robot",
        assets_version="1",
        attachments={GROUND_TRUTH_PATH: lambda path: path.write_bytes(bytes([seed % 256] * 8))},
        **kwargs,
    )


@pytest.fixture
def root(tmp_path):
    writer = LeRobotWriter(tmp_path / "data", features(), robot_type="aloha")
    for seed, length in ((3, 9), (1, 5), (2, 12)):
        add(writer, seed, length)
    add(writer, 1, 7, task="adjust_bottle")
    return writer.finalize()


def test_episodes_are_ordered_by_task_and_seed(root):
    data = LeRobotDataset(root)
    assert [(e.task_name, e.seed, e.length) for e in data.episodes] == [
        ("adjust_bottle", 1, 7),
        ("click_bell", 1, 5),
        ("click_bell", 2, 12),
        ("click_bell", 3, 9),
    ]
    assert [e.success for e in data.episodes] == [False, False, True, False]
    assert data.episodes[2].scene_hash == "hash2" and data.episodes[2].policy == "expert"
    assert (data.num_episodes, data.num_frames, data.fps) == (4, 33, pytest.approx(FPS))
    assert not (root / "staging").exists()


def test_values_come_back(root):
    data = LeRobotDataset(root)
    columns, frames = episode(2, 12)
    got = data.columns(2)
    for name, values in columns.items():
        assert got[name].dtype == values.dtype
        np.testing.assert_array_equal(got[name], values)
    np.testing.assert_allclose(got["timestamp"], np.arange(12) * 0.06, atol=1e-6)
    np.testing.assert_array_equal(got["index"], 12 + np.arange(12))
    assert set(got["task_index"]) == {data.tasks.index("do click_bell")}
    assert np.abs(data.frames(2).astype(int) - frames[HEAD]).max() <= 3
    np.testing.assert_array_equal(data.frames(2, [7, 0, 7]), data.frames(2)[[7, 0, 7]])
    assert data.ground_truth_path(2).read_bytes() == bytes([2] * 8)
    assert data.verify() == {"episodes": 4, "frames": 33, "videos": 4}


def test_cache_gives_the_same_frames(root):
    cold, warm = LeRobotDataset(root), LeRobotDataset(root, cache_episodes=2)
    for index in (0, 1, 2, 0, 3):
        np.testing.assert_array_equal(cold.frames(index, [1, 4]), warm.frames(index, [1, 4]))
    assert len(warm._frames) == 2


def test_layout_is_lerobot_v3(root):
    info = json.loads((root / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["robot_type"] == "aloha"
    assert info["fps"] == pytest.approx(50 / 3) and info["total_frames"] == 33 and info["total_tasks"] == 2
    assert info["features"][HEAD]["dtype"] == "video" and info["features"][HEAD]["shape"] == [48, 64, 3]
    assert set(info["features"]) == set(features()) | {
        "timestamp",
        "frame_index",
        "episode_index",
        "index",
        "task_index",
    }
    rows = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert (
        rows[1]
        | {
            "episode_index": 1,
            "tasks": ["do click_bell"],
            "length": 5,
            "data/chunk_index": 0,
            "data/file_index": 1,
            "dataset_from_index": 7,
            "dataset_to_index": 12,
            f"videos/{HEAD}/chunk_index": 0,
            f"videos/{HEAD}/file_index": 1,
            f"videos/{HEAD}/from_timestamp": 0.0,
            f"videos/{HEAD}/to_timestamp": 5 * 0.06,
        }
        == rows[1]
    )
    table = pq.read_table(root / "data/chunk-000/file-002.parquet")
    assert str(table.schema.field("action").type) == "fixed_size_list<element: float>[14]"
    assert str(table.schema.field("next.success").type) == "bool"
    pandas = json.loads(pq.read_schema(root / "meta/tasks.parquet").metadata[b"pandas"])
    assert pandas["index_columns"] == ["task"]


def test_statistics_are_those_of_all_rows(root):
    data = LeRobotDataset(root)
    stats = json.loads((root / "meta/stats.json").read_text())
    rows = np.concatenate([data.columns(i)["action"] for i in range(4)]).astype(np.float64)
    for name, value in {"mean": rows.mean(0), "std": rows.std(0), "min": rows.min(0), "max": rows.max(0)}.items():
        np.testing.assert_allclose(stats["action"][name], value, rtol=1e-9)
    assert stats["action"]["count"] == [33]
    assert np.shape(stats[HEAD]["mean"]) == (3, 1, 1) and 0 < stats[HEAD]["mean"][0][0][0] < 1


def test_more_episodes_may_follow(root):
    before = {p: p.read_bytes() for p in root.glob("data/*/*.parquet")}
    hashes = [LeRobotDataset(root).content_hash(i) for i in range(4)]
    writer = LeRobotWriter(root, features(), robot_type="aloha")
    assert writer.keys() == {"adjust_bottle-00000001"} | {f"click_bell-0000000{i}" for i in (1, 2, 3)}
    add(writer, 0, 6, task="adjust_bottle")
    writer.finalize()
    data = LeRobotDataset(root)
    assert [e.seed for e in data.episodes] == [1, 1, 2, 3, 0] and data.columns(4)["index"][0] == 33
    assert all(path.read_bytes() == content for path, content in before.items())
    assert [data.content_hash(i) for i in range(4)] == hashes and len(set(hashes)) == 4


def _write_some(root, seeds):
    writer = LeRobotWriter(root, features())
    for seed in seeds:
        add(writer, seed, 4)


def test_processes_write_side_by_side(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_write_some, args=(tmp_path / "many", range(i, 12, 3)), daemon=True) for i in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    one = LeRobotWriter(tmp_path / "one", features())
    for seed in range(12):
        add(one, seed, 4)
    many = LeRobotDataset(LeRobotWriter(tmp_path / "many", features()).finalize())
    assert many.fingerprint() == LeRobotDataset(one.finalize()).fingerprint()
    assert [e.seed for e in many.episodes] == list(range(12))


@pytest.mark.parametrize("fail_at", range(0, 9, 2))
def test_interrupted_finalize_continues(tmp_path, monkeypatch, fail_at):
    reference = LeRobotWriter(tmp_path / "a", features())
    broken = LeRobotWriter(tmp_path / "b", features())
    for writer in (reference, broken):
        for seed in (4, 5, 6):
            add(writer, seed)
    expected = LeRobotDataset(reference.finalize())
    calls = {"n": 0}
    real = lerobot_writer.os.replace

    def replace(source, target):
        if calls["n"] == fail_at:
            raise KeyboardInterrupt
        calls["n"] += 1
        real(source, target)

    monkeypatch.setattr(lerobot_writer.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        broken.finalize()
    monkeypatch.setattr(lerobot_writer.os, "replace", real)
    later = LeRobotWriter(tmp_path / "b", features())
    add(later, 1)  # sorts first, but must not take a number that is already given
    data = LeRobotDataset(later.finalize())
    assert [e.seed for e in data.episodes[-4:]] in ([4, 5, 6, 1], [1, 4, 5, 6])
    by_seed = {e.seed: data.content_hash(e.index) for e in data.episodes}
    assert [by_seed[e.seed] for e in expected.episodes] == [expected.content_hash(i) for i in range(3)]
    assert data.verify()["frames"] == 36


def test_a_killed_episode_leaves_nothing(tmp_path):
    writer = LeRobotWriter(tmp_path / "d", features())
    add(writer, 1)

    def die(path):
        raise KeyboardInterrupt

    columns, frames = episode(2)
    with pytest.raises(KeyboardInterrupt):
        writer.add_episode(
            columns=columns,
            frames=frames,
            instruction="x",
            task_name="click_bell",
            seed=2,
            success=True,
            attachments={GROUND_TRUTH_PATH: die},
        )
    assert writer.keys() == {"click_bell-00000001"}
    with pytest.raises(DatasetError, match="unfinished collection"):
        LeRobotDataset(tmp_path / "d")
    assert LeRobotDataset(writer.finalize()).num_episodes == 1


def test_the_same_episode_twice_is_refused(tmp_path):
    writer = LeRobotWriter(tmp_path / "d", features())
    add(writer, 1)
    with pytest.raises(DatasetError, match="click_bell-00000001"):
        add(writer, 1)


def test_columns_must_fit_the_features(tmp_path):
    writer = LeRobotWriter(tmp_path / "d", features())
    good = {"instruction": "x", "task_name": "t", "seed": 0, "success": True}
    columns, frames = episode(0)
    for name, wrong in (
        ("action", columns["action"][:, :13]),
        ("action", columns["action"][:-1]),
        ("action", np.full((9, 14), np.nan)),
        ("unheard_of", columns["action"]),
    ):
        with pytest.raises(ValueError, match=name):
            writer.add_episode(columns=columns | {name: wrong}, frames=frames, **good)
    assert writer.keys() == set()


def test_truncated_video_is_refused(root):
    path = root / f"videos/{HEAD}/chunk-000/file-002.mp4"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DatasetError, match=r"file-002\.mp4.*bytes.*truncated.*Fix"):
        LeRobotDataset(root)


@pytest.mark.parametrize(
    "lost",
    [
        f"videos/{HEAD}/chunk-000/file-001.mp4",
        "data/chunk-000/file-003.parquet",
        "meta/tasks.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "meta/info.json",
    ],
)
def test_missing_files_are_named(root, lost):
    (root / lost).unlink()
    with pytest.raises(DatasetError) as error:
        LeRobotDataset(root)
    assert lost.split("/")[-1] in str(error.value) and "Fix" in str(error.value)
    assert isinstance(error.value, UserError) and error.value.exit_code == 2


def test_wrong_counts_are_found(root):
    """Same file size recorded, other content: only decoding shows it."""
    rows = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    videos = root / f"videos/{HEAD}/chunk-000"
    shutil.copy(videos / "file-001.mp4", videos / "file-002.mp4")
    import pyarrow as pa

    rows[2][f"videos/{HEAD}/bytes"] = rows[1][f"videos/{HEAD}/bytes"]
    pq.write_table(pa.Table.from_pylist(rows), root / "meta/episodes/chunk-000/file-000.parquet")
    data = LeRobotDataset(root)
    with pytest.raises(DatasetError, match=r"file-002\.mp4: got '5 frames"):
        data.verify()


def test_other_features_do_not_mix(root):
    with pytest.raises(DatasetError, match="left_wrist"):
        LeRobotWriter(root, features(cameras=("head", "left_wrist")))


def test_foreign_layout_with_shared_files(root, tmp_path):
    """LeRobot's own writer puts many episodes into one mp4 and one parquet, and records none of our columns."""
    import pyarrow as pa

    from physisforcing.core.video import write_mp4

    data = LeRobotDataset(root)
    other = tmp_path / "foreign"
    shutil.copytree(root / "meta", other / "meta")
    rows = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    keep = ("episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index")
    lean = []
    for row in rows:
        start = row["dataset_from_index"]
        lean.append(
            {k: row[k] for k in keep}
            | {
                "data/chunk_index": 0,
                "data/file_index": 0,
                f"videos/{HEAD}/chunk_index": 0,
                f"videos/{HEAD}/file_index": 0,
                f"videos/{HEAD}/from_timestamp": start * 0.06,
                f"videos/{HEAD}/to_timestamp": 0.0,
            }
        )
    pq.write_table(pa.Table.from_pylist(lean), other / "meta/episodes/chunk-000/file-000.parquet")
    (other / "data/chunk-000").mkdir(parents=True)
    tables = [pq.read_table(data.data_path(i)) for i in range(4)]
    pq.write_table(pa.concat_tables(tables), other / "data/chunk-000/file-000.parquet")
    frames = np.concatenate([data.frames(i) for i in range(4)])
    write_mp4(other / f"videos/{HEAD}/chunk-000/file-000.mp4", frames, FPS, gop=8)
    foreign = LeRobotDataset(other)
    for i in range(4):
        np.testing.assert_array_equal(foreign.columns(i)["action"], data.columns(i)["action"])
        assert np.abs(foreign.frames(i, [0, 4]).astype(int) - data.frames(i, [0, 4])).mean() < 1.5
    assert foreign.verify()["videos"] == 1 and foreign.episodes[0].success is None
    (other / "data/chunk-000/file-000.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DatasetError, match=r"file-000\.parquet"):
        LeRobotDataset(other).columns(0)
