"""WorldArena's layouts: what is written comes back, generated data says so, and list indices are not episode numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.ground_truth import GroundTruth, save
from physisforcing.core.lerobot import GROUND_TRUTH_PATH, HEAD, LeRobotDataset, LeRobotWriter, robot_features
from physisforcing.core.prepare import prepare
from physisforcing.core.readers import detect_layout, open_dataset
from physisforcing.core.types import DT, ActionChunk, DecoderNeeds, Rollout, RolloutRequest, ViewLayout, WorldModelSpec
from physisforcing.core.video import probe_mp4
from physisforcing.core.worldarena import (
    CONFIG,
    SIDECAR,
    WorldArenaDataset,
    cache_name,
    demo_folder,
    list_numbers,
    metadata_rows,
)
from physisforcing.data_export import DataExportConfig, export, main
from physisforcing.planner.action_planner import noise_seed
from physisforcing.planner.imagined import EpisodeImaginer
from physisforcing.planner.worldarena_data_engine import Pair, PairWriter, read_chunks, read_track2, rows_from
from physisforcing.planner.worldarena_layouts import RECORDED, DemonstrationWriter, LayoutEpisode, read_png
from physisforcing.planner.worldarena_states import link_poses, poses_of, state_names, states_of

JOINTS = [f"joint{k}" for k in range(14)]


def joints_of(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(length, 14)).astype(np.float32)


def poses_of_links(seed: int, length: int) -> np.ndarray:
    poses = np.random.default_rng(seed).normal(size=(length, 2, 7))
    poses[..., 3:] /= np.linalg.norm(poses[..., 3:], axis=-1, keepdims=True)
    return poses.astype(np.float32)


def truth(seed: int, length: int) -> GroundTruth:
    nothing = np.zeros(0, np.uint8)
    return GroundTruth(
        body_ids_K=np.array([3, 5], np.uint16),
        body_poses_TK7=poses_of_links(seed, length),
        body_names={3: "fr_link6", 5: "fl_link6"},
        view_names=("head",),
        size=(120, 160),
        intrinsics_V33=np.eye(3)[None],
        world_to_camera_TV44=np.tile(np.eye(4), (length, 1, 1, 1)),
        contact_frame_M=np.zeros(0, np.int32),
        contact_pair_M2=np.zeros((0, 2), np.uint16),
        contact_impulse_M=np.zeros(0, np.float32),
        stored_frames_D=np.zeros(0, np.int32),
        depth_png=nothing,
        depth_offsets=np.zeros(1, np.int64),
        ids_png=nothing,
        ids_offsets=np.zeros(1, np.int64),
    )


def picture(seed: int, height: int = 120, width: int = 160) -> np.ndarray:
    """Smooth, so that a video keeps it."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    return (np.stack([x, y, 0.5 + 0.3 * np.sin(seed + 3 * x)], axis=-1) * 200).astype(np.uint8)


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve short episodes of two tasks with the poses of both last links."""
    root = tmp_path_factory.mktemp("demos") / "set"
    writer = LeRobotWriter(root, robot_features(JOINTS, height=120, width=160))
    for task, count in (("adjust_bottle", 11), ("click_bell", 1)):
        for seed in range(count):
            length = 6 + seed % 3
            joints = joints_of(seed, length)
            writer.add_episode(
                columns={
                    "observation.state": joints,
                    "observation.state_measured": joints,
                    "action": np.concatenate([joints[1:], joints[-1:]]),
                    "next.success": np.arange(length) == length - 1,
                },
                frames={HEAD: np.stack([picture(seed + t) for t in range(length)])},
                instruction=f"do {task} {seed}",
                task_name=task,
                seed=seed,
                success=True,
                scene_hash=f"hash{seed}",
                policy="expert",
                attachments={GROUND_TRUTH_PATH: lambda path, s=seed, n=length: save(path, truth(s, n))},
            )
    return writer.finalize()


@pytest.fixture(scope="module")
def exported(demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """All of them in the layout, numbered from 40; tests only read it."""
    root = tmp_path_factory.mktemp("exported") / "wa"
    return root, export(DataExportConfig(input=str(demonstrations), output=str(root), first=40), progress=False)


# ------------------------------------------------------------------------------------------------------------ whole episodes


@pytest.mark.parametrize(
    ("name", "value"), [("candidates", 4), ("server", "auto"), ("prompt_template", "{instruction}!")]
)
def test_settings_of_a_planner_that_an_export_does_not_read_are_refused(name: str, value: object) -> None:
    config = DataExportConfig(input="x", output="y", source="imagined", states="joint14")
    setattr(config.planner, name, value)
    with pytest.raises(UserError, match=rf"planner\.{name}: got .*plans nothing"):
        config.check()


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


# -------------------------------------------------------------------------------------------------------- imagined episodes


class Drift:
    """A world model whose pictures get brighter by the frame, from the seed and the joints at its lags."""

    def __init__(self) -> None:
        self.requests: list[RolloutRequest] = []
        self.spec = WorldModelSpec(
            name="drift",
            views=ViewLayout(),
            context_frames=1,
            horizons=(5,),
            frame_dt=2 * DT,
            conditions=frozenset({"text", "proprioception"}),
            returns=frozenset({"frames"}),
            proprioception_lags=(0, 4),
            fingerprint="drift-1",
        )

    def rollout(self, request: RolloutRequest) -> Rollout:
        self.requests.append(request)
        first = request.context_BVTHWC[0, :, -1].astype(np.int64)
        frames = np.stack([np.clip(first + 3 * k, 0, 255) for k in range(request.horizon)], axis=1).astype(np.uint8)
        return Rollout(
            times_T=np.arange(request.horizon) * self.spec.frame_dt,
            frames_BSVTHWC=frames[None, None],
            cost={"seconds": 1.0},
        )


class Ramp:
    """A decoder that adds 0.1 to every joint a step."""

    fingerprint = "ramp-1"
    needs = DecoderNeeds(horizons=(5,), frame_dt=2 * DT)

    def decode(self, rollout: Rollout, state_BA: np.ndarray, instructions: Sequence[str]) -> list[list[ActionChunk]]:
        rows = 0.1 * np.arange(1, 9)[:, None] + state_BA[0]
        return [[ActionChunk(actions_PA=rows.astype(np.float32))]]


def test_rollouts_are_chained() -> None:
    model, history = Drift(), joints_of(3, 4)
    made = EpisodeImaginer(model, Ramp()).imagine(picture(0), history, "lift", seed=7, min_rows=17)
    assert made.rollouts == 3
    assert made.steps_T.tolist() == list(range(0, 25, 2)) and len(made.frames_THWC) == 13
    np.testing.assert_allclose(made.joints_NA, history[-1] + 0.1 * np.arange(25)[:, None], atol=1e-5)
    np.testing.assert_array_equal(made.joints_at_frames(), made.joints_NA[::2])
    assert int(made.frames_THWC[4, 0, 0, 0]) == int(picture(0)[0, 0, 0]) + 12, "no picture twice where rollouts meet"
    second = model.requests[1]
    np.testing.assert_array_equal(second.context_BVTHWC[0, 0, 0], made.frames_THWC[4])
    np.testing.assert_allclose(second.proprioception_BKA[0], made.joints_NA[[8, 4]], atol=1e-6)
    np.testing.assert_array_equal(model.requests[0].proprioception_BKA[0], history[[3, 0]])
    assert [int(r.seeds_BS[0, 0]) for r in model.requests] == [noise_seed(7, 0, 0, k) for k in range(3)]


@pytest.fixture
def imagining(monkeypatch: pytest.MonkeyPatch) -> Drift:
    """The export's models replaced by the two above."""
    import physisforcing.planner.inverse_dynamics as decoders
    import physisforcing.world_models as models

    model = Drift()
    monkeypatch.setattr(models, "load_any", lambda *_, **__: model)
    monkeypatch.setattr(decoders, "load_inverse_dynamics", lambda *_: Ramp())
    return model


