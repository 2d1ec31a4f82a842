"""Archives: the way there and back, what is exact and what is rounded, damage that is named."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from physisforcing.core import archive
from physisforcing.core.archive import main, pack, unpack
from physisforcing.core.archive_numbers import compress, decompress
from physisforcing.core.archive_poses import FREE, RIGID, SLIDING, STATIC, TURNING, decode_poses, encode_poses
from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.ground_truth import GroundTruth, encode_maps, load, save
from physisforcing.core.lerobot import GROUND_TRUTH_PATH, HEAD, LeRobotDataset, LeRobotWriter, robot_features

FRAMES = 40


def turned(axis: list[float], angle: np.ndarray) -> np.ndarray:
    """Quaternions [T,4] of turns about an axis."""
    unit = np.array(axis) / np.linalg.norm(axis)
    return np.concatenate([np.cos(angle / 2)[:, None], np.sin(angle / 2)[:, None] * unit], axis=1)


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    w = a[:, :1] * b[:, :1] - (a[:, 1:] * b[:, 1:]).sum(1, keepdims=True)
    return np.concatenate([w, a[:, :1] * b[:, 1:] + b[:, :1] * a[:, 1:] + np.cross(a[:, 1:], b[:, 1:])], axis=1)


def rotated(q: np.ndarray, v: np.ndarray) -> np.ndarray:
    u = 2 * np.cross(q[:, 1:], v)
    return v + q[:, :1] * u + np.cross(q[:, 1:], u)


def chain(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Poses [T,6,7] of a base, two turning links, a camera on the second, a sliding finger and a free object; joints [T,3]."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, FRAMES)
    joints = np.stack([0.8 * np.sin(3 * t), -0.5 * t**2, 0.04 * t], axis=1) + rng.normal(size=3) * 0.1
    poses = np.zeros((FRAMES, 6, 7))
    poses[:, 0] = [0.1, -0.6, 0.7, *(np.array([0.9, 0.1, 0.3, -0.3]) / np.linalg.norm([0.9, 0.1, 0.3, -0.3]))]

    def attach(parent: int, child: int, offset, turn, joint=None) -> None:
        place = np.tile(np.array(offset, float), (FRAMES, 1)) + (0 if joint is None else joint)
        poses[:, child, :3] = poses[:, parent, :3] + rotated(poses[:, parent, 3:], place)
        poses[:, child, 3:] = product(poses[:, parent, 3:], turn)

    attach(0, 1, [0, 0, 0.3], turned([0, 0, 1], joints[:, 0]))
    attach(1, 2, [0.2, 0, 0], turned([0.1, 1, 0], -joints[:, 1] + 0.4))
    attach(2, 3, [0.05, 0.01, 0], turned([1, 0, 0], np.full(FRAMES, 0.7)))
    attach(3, 4, [0.1, 0, 0], turned([1, 0, 0], np.zeros(FRAMES)), joints[:, 2:] * np.array([0, 1.0, 0]))
    poses[:, 5, :3] = np.cumsum(rng.normal(size=(FRAMES, 3)) * 0.01, axis=0)
    poses[:, 5, 3:] = turned([1, 2, 3], 4 * t + rng.normal())
    flip = np.where(np.arange(FRAMES) % 7 == 3, -1, 1)[:, None]
    poses[:, 5, 3:] *= flip
    return poses.astype(np.float32), joints


def test_links_become_joint_coordinates() -> None:
    poses, joints = chain(0)
    measured = np.rint(joints / 2e-5) * 2e-5
    coded = encode_poses(poses, measured)
    assert coded.plan_K4[:, 0].tolist() == [STATIC, TURNING, TURNING, RIGID, SLIDING, FREE]
    assert coded.plan_K4[1:5, 1].tolist() == [0, 1, 2, 3] and coded.plan_K4[1:3, 2].tolist() == [0, 1]
    assert coded.series_TS.shape == (FRAMES, 1 + 1 + 1 + 7)
    assert np.abs(coded.series_TS[:, :2]).max() <= 5, "the measured joints say it"
    back = decode_poses(coded, measured)
    sign = np.sign((back[..., 3:] * poses[..., 3:]).sum(-1, keepdims=True))
    assert np.abs(back[..., :3] - poses[..., :3]).max() < 2e-4
    assert np.abs(back[..., 3:] - sign * poses[..., 3:]).max() < 2e-4
    strange = encode_poses(poses, np.zeros((FRAMES, 3)))
    assert strange.plan_K4[1:3, 2].tolist() == [-1, -1], "other joints say nothing, and the links are kept all the same"
    assert np.abs(decode_poses(strange, np.zeros((FRAMES, 3)))[..., :3] - poses[..., :3]).max() < 2e-4


def test_numbers_come_back_exactly() -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-(2**31), 2**31, (n, m)) for n, m in ((1, 1), (5, 3), (0, 4), (7, 0), (2, 2))]
    arrays += [np.cumsum(rng.integers(-3, 4, (200, 14)), axis=0)]
    data, shapes = compress(arrays)
    for got, wanted in zip(decompress(data, shapes, "x"), arrays, strict=True):
        np.testing.assert_array_equal(got, wanted)
    for broken in (data[:-20], b"", data[:10] + bytes([data[10] ^ 255]) + data[11:]):
        with pytest.raises(DatasetError, match="Fix"):
            decompress(broken, shapes, "x")
    with pytest.raises(DatasetError, match="at most"):
        decompress(data, [[1 << 40, 1]], "x")


def truth_of(seed: int) -> tuple[GroundTruth, np.ndarray]:
    poses, joints = chain(seed)
    depth, offsets = encode_maps([np.full((48, 64), 700, np.uint16)])
    rng = np.random.default_rng(seed)
    contacts = np.sort(rng.integers(0, FRAMES, 12)).astype(np.int32)
    truth = GroundTruth(
        body_ids_K=np.arange(3, 9, dtype=np.uint16),
        body_poses_TK7=poses,
        body_names={3: "base", 8: "001_bottle"},
        view_names=("head",),
        size=(48, 64),
        intrinsics_V33=np.array([[[60.0, 0, 31.5], [0, 60, 23.5], [0, 0, 1]]]),
        world_to_camera_TV44=np.tile(np.eye(4) + 0.25, (FRAMES, 1, 1, 1)),
        contact_frame_M=contacts,
        contact_pair_M2=rng.integers(3, 9, (12, 2)).astype(np.uint16),
        contact_impulse_M=rng.uniform(1e-5, 3, 12).astype(np.float32),
        stored_frames_D=np.zeros(1, np.int32),
        depth_png=depth,
        depth_offsets=offsets,
        ids_png=depth,
        ids_offsets=offsets,
        extra={"renderer": "test", "seed": str(seed)},
    )
    return truth, joints


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for name, seeds in (("train", range(3)), ("noise", range(2))):
        root = tmp_path_factory.mktemp("data") / name
        joints = ["left_joint_1", "left_joint_2", "left_gripper"]
        writer = LeRobotWriter(root, robot_features(joints, height=48, width=64), robot_type="arm", crf=26)
        for seed in seeds:
            truth, measured = truth_of(seed)
            state = (measured + 0.01).astype(np.float32)
            success = np.arange(FRAMES) >= 30
            columns = {"observation.state": state, "observation.state_measured": measured.astype(np.float32)}
            columns |= {"action": np.concatenate([state[1:], state[-1:]]), "next.success": success}
            ramp = np.arange(FRAMES)[:, None, None, None] + np.arange(64)[None, None, :, None]
            writer.add_episode(
                columns=columns,
                frames={HEAD: np.broadcast_to(60 + ramp + seed, (FRAMES, 48, 64, 3)).astype(np.uint8)},
                instruction=f"do {seed % 2}",
                task_name="bell",
                seed=seed,
                success=True,
                scene_hash="ab" * 32,
                policy=name,
                key=f"bell-{seed:08d}-{name}",
                assets_version="pack 1",
                runtime="runtime 1",
                attachments={GROUND_TRUTH_PATH: lambda path, truth=truth: save(path, truth)},
            )
        made[name] = writer.finalize()
    return made


@pytest.fixture(scope="module")
def there_and_back(datasets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    packed = pack(folder / "a.zip", datasets)
    return packed, unpack(folder / "a.zip", folder / "out"), folder


def test_pictures_and_what_is_known_of_an_episode_are_exact(datasets, there_and_back) -> None:
    packed, unpacked, folder = there_and_back
    assert packed["content_sha256"] == unpacked["content_sha256"] and packed["parts"] == {"noise": 2, "train": 3}
    for name, root in datasets.items():
        before, after = LeRobotDataset(root), LeRobotDataset(folder / "out" / name)
        assert after.verify()["frames"] == before.num_frames and after.features == before.features
        assert after.info["robot_type"] == "arm" and after.tasks == before.tasks
        assert unpacked["parts"][name]["fingerprint"] == after.fingerprint()
        for one, other in zip(before.episodes, after.episodes, strict=True):
            for field in ("key", "seed", "success", "scene_hash", "policy", "instruction", "length", "runtime"):
                assert getattr(one, field) == getattr(other, field), field
            np.testing.assert_array_equal(before.frames(one.index), after.frames(one.index))
            assert before.video_path(one.index).stat().st_size > after.video_path(one.index).stat().st_size


def test_numbers_are_rounded_to_their_steps(datasets, there_and_back) -> None:
    _, _, folder = there_and_back
    before, after = LeRobotDataset(datasets["train"]), LeRobotDataset(folder / "out" / "train")
    for index in range(3):
        one, other = before.columns(index), after.columns(index)
        assert set(one) == set(other)
        np.testing.assert_allclose(other["observation.state"], one["observation.state"], atol=5.1e-6)
        np.testing.assert_allclose(other["observation.state_measured"], one["observation.state_measured"], atol=1.1e-5)
        np.testing.assert_array_equal(other["action"][:-1], other["observation.state"][1:])
        np.testing.assert_array_equal(other["next.success"], one["next.success"])
        known, got = load(before.ground_truth_path(index)), load(after.ground_truth_path(index))
        assert np.abs(got.body_poses_TK7[..., :3] - known.body_poses_TK7[..., :3]).max() < 4e-4
        np.testing.assert_array_equal(got.contact_frame_M, known.contact_frame_M)
        np.testing.assert_array_equal(got.contact_pair_M2, known.contact_pair_M2)
        np.testing.assert_allclose(got.contact_impulse_M, known.contact_impulse_M, rtol=0.026)
        np.testing.assert_allclose(got.world_to_camera_TV44, known.world_to_camera_TV44, atol=1e-9)
        np.testing.assert_array_equal(got.intrinsics_V33, known.intrinsics_V33)
        assert got.extra == known.extra and got.body_names == known.body_names and got.size == known.size
        assert len(got.stored_frames_D) == 0 and not got.has_maps(0)


def test_packing_is_repeatable_and_small(datasets, there_and_back, tmp_path) -> None:
    packed, _, folder = there_and_back
    again = pack(tmp_path / "b.zip", dict(reversed(datasets.items())))
    assert (tmp_path / "b.zip").read_bytes() == (folder / "a.zip").read_bytes()
    assert again["content_sha256"] == packed["content_sha256"]
    size = sum(path.stat().st_size for root in datasets.values() for path in root.rglob("*") if path.is_file())
    assert packed["bytes"] < size / 4
    # What was rounded once stays: states and pictures of a second round equal those of the first.
    pack(tmp_path / "c.zip", {"train": folder / "out" / "train"})
    unpack(tmp_path / "c.zip", tmp_path / "twice")
    one, two = LeRobotDataset(folder / "out" / "train"), LeRobotDataset(tmp_path / "twice" / "train")
    for index in range(3):
        np.testing.assert_array_equal(one.frames(index), two.frames(index))
        for name, values in one.columns(index).items():
            np.testing.assert_array_equal(values, two.columns(index)[name], err_msg=name)


def test_processes_that_encode_change_nothing_and_name_what_is_missing(datasets, there_and_back, tmp_path) -> None:
    packed, _, folder = there_and_back
    again = pack(tmp_path / "b.zip", datasets, workers=2)
    assert (tmp_path / "b.zip").read_bytes() == (folder / "a.zip").read_bytes()
    assert again == packed | {"archive": str(tmp_path / "b.zip")}
    broken = Path(shutil.copytree(datasets["train"], tmp_path / "broken"))
    LeRobotDataset(broken).video_path(1).write_bytes(b"no video")
    with pytest.raises(DatasetError, match="video"):
        pack(tmp_path / "c.zip", {"broken": broken}, workers=2)
    assert not (tmp_path / "c.zip").exists() and not list(tmp_path.glob("*.partial"))


def test_a_process_that_ends_by_itself_is_named(datasets, tmp_path, monkeypatch) -> None:
    def killed(*_: object, **__: object):
        """What a pool does when the system kills one of its processes."""
        raise archive.BrokenProcessPool("A process in the process pool was terminated abruptly")

    monkeypatch.setattr(archive.ProcessPoolExecutor, "map", killed)
    with pytest.raises(UserError, match="memory"):
        pack(tmp_path / "d.zip", datasets, workers=2)
    assert not list(tmp_path.iterdir())


def rewrite(source: Path, target: Path, change) -> Path:
    with zipfile.ZipFile(source) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    about = json.loads(entries["archive.json"])
    change(about, entries)
    if "archive.json" in entries:
        entries["archive.json"] = json.dumps(about).encode()
    with zipfile.ZipFile(target, "w") as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return target


@pytest.mark.parametrize(
    "change",
    [
        lambda about, entries: about.update(schema="other/1"),
        lambda about, entries: about.pop("parts"),
        lambda about, entries: entries.pop("archive.json"),
        lambda about, entries: entries.pop(f"train/{HEAD}.h264"),
        lambda about, entries: entries.pop("train/00.bin"),
        lambda about, entries: about["parts"].update({"../evil": about["parts"]["train"]}),
        lambda about, entries: about["parts"]["train"]["episodes"][0].update(key="../../evil"),
        lambda about, entries: about["parts"]["train"]["streams"].pop("packets/" + HEAD),
        lambda about, entries: about["parts"]["train"]["episodes"].pop(),
    ],
)
def test_damaged_archives_are_refused(there_and_back, tmp_path, change) -> None:
    _, _, folder = there_and_back
    broken = rewrite(folder / "a.zip", tmp_path / "broken.zip", change)
    with pytest.raises(DatasetError, match="Fix"):
        unpack(broken, tmp_path / "out")
    left = [path.name for path in (tmp_path / "out").glob("*")] if (tmp_path / "out").exists() else []
    assert "train" not in left and not any(name.startswith(".") for name in left)
    assert not (tmp_path.parent / "evil").exists()


def test_flipped_bits_and_foreign_files_are_refused(there_and_back, tmp_path) -> None:
    _, _, folder = there_and_back
    data = bytearray((folder / "a.zip").read_bytes())
    data[len(data) // 3] ^= 4
    for number, content in enumerate((bytes(data), bytes(data[:2000]), b"text")):
        (tmp_path / f"{number}.zip").write_bytes(content)
        with pytest.raises(DatasetError, match="archive"):
            unpack(tmp_path / f"{number}.zip", tmp_path / "out")
    with pytest.raises(DatasetError, match="no such file"):
        unpack(tmp_path / "none.zip", tmp_path / "out")


def test_commands(datasets, tmp_path, capsys) -> None:
    target = tmp_path / "x.zip"
    assert main(["pack", str(target), *map(str, datasets.values()), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)["content_sha256"]
    assert main(["unpack", str(target), str(tmp_path / "out")]) == 0
    assert content in capsys.readouterr().out
    with pytest.raises(UserError, match="output"):
        unpack(target, tmp_path / "out")
    with pytest.raises(UserError, match="different names"):
        main(["pack", str(target), str(datasets["train"]), str(datasets["train"])])
