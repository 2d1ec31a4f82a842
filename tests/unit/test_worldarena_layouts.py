"""WorldArena's layouts: demonstrations come back, list indices are not episode numbers, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.lerobot import LeRobotDataset
from physisforcing.core.prepare import prepare
from physisforcing.core.readers import detect_layout, open_dataset
from physisforcing.core.video import probe_mp4
from physisforcing.core.worldarena import WorldArenaDataset, cache_name, demo_folder, list_numbers, metadata_rows
from physisforcing.data_export import DataExportConfig, export, main
from physisforcing.planner.worldarena_layouts import RECORDED, DemonstrationWriter, LayoutEpisode, read_png
from physisforcing.planner.worldarena_states import link_poses, poses_of, state_names, states_of
from worldarena_episodes import joints_of, picture, poses_of_links, write_demonstrations


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demonstrations(tmp_path_factory.mktemp("demos") / "set")


@pytest.fixture(scope="module")
def exported(demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """All of them in the layout, numbered from 40; tests only read it."""
    root = tmp_path_factory.mktemp("exported") / "wa"
    return root, export(DataExportConfig(input=str(demonstrations), output=str(root), first=40), progress=False)


def test_demonstrations_come_back(demonstrations: Path, exported: tuple[Path, dict]) -> None:
    root, about = exported
    source = LeRobotDataset(demonstrations)
    assert detect_layout(root) == "WorldArena"
    back = open_dataset(root)
    assert isinstance(back, WorldArenaDataset) and len(back) == len(source) == 12 and back.fps == source.fps
    assert [(e.task_name, e.row["number"]) for e in back.episodes] == [
        *(("adjust_bottle", number) for number in range(40, 51)),
        ("click_bell", 40),
    ], "in the order of numbers"
    assert about["states"] == back.info["states"] == {"layout": "left_first", "columns": state_names("left_first")}
    for index, episode in enumerate(back.episodes):
        theirs = source.episodes[index]
        assert (episode.instruction, episode.seed, episode.scene_hash) == (
            theirs.instruction,
            theirs.seed,
            theirs.scene_hash,
        )
        for name in ("observation.state", "action"):
            np.testing.assert_array_equal(back.columns(index)[name], source.columns(index)[name])
        far = np.abs(back.frames(index)[:, ::2, ::2].astype(int) - source.frames(index))
        assert far.mean() < 1.5 and back.frames(index).shape[1:] == (240, 320, 3)
        poses, grippers = poses_of("left_first", back.states(index))
        # In the dataset the right arm's link comes first.
        expected = poses_of_links(theirs.seed, theirs.length)[:, ::-1]
        expected = np.concatenate([expected[..., :3], np.sign(expected[..., 3:4]) * expected[..., 3:]], axis=-1)
        np.testing.assert_allclose(poses, expected, atol=1e-6)
        np.testing.assert_array_equal(grippers, source.columns(index)["observation.state"][:, [6, 13]])
    assert back.verify()["frames"] == source.num_frames


def test_actions_are_the_pose_at_the_picture(demonstrations: Path, tmp_path: Path) -> None:
    """Their row 0 is the pose at frame 0; our action 0 is the target after it."""
    export(DataExportConfig(input=str(demonstrations), output=str(tmp_path / "wa"), episodes=1), progress=False)
    stored = np.load(demo_folder(tmp_path / "wa", "click_bell") / "actions" / "episode0.npy")
    np.testing.assert_array_equal(stored, joints_of(0, 6))


def test_the_files_beside_the_tasks(exported: tuple[Path, dict]) -> None:
    root, _ = exported
    metadata = json.loads((root / "robotwin_metadata.json").read_text())
    assert metadata == metadata_rows(root) and len(metadata) == 12
    assert all(Path(row["video_path"]).is_absolute() and set(row) == {"video_path", "n_frames"} for row in metadata)
    for row in metadata:
        assert row["n_frames"] == probe_mp4(row["video_path"]).frames
    for row in json.loads((root / "summary.json").read_text()):
        path = Path(row["gt_path"])
        assert path.parts[-5] in ("adjust_bottle", "click_bell"), "where the benchmark reads the task's name"
        first, label = read_png(Path(row["image"]))
        assert label == RECORDED and first.shape == (240, 320, 3)
        number = int(path.stem.removeprefix("episode"))
        assert row["prompt"] == [f"do {path.parts[-5]} {number - 40}"]
        if number == 40:  # the writer got this picture decoded from the dataset's video
            assert np.abs(first[::2, ::2].astype(int) - picture(0)).mean() < 1.5


def test_list_indices_are_not_numbers(tmp_path: Path) -> None:
    """Their metadata is sorted by name."""
    for number in range(12):
        frames, joints = np.zeros((1, 240, 320, 3), np.uint8), joints_of(number, 1)
        DemonstrationWriter(tmp_path / f"{number}", states="joint14").add(
            LayoutEpisode(task="click_bell", number=number, frames_THWC=frames, joints_TA=joints, instructions=["x"])
        )
        for kind in ("video", "actions"):
            source = demo_folder(tmp_path / f"{number}", "click_bell") / kind
            target = demo_folder(tmp_path / "all", "click_bell") / kind
            target.mkdir(parents=True, exist_ok=True)
            for path in source.iterdir():
                path.rename(target / path.name)
    metadata = metadata_rows(tmp_path / "all")
    numbers = list_numbers(metadata, "click_bell")
    assert numbers[:5] == [0, 1, 10, 11, 2] and sorted(numbers) == list(range(12))
    assert list_numbers(metadata, "click_bell", below=10) == list(range(10))
    assert cache_name(numbers[2], 45) == "episode10_chunk000045_vidar.pth"


def test_states_in_the_three_layouts() -> None:
    joints, poses = joints_of(1, 4), np.abs(poses_of_links(1, 4).astype(np.float64))
    left = states_of("left_first", joints, poses)
    right = states_of("right_first", joints, poses)
    np.testing.assert_allclose(left[:, :3], poses[:, 0, :3], rtol=1e-6)
    np.testing.assert_allclose(left[:, 6], poses[:, 0, 3], rtol=1e-6, err_msg="xyzw: w is the last of four")
    np.testing.assert_allclose(right[:, 8:15], poses[:, 0], rtol=1e-6, err_msg="the left arm comes second, wxyz")
    assert (left[:, 7] == joints[:, 6]).all() and (right[:, 7] == joints[:, 13]).all()
    for layout, rows in (("left_first", left), ("right_first", right)):
        assert len(state_names(layout)) == 16 and state_names(layout)[7] == f"{layout.split('_')[0]}_gripper"
        back, grippers = poses_of(layout, rows)
        np.testing.assert_allclose(back, poses, rtol=1e-6)
        np.testing.assert_array_equal(grippers, joints[:, [6, 13]])
    np.testing.assert_array_equal(states_of("joint14", joints, None), joints)
    with pytest.raises(UserError, match="joint14"):
        states_of("left_first", joints, None)
    with pytest.raises(UserError, match="did you mean 'right_first'"):
        state_names("right_frist")
    with pytest.raises(UserError, match="fl_link6"):
        link_poses(np.zeros((2, 1, 7)), np.array([1]), {1: "panda_hand"})


def test_hdf5_as_robotwin_records_it(demonstrations: Path, tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    export(
        DataExportConfig(input=str(demonstrations), output=str(tmp_path / "wa"), hdf5=True, episodes=1), progress=False
    )
    folder = demo_folder(tmp_path / "wa", "adjust_bottle")
    recorded = open_dataset(folder, instruction="task", repeats="keep")
    assert recorded.layout == "RoboTwin HDF5"
    np.testing.assert_array_equal(recorded.columns(0)["observation.state"], joints_of(0, 6))
    assert np.abs(recorded.frames(0)[0, ::2, ::2].astype(int) - picture(0)).mean() < 2, "red is red"
    poses = np.load(folder / "states/episode0.npy")
    np.testing.assert_allclose(recorded.columns(0)["observation.endpose"][:, :3], poses[:, :3], atol=1e-6)


def test_prepare_reads_the_layout(demonstrations: Path, tmp_path: Path) -> None:
    export(DataExportConfig(input=str(demonstrations), output=str(tmp_path / "wa"), episodes=2), progress=False)
    prepare(tmp_path / "v3", tmp_path / "wa")
    back = LeRobotDataset(tmp_path / "v3")
    assert len(back) == 3 and {e.task_name for e in back.episodes} == {"adjust_bottle", "click_bell"}
    bell = next(e.index for e in back.episodes if e.task_name == "click_bell")
    np.testing.assert_array_equal(back.columns(bell)["action"][:-1], joints_of(0, 6)[1:])


def test_refused_before_anything_is_written(demonstrations: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("x")
    for match, settings in {
        "an empty folder": {"output": str(tmp_path / "full")},
        "did you mean 'worldarena'": {"layout": "worldarenna"},
        "click_bell": {"tasks": ["clik_bell"]},
        "states=joint14": {"source": "imagined"},
        "prompt_template": {"prompt_template": "nothing"},
        "stride": {"stride": 0},
    }.items():
        config = DataExportConfig(**({"input": str(demonstrations), "output": str(tmp_path / "new")} | settings))  # type: ignore[arg-type]
        with pytest.raises(UserError, match=match):
            export(config, progress=False)
    assert not (tmp_path / "new").exists()
    bad = LayoutEpisode(
        task="click_bell",
        number=0,
        frames_THWC=np.zeros((3, 120, 160, 3), np.uint8),
        joints_TA=joints_of(0, 4),
        instructions=["x"],
    )
    with pytest.raises(UserError, match="3 pictures"):
        DemonstrationWriter(tmp_path / "new", states="joint14").add(bad)
    with pytest.raises(UserError, match="at least one"):
        DemonstrationWriter(tmp_path / "new").finalize()


@pytest.mark.parametrize("victim", ["actions", "video", "instructions"])
def test_damaged_folders_are_named(demonstrations: Path, tmp_path: Path, victim: str) -> None:
    config = DataExportConfig(input=str(demonstrations), output=str(tmp_path / "wa"), tasks=["click_bell"])
    export(config, progress=False)
    path = next((demo_folder(tmp_path / "wa", "click_bell") / victim).iterdir())
    if victim == "actions":
        np.save(path, joints_of(0, 5))
        with pytest.raises(DatasetError, match=r"episode0\.mp4: got '6 pictures', wanted 5"):
            WorldArenaDataset(tmp_path / "wa")
        with path.open("wb") as file:  # a header that announces 56 TB
            about = {"descr": "<f4", "fortran_order": False, "shape": (10**12, 14)}
            np.lib.format.write_array_header_1_0(file, about)
            file.write(bytes(400))
        with pytest.raises(DatasetError, match=r"episode0\.npy"):
            WorldArenaDataset(tmp_path / "wa")
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    with pytest.raises(DatasetError, match=path.name):
        WorldArenaDataset(tmp_path / "wa").verify()


def test_the_command(demonstrations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0 and "worldarena_track2" in capsys.readouterr().out
    words = [f"input={demonstrations}", f"output={tmp_path / 'wa'}", "task=click_bell"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"][0]["task"] == "click_bell"
    with pytest.raises(UserError, match="did you mean 'layout'"):
        main([*words, "layuot=worldarena"])