def test_imagined_episodes_say_what_they_are(demonstrations: Path, tmp_path: Path, imagining: Drift) -> None:
    settings = {"source": "imagined", "states": "joint14", "min_rows": 16, "episodes": 1, "tasks": ["click_bell"]}
    config = DataExportConfig(input=str(demonstrations), output=str(tmp_path / "wa"), **settings)  # type: ignore[arg-type]
    config.prompt_template = "Rigid arm: {instruction}"
    about = export(config, progress=False)
    told = about["episodes"][0]
    assert told["generated"] and "drift-1" in told["label"] and "ramp-1" in told["label"] and told["success"] is None
    assert imagining.requests[0].instructions == ["Rigid arm: do click_bell 0"]
    folder = demo_folder(tmp_path / "wa", "click_bell")
    for comment in (
        probe_mp4(folder / "video/episode0.mp4").metadata["comment"],
        read_png(folder / "first_frames/episode0.png")[1],
    ):
        assert comment == told["label"] and comment.startswith("pictures and actions generated by drift")
    back = WorldArenaDataset(tmp_path / "wa")
    assert back.episodes[0].row["generated"] and back.fps == pytest.approx(1 / (2 * DT))
    np.testing.assert_allclose(
        back.columns(0)["observation.state"], joints_of(0, 6)[0] + 0.2 * np.arange(9)[:, None], atol=1e-5
    )
    np.testing.assert_array_equal(back.states(0), back.columns(0)["observation.state"])
    (tmp_path / "wa" / SIDECAR).unlink()
    prepare(tmp_path / "v3", tmp_path / "wa")
    video = LeRobotDataset(tmp_path / "v3").video_path(0)
    assert probe_mp4(video).metadata["comment"] == told["label"], "also after a conversion, and without our file"


