"""Readers of other layouts: small files with known numbers in each layout, read back; damaged files named."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.lerobot import HEAD, LeRobotDataset
from physisforcing.core.pictures import shrink_area
from physisforcing.core.prepare import PrepareConfig, prepare
from physisforcing.core.readers import detect_layout, open_dataset
from physisforcing.core.video import write_mp4
from physisforcing.data_prepare import main

h5py = pytest.importorskip("h5py")
#: A red and a blue half: exchanged channels cannot hide.
RED_BLUE = np.zeros((32, 48, 3), np.uint8)
RED_BLUE[:, :24], RED_BLUE[:, 24:] = (200, 20, 20), (20, 20, 200)


def picture(number: int) -> np.ndarray:
    """RGB; brighter with its number."""
    return np.clip(RED_BLUE.astype(int) + 8 * number, 0, 255).astype(np.uint8)


def jpeg(rgb: np.ndarray, *, marked: bool) -> bytes:
    """As the recorders store it: standard and marked, or with red and blue exchanged and no mark."""
    from PIL import Image

    out = io.BytesIO()
    stored = rgb if marked else rgb[..., ::-1]
    comment = {"comment": b"XPL-RGB1"} if marked else {}
    Image.fromarray(np.ascontiguousarray(stored)).save(out, format="JPEG", quality=95, subsampling=0, **comment)
    return out.getvalue()


def targets(length: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(length, 14))
    values[:, [6, 13]] = np.linspace(0, 1, length)[:, None]
    return values


#: Row of the motion that each recorded row shows: the recorder repeats row 3, and the robot waits in rows 5 to 5.
RECORDED = [0, 1, 2, 3, 3, 4, 5, 5, 5, 5, 6]


def write_robotwin(
    folder: Path, episodes: int = 2, *, marked: bool = False, vector: bool = True, endpose: bool = True
) -> Path:
    """``folder`` is <task>/<config>."""
    (folder / "data").mkdir(parents=True)
    (folder / "instructions").mkdir()
    for number in range(episodes):
        motion, rows = targets(7, number), np.array(RECORDED)
        stored = [jpeg(picture(row + number), marked=marked) for row in rows]
        width = max(map(len, stored))
        with h5py.File(folder / f"data/episode{number}.hdf5", "w") as file:
            state = motion[rows]
            joints = file.create_group("joint_action")
            for name, part in {
                "left_arm": state[:, :6],
                "left_gripper": state[:, 6],
                "right_arm": state[:, 7:13],
                "right_gripper": state[:, 13],
            }.items():
                joints[name] = part
            if vector:
                joints["vector"] = state
            if endpose:
                for side in ("left", "right"):
                    file[f"endpose/{side}_endpose"] = np.tile(np.arange(7.0), (len(rows), 1)) + rows[:, None]
                    file[f"endpose/{side}_gripper"] = state[:, 6]
            for camera in ("head_camera", "left_camera"):
                padded = [data.ljust(width + 9, b"\0") for data in stored]
                file.create_dataset(f"observation/{camera}/rgb", data=padded, dtype=f"S{width + 9}")
                file[f"observation/{camera}/intrinsic_cv"] = np.tile(np.eye(3), (len(rows), 1, 1))
            file["pointcloud"] = np.zeros((len(rows), 0))
        texts = {"seen": [f"Ring bell {number}.", "Ring it."], "unseen": [f"Strike the bell {number}."]}
        (folder / f"instructions/episode{number}.json").write_text(json.dumps(texts))
    (folder / "seed.txt").write_text(" ".join(str(7 + 2 * number) for number in range(episodes)))
    return folder


@pytest.fixture
def robotwin(tmp_path) -> Path:
    return write_robotwin(tmp_path / "click_bell" / "demo_clean")


def test_robotwin_episodes(robotwin) -> None:
    data = open_dataset(robotwin)
    assert data.layout == detect_layout(robotwin) == "RoboTwin HDF5" and data.fps == pytest.approx(50 / 3)
    assert [(e.task_name, e.seed, e.success, e.instruction) for e in data.episodes] == [
        ("click_bell", 7, True, "Ring bell 0."),
        ("click_bell", 9, True, "Ring bell 1."),
    ]
    assert data.tasks == ["Ring bell 0.", "Ring bell 1."] and len(data) == data.num_episodes == 2
    assert data.video_keys == [HEAD, "observation.images.left_wrist"]
    assert data.features[HEAD]["shape"] == [32, 48, 3]
    assert data.features["action"]["names"][:7] == [*(f"left_joint_{k}" for k in range(1, 7)), "left_gripper"]
    assert "pointcloud" in data.info["left_out"] and data.ground_truth_path(0) is None
    assert data.verify() == {"episodes": 2, "frames": 18, "videos": 4}


def test_a_file_is_read_once_for_its_digest_and_again_when_it_changes(robotwin, monkeypatch) -> None:
    data = open_dataset(robotwin)
    one, opened, read = data._found[0], [], hashlib.file_digest
    wanted = hashlib.sha256(b"auto|Ring bell 0.|" + f"{one.fps}|".encode() + one.kept.tobytes() + one.path.read_bytes())
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: opened.append(file.name) or read(file, kind))
    assert data.content_hash(0) == data.content_hash(0) == wanted.hexdigest()
    assert opened == [str(one.path)]
    with one.path.open("ab") as file:
        file.write(b"more")
    wanted.update(b"more")
    assert data.content_hash(0) == wanted.hexdigest() and len(opened) == 2


def test_robotwin_rows_and_repeats(robotwin) -> None:
    """One row of each run of equal rows goes: the boundary's repeat, and one of the four in which the robot waits."""
    data, kept = open_dataset(robotwin), [0, 1, 2, 3, 4, 5, 5, 5, 6]
    got = data.columns(1)
    np.testing.assert_array_equal(got["observation.state"], targets(7, 1)[kept].astype(np.float32))
    np.testing.assert_array_equal(got["action"][:-1], got["observation.state"][1:])
    np.testing.assert_array_equal(got["action"][-1], got["observation.state"][-1])
    assert got["observation.endpose"].shape == (9, 16)
    np.testing.assert_array_equal(got["observation.endpose"][:, 0], np.array(kept, np.float32))
    np.testing.assert_allclose(got["timestamp"], 0.06 * np.arange(9), atol=1e-6)
    np.testing.assert_array_equal(got["index"], 9 + np.arange(9))
    assert data.info["repeats"] == 4 and data.episodes[1].row["repeats"] == 2
    whole = open_dataset(robotwin, repeats="keep")
    assert whole.num_frames == 22 and whole.fingerprint() != data.fingerprint()
    np.testing.assert_array_equal(whole.columns(0)["observation.state"], targets(7, 0)[RECORDED].astype(np.float32))