def test_noise_of_an_export_belongs_to_the_scene(demonstrations: Path, tmp_path: Path, imagining: Drift) -> None:
    settings = {"source": "imagined", "states": "joint14", "min_rows": 1, "tasks": ["adjust_bottle"]}
    base = {"input": str(demonstrations), **settings}
    export(DataExportConfig(**base, output=str(tmp_path / "a"), episodes=2), progress=False)  # type: ignore[arg-type]
    both = [int(r.seeds_BS[0, 0]) for r in imagining.requests]
    export(DataExportConfig(**base, output=str(tmp_path / "b"), episodes=3, seed=1), progress=False)  # type: ignore[arg-type]
    other = [int(r.seeds_BS[0, 0]) for r in imagining.requests[2:]]
    export(DataExportConfig(**base, output=str(tmp_path / "c"), episodes=3), progress=False)  # type: ignore[arg-type]
    again = [int(r.seeds_BS[0, 0]) for r in imagining.requests[5:]]
    assert again[:2] == both and len({*both, *other}) == 5


# ------------------------------------------------------------------------------------------------------ pictures and actions


def pair(number: int, start: int, rows: int, task: str = "adjust_bottle", label: str = RECORDED) -> Pair:
    joints = joints_of(100 * number + start, rows + 1)
    return Pair(
        task=task,
        number=number,
        start=start,
        picture_HW3=picture(number + start),
        instruction=f"do {number}",
        state_A=joints[0],
        actions_PA=joints[:rows],
        label=label,
    )


def same(one: Pair, two: Pair) -> None:
    for name in ("task", "number", "start", "instruction", "label"):
        assert getattr(one, name) == getattr(two, name), name
    np.testing.assert_array_equal(one.actions_PA, two.actions_PA)
    np.testing.assert_array_equal(one.state_A, two.state_A)
    np.testing.assert_array_equal(one.picture_HW3[::2, ::2], two.picture_HW3)


@pytest.mark.parametrize("numbering", ["number", "list_index"])
def test_chunks_come_back(tmp_path: Path, numbering: str) -> None:
    order = {"adjust_bottle": [0, 10, 2]}
    writer = PairWriter(tmp_path / "engine", "worldarena_chunks", numbering=numbering, episodes=order)
    written = [pair(0, 0, 45), pair(2, 0, 45), pair(2, 7, 45), pair(10, 0, 45, label="actions generated by x")]
    for one in written:
        writer.add(one)
    assert [row["generated"] for row in writer.finalize()["pairs"]] == [False, False, False, True]
    names = sorted(path.name for path in (tmp_path / "engine").rglob("*.json") if "chunk" in path.name)
    place = 10 if numbering == "number" else 1
    assert f"episode{place}_chunk000000.json" in names and len(names) == 4
    for one, two in zip(read_chunks(tmp_path / "engine"), written, strict=True):
        same(one, two)


def test_names_of_a_foreign_folder_are_list_indices(tmp_path: Path) -> None:
    """Without our file the names mean nothing until the list they were made from is given."""
    numbers = [number for number in range(30) if number != 3]
    listed = sorted((n for n in numbers if n < 25), key=lambda n: f"episode{n}.mp4")
    writer = PairWriter(
        tmp_path / "engine", "worldarena_chunks", numbering="list_index", episodes={"adjust_bottle": listed}
    )
    for number in (0, 4, 12):
        writer.add(pair(number, 5, 45))
    writer.finalize()
    (tmp_path / "engine" / SIDECAR).unlink()
    with pytest.raises(UserError, match="metadata="):
        read_chunks(tmp_path / "engine")
    metadata = [
        {"video_path": f"/data/adjust_bottle/{CONFIG}/{CONFIG}/video/episode{n}.mp4", "n_frames": 60}
        for n in sorted(numbers, key=lambda n: f"episode{n}.mp4")
    ]
    assert [one.number for one in read_chunks(tmp_path / "engine", metadata)] == [0, 4, 12]
    with pytest.raises(UserError, match="index of the list"):
        read_chunks(tmp_path / "engine", metadata[:2])