@pytest.mark.parametrize("marked", [False, True])
def test_colours_of_both_kinds_of_files(tmp_path, marked) -> None:
    data = open_dataset(write_robotwin(tmp_path / "click_bell" / "clean", marked=marked))
    frames = data.frames(0)
    shown = np.stack([picture(row) for row in (0, 1, 2, 3, 4, 5, 5, 5, 6)])
    assert np.abs(frames.astype(int) - shown)[:, :, 2:22].max() < 8 and frames.dtype == np.uint8
    assert frames[0, 16, 8, 0] > 150 > 60 > frames[0, 16, 8, 2], "the left half is red"
    np.testing.assert_array_equal(data.frames(0, [4, 0, 4]), frames[[4, 0, 4]])
    as_it_is = open_dataset(data.root, channels="rgb").frames(0, [0])[0]
    np.testing.assert_array_equal(as_it_is, frames[0] if marked else frames[0][..., ::-1])
    with pytest.raises(IndexError):
        data.frames(0, [9])
    with pytest.raises(UserError, match="left_wrist"):
        data.frames(0, [0], "observation.images.left_writs")


def test_robotwin_parts_alone_and_several_folders(tmp_path) -> None:
    write_robotwin(tmp_path / "data" / "click_bell" / "aloha-agilex_clean_50", 1, vector=False, endpose=False)
    write_robotwin(tmp_path / "data" / "shake_bottle" / "aloha-agilex_clean_50", 2, vector=False, endpose=False)
    data = open_dataset(tmp_path / "data", instruction="unseen")
    assert [e.task_name for e in data.episodes] == ["click_bell", "shake_bottle", "shake_bottle"]
    assert data.episodes[2].instruction == "Strike the bell 1." and data.episodes[0].embodiment == "aloha-agilex"
    np.testing.assert_array_equal(data.columns(0)["observation.state"][0], targets(7, 0)[0].astype(np.float32))
    assert open_dataset(tmp_path / "data", instruction="task").tasks == ["click bell", "shake bottle"]


def edit(path: Path, change) -> None:
    with h5py.File(path, "r+") as file:
        change(file)


def replace(place: str, values) -> object:
    def change(file) -> None:
        del file[place]
        file[place] = values

    return change


def shorten_jpeg(file) -> None:
    stored = file["observation/head_camera/rgb"]
    stored[3] = stored[3][:200]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda file: file.__delitem__("joint_action"), "joint_action/vector"),
        (replace("joint_action/vector", np.zeros((11, 14))), "order left_arm"),
        (replace("joint_action/vector", np.zeros((10, 14))), "order left_arm"),
        (replace("joint_action/left_arm", np.full((11, 6), np.nan)), "NaN"),
        (replace("joint_action/right_gripper", np.zeros(9)), "one length"),
        (replace("endpose/left_endpose", np.zeros((11, 6))), "7, 1, 7 and 1"),
        (lambda file: file.__delitem__("observation"), "observation"),
        (replace("observation/head_camera/rgb", np.array([b"\xff\xd8"] * 5)), "one length"),
        (lambda file: file.__setitem__("joint_action/left_arm2", h5py.ExternalLink("x.h5", "a")), None),
    ],
)
def test_damaged_robotwin_files_are_named(robotwin, change, named) -> None:
    path = robotwin / "data/episode1.hdf5"
    edit(path, change)
    if named is None:
        assert len(open_dataset(robotwin)) == 2, "a link that nothing reads is not followed"
        return
    with pytest.raises(DatasetError) as error:
        open_dataset(robotwin)
    assert "episode1.hdf5" in str(error.value) and named in str(error.value) and "Fix" in str(error.value)


def test_a_broken_picture_is_named_when_it_is_read(robotwin) -> None:
    edit(robotwin / "data/episode1.hdf5", shorten_jpeg)
    data = open_dataset(robotwin)
    data.frames(1, [0])
    with pytest.raises(DatasetError, match=r"episode1\.hdf5 /observation/head_camera/rgb frame 3.*FF D9"):
        data.frames(1)


def test_links_out_of_the_file_are_refused(robotwin) -> None:
    edit(robotwin / "data/episode1.hdf5", lambda file: file.__delitem__("joint_action/vector"))
    link = h5py.ExternalLink("episode0.hdf5", "/joint_action/vector")
    edit(robotwin / "data/episode1.hdf5", lambda file: file.__setitem__("joint_action/vector", link))
    with pytest.raises(DatasetError, match="ExternalLink"):
        open_dataset(robotwin)