def test_track2_comes_back(tmp_path: Path) -> None:
    writer = PairWriter(tmp_path / "engine", "worldarena_track2", name="my_model")
    written = [pair(0, 0, 40), pair(0, 3, 40), pair(1, 0, 40, task="click_bell", label="actions generated by x")]
    for one in written:
        writer.add(one)
    writer.finalize({"Release Year": "2026"})
    folder = tmp_path / "engine/my_model_eval_track2_data_engine"
    label = json.loads((folder / "adjust_bottle/episode_0/label/frame_3.json").read_text())
    assert set(label) >= {"image_path", "actions", "state", "instruction"} and len(label["actions"]) == 40
    assert (folder / "adjust_bottle/episode_0" / label["image_path"]).is_file()
    assert (
        "`my_model`" in (folder / "model_README.md").read_text()
        and "`2026`" in (folder / "model_README.md").read_text()
    )
    for one, two in zip(read_track2(folder), written, strict=True):
        same(one, two)
    label["image_path"] = "../../../../secret.png"
    (folder / "adjust_bottle/episode_0/label/frame_3.json").write_text(json.dumps(label))
    assert len(read_track2(folder)) == 3, "pictures are found by their place, not by what a file names"


def test_wrong_pairs_are_refused(tmp_path: Path) -> None:
    writer = PairWriter(tmp_path / "engine", "worldarena_chunks")
    with pytest.raises(UserError, match=r"\[44, 14\].*rows=44"):
        writer.add(pair(0, 0, 44))
    with pytest.raises(UserError, match="name"):
        PairWriter(tmp_path / "x", "worldarena_track2", name="../up")
    writer.add(pair(0, 0, 45))
    writer.finalize()
    path = next((tmp_path / "engine").rglob("*chunk*.json"))
    for bad in ('{"instruction": "a"}', '{"instruction": "a", "actions": [[1, 2]], "states": [1]}', "[", "3"):
        path.write_text(bad)
        with pytest.raises(UserError, match=path.name):
            read_chunks(tmp_path / "engine")


def test_which_row_is_first(demonstrations: Path, tmp_path: Path) -> None:
    joints = joints_of(0, 6)
    np.testing.assert_array_equal(rows_from("worldarena_chunks", joints, 1, 3), joints[1:4])
    np.testing.assert_array_equal(rows_from("worldarena_track2", joints, 1, 6), joints[[2, 3, 4, 5, 5, 5]])
    for layout, read in (("worldarena_chunks", read_chunks), ("worldarena_track2", read_track2)):
        config = DataExportConfig(input=str(demonstrations), output=str(tmp_path / layout), layout=layout)
        config.tasks, config.rows, config.stride = ["click_bell"], 4, 2
        about = export(config, progress=False)
        found = read(tmp_path / layout / "model_eval_track2_data_engine" if "track2" in layout else tmp_path / layout)
        assert [one.start for one in found] == [0, 2] and about["rows"] == 4
        assert about["first_row"] == ("pose" if "chunks" in layout else "next")
        for one in found:
            np.testing.assert_array_equal(one.state_A, joints[one.start])
            np.testing.assert_array_equal(one.actions_PA, rows_from(layout, joints, one.start, 4))


def test_planned_actions_for_real_pictures(demonstrations: Path, tmp_path: Path, imagining: Drift) -> None:
    """What the released data engine does: real pictures, planned actions."""
    config = DataExportConfig(
        input=str(demonstrations), output=str(tmp_path / "engine"), layout="worldarena_chunks", source="imagined"
    )
    config.tasks, config.rows, config.stride = ["click_bell"], 5, 1
    export(config, progress=False)
    found = read_chunks(tmp_path / "engine")
    assert [one.start for one in found] == [0, 1]
    source = LeRobotDataset(demonstrations)
    index = next(e.index for e in source.episodes if e.task_name == "click_bell")
    for one in found:
        assert "picture recorded in a simulator, actions generated by drift drift-1" in one.label
        np.testing.assert_array_equal(one.picture_HW3[::2, ::2], source.frames(index, [one.start])[0])
        start = joints_of(0, 6)[one.start]
        np.testing.assert_allclose(one.actions_PA, start + 0.1 * np.arange(5)[:, None], atol=1e-5)
    np.testing.assert_array_equal(imagining.requests[1].proprioception_BKA[0], joints_of(0, 6)[[1, 0]])


def test_the_command(demonstrations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0 and "worldarena_track2" in capsys.readouterr().out
    words = [f"input={demonstrations}", f"output={tmp_path / 'wa'}", "task=click_bell"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"][0]["task"] == "click_bell"
    with pytest.raises(UserError, match="did you mean 'layout'"):
        main([*words, "layuot=worldarena"])