def test_missing_and_wrong_pieces_beside_the_files(robotwin, tmp_path) -> None:
    (robotwin / "instructions/episode1.json").write_text('{"seen": []}')
    with pytest.raises(DatasetError, match=r"episode1\.json.*instruction=task"):
        open_dataset(robotwin)
    (robotwin / "instructions/episode1.json").unlink()
    with pytest.raises(DatasetError, match="no such file"):
        open_dataset(robotwin)
    (robotwin / "seed.txt").write_text("1 two")
    with pytest.raises(DatasetError, match=r"seed\.txt"):
        open_dataset(robotwin, instruction="task")
    (robotwin / "seed.txt").unlink()
    assert open_dataset(robotwin, instruction="task").episodes[0].seed == -1
    (robotwin / "data/episode0.hdf5").write_bytes(b"no HDF5 file")
    with pytest.raises(DatasetError, match="whole HDF5 file"):
        open_dataset(robotwin, instruction="task")
    with pytest.raises(DatasetError, match="no such folder"):
        open_dataset(tmp_path / "elsewhere")
    with pytest.raises(DatasetError, match="known layouts"):
        open_dataset(robotwin / "instructions")
    with pytest.raises(UserError, match="drop"):
        open_dataset(robotwin, repeats="remove")


def test_without_h5py(robotwin, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(UserError, match="pip install h5py"):
        open_dataset(robotwin)


def write_xpolicylab(folder: Path, *, action: bool = True, raw: bool = False, frequency: int | None = 25) -> Path:
    (folder / "data").mkdir(parents=True)
    for number in range(2):
        state, length = targets(6, 10 + number), 6
        with h5py.File(folder / f"data/episode_{number:07d}.hdf5", "w") as file:
            for group, values in (("state", state), ("action", state + 1)):
                if group == "action" and not action:
                    continue
                file[f"{group}/left_arm_joint_states"] = values[:, :6]
                file[f"{group}/left_ee_joint_states"] = values[:, 6:7]
                file[f"{group}/right_arm_joint_states"] = values[:, 7:13]
                file[f"{group}/right_ee_joint_states"] = values[:, 13:]
            file["state/left_ee_poses"] = np.zeros((length, 7))
            file["instructions"] = json.dumps(["press the stapler", "push it"])
            if frequency is not None:
                file["additional_info/frequency"] = frequency
            pictures = [picture(row) for row in range(length)]
            if raw:
                file["vision/cam_head/colors"] = np.stack(pictures)
            else:
                stored = [jpeg(one, marked=row % 2 == 0) for row, one in enumerate(pictures)]
                width = max(map(len, stored))
                file.create_dataset("vision/cam_head/colors", data=stored, dtype=f"S{width}")
            file["vision/cam_head/shape"] = [32, 48]
    return folder


@pytest.mark.parametrize("raw", [False, True])
def test_xpolicylab(tmp_path, raw) -> None:
    data = open_dataset(write_xpolicylab(tmp_path / "bench" / "press_stapler" / "arx_x5", raw=raw))
    assert data.layout == "XPolicyLab HDF5" and data.fps == 25 and data.tasks == ["press the stapler"]
    assert [(e.task_name, e.length, e.success, e.embodiment) for e in data.episodes] == [
        *[("press_stapler", 6, None, "arx_x5")] * 2,
    ]
    got = data.columns(1)
    np.testing.assert_array_equal(got["observation.state"], targets(6, 11).astype(np.float32))
    np.testing.assert_allclose(got["action"], targets(6, 11) + 1, rtol=1e-5, atol=1e-6)
    frames = data.frames(0)
    shown = np.stack([picture(row) for row in range(6)])
    assert np.abs(frames.astype(int) - shown)[:, :, 2:22].max() < 8, "marked and unmarked files side by side"
    assert "state/left_ee_poses" in data.info["left_out"] and "vision/cam_head/shape" in data.info["left_out"]


def test_xpolicylab_without_actions_or_rate(tmp_path) -> None:
    root = write_xpolicylab(tmp_path / "press_stapler" / "arx_x5", action=False, frequency=None)
    with pytest.raises(DatasetError, match="fps=30"):
        open_dataset(root)
    data = open_dataset(root, fps=20)
    state = data.columns(0)["observation.state"]
    np.testing.assert_array_equal(data.columns(0)["action"], np.concatenate([state[1:], state[-1:]]))
    with pytest.raises(UserError, match="repeats"):
        open_dataset(root, repeats="drop")
    edit(root / "data/episode_0000001.hdf5", lambda file: file.__delitem__("state/right_ee_joint_states"))
    with pytest.raises(DatasetError, match=r"episode_0000001\.hdf5 state.*right_ee_joint_states"):
        open_dataset(root, fps=20)


def write_v21(root: Path, lengths=(5, 8)) -> Path:
    video = {"dtype": "video", "shape": [32, 48, 3], "names": ["height", "width", "channels"], "info": {}}
    features = {"observation.images.cam_high": video}
    for name in ("observation.state", "action"):
        features[name] = {"dtype": "float32", "shape": [14], "names": None}
    for name, kind in (("timestamp", "float32"), *((n, "int64") for n in ("frame_index", "episode_index", "index"))):
        features[name] = {"dtype": kind, "shape": [1], "names": None}
    features["task_index"] = {"dtype": "int64", "shape": [1], "names": None}
    info = {"codebase_version": "v2.1", "robot_type": "aloha", "fps": 10, "chunks_size": 1, "features": features}
    info |= {"total_episodes": len(lengths), "total_frames": sum(lengths)}
    info |= {"data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"}
    info |= {"video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"}
    (root / "meta").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    tasks = [{"task_index": 1, "task": "shake"}, {"task_index": 0, "task": "ring"}]
    (root / "meta/tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)) + "\n")
    rows, start = [], 0
    for index, length in enumerate(lengths):
        rows.append({"episode_index": index, "tasks": [("ring", "shake")[index]], "length": length})
        values = targets(length, index).astype(np.float32)
        flat = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 14)
        table = {"observation.state": flat, "action": flat, "timestamp": pa.array(np.arange(length, dtype="f4") / 10)}
        table |= {"frame_index": pa.array(np.arange(length)), "episode_index": pa.array(np.full(length, index))}
        table |= {"index": pa.array(start + np.arange(length)), "task_index": pa.array(np.full(length, index))}
        path = root / f"data/chunk-{index:03d}/episode_{index:06d}.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table(table), path)
        frames = np.stack([picture(row) for row in range(length)])
        place = root / f"videos/chunk-{index:03d}/observation.images.cam_high/episode_{index:06d}.mp4"
        write_mp4(place, frames, 10)
        start += length
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return root


def test_lerobot_v21(tmp_path) -> None:
    data = open_dataset(write_v21(tmp_path / "v21"))
    assert data.layout == "LeRobot v2.1" and data.tasks == ["ring", "shake"] and data.fps == 10
    assert [(e.length, e.instruction, e.success, e.seed) for e in data.episodes] == [
        (5, "ring", None, -1),
        (8, "shake", None, -1),
    ]
    np.testing.assert_array_equal(data.columns(1)["action"], targets(8, 1).astype(np.float32))
    key = "observation.images.cam_high"
    shown = np.stack([picture(row) for row in (6, 0)])
    assert np.abs(data.frames(1, [6, 0], key).astype(int) - shown)[:, :, 2:18].max() < 8
    assert data.verify() == {"episodes": 2, "frames": 13, "videos": 2} and len(data.fingerprint()) == 64


@pytest.mark.parametrize(
    ("lost", "text"),
    [
        ("meta/tasks.jsonl", None),
        ("meta/episodes.jsonl", '{"episode_index": 0}'),
        ("meta/episodes.jsonl", "{not json"),
        ("meta/episodes.jsonl", '{"episode_index": 0, "length": 5, "tasks": ["ring"]}'),
        ("data/chunk-001/episode_000001.parquet", None),
        ("videos/chunk-001/observation.images.cam_high/episode_000001.mp4", None),
        ("meta/info.json", '{"codebase_version": "v2.1", "fps": 10}'),
        ("meta/info.json", '{"codebase_version": "v1.6"}'),
        ("meta/info.json", "nothing"),
    ],
)
def test_damaged_v21_datasets_are_named(tmp_path, lost, text) -> None:
    root = write_v21(tmp_path / "v21")
    (root / lost).unlink()
    if text is not None:
        (root / lost).write_text(text)
    with pytest.raises(DatasetError) as error:
        open_dataset(root)
    assert lost.split("/")[-1] in str(error.value) and "Fix" in str(error.value)


def test_pictures_inside_tables_are_refused(tmp_path) -> None:
    root = write_v21(tmp_path / "v21")
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["observation.images.cam_high"]["dtype"] = "image"
    (root / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(DatasetError, match="use_videos=True"):
        open_dataset(root)


def test_prepare_from_robotwin(robotwin, tmp_path) -> None:
    config = PrepareConfig(cameras=["head"], pictures="16x24")
    report = prepare(tmp_path / "v3", robotwin, config)
    assert report["repeated_rows_dropped"] == 4 and report["episodes"] == 2 and report["layout"] == "RoboTwin HDF5"
    assert "pointcloud" in report["not_carried_over"] and "observation.images.left_wrist" in report["not_carried_over"]
    made, source = open_dataset(tmp_path / "v3"), open_dataset(robotwin)
    assert isinstance(made, LeRobotDataset) and made.verify()["frames"] == 18 and made.video_keys == [HEAD]
    for index in range(2):
        for name in ("observation.state", "action", "observation.endpose", "timestamp"):
            np.testing.assert_array_equal(made.columns(index)[name], source.columns(index)[name])
        small = shrink_area(source.frames(index), 2)
        assert np.abs(made.frames(index).astype(int) - small)[:, :, 1:9].max() < 8
        episode = made.episodes[index]
        assert (episode.seed, episode.success, episode.task_name) == (7 + 2 * index, True, "click_bell")
        assert episode.key == f"click_bell-{7 + 2 * index:08d}-robotwin-demo_clean"
    again = prepare(tmp_path / "v3", robotwin, config)
    assert again["fingerprint"] == report["fingerprint"], "a finished conversion stays as it is"
    with pytest.raises(UserError, match="16x24"):
        prepare(tmp_path / "other", robotwin, PrepareConfig(pictures="20x24"))


def test_prepare_from_v21_through_the_command(tmp_path, capsys) -> None:
    root = write_v21(tmp_path / "v21")
    assert main([str(tmp_path / "v3"), str(root), "cameras=[head:cam_high]", "task=bells", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    made = LeRobotDataset(tmp_path / "v3")
    assert report["fingerprint"] == made.fingerprint() and made.video_keys == [HEAD] and made.fps == 10
    assert [(e.instruction, e.success, e.task_name) for e in made.episodes] == [
        ("ring", None, "bells"),
        ("shake", None, "bells"),
    ]
    np.testing.assert_array_equal(made.columns(1)["action"], targets(8, 1).astype(np.float32))
    with pytest.raises(UserError, match="cam_high"):
        prepare(tmp_path / "x", root, PrepareConfig(cameras=["head:cam_hihg"]))


def test_the_plain_reader_names_the_conversion(tmp_path) -> None:
    with pytest.raises(DatasetError, match="physis data prepare"):
        LeRobotDataset(write_v21(tmp_path / "v21"))
    shutil.rmtree(tmp_path / "v21")


def test_shrinking_is_the_mean_of_blocks() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 3), dtype=np.uint8)
    mean = frames.reshape(2, 3, 2, 4, 2, 3).astype(float).mean(axis=(2, 4))
    np.testing.assert_array_equal(shrink_area(frames, 2), np.floor(mean + 0.5).astype(np.uint8))
    assert shrink_area(frames, 1) is frames
    with pytest.raises(ValueError, match="divide"):
        shrink_area(frames, 4)
