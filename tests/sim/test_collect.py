"""Collecting from the real simulator: time base, ground truth, replay, determinism, resuming."""

import dataclasses
import json
import subprocess
import sys

import gymnasium
import numpy as np
import pytest

from physisforcing.core.archive import pack, unpack
from physisforcing.core.errors import UserError
from physisforcing.core.ground_truth import load as load_ground_truth
from physisforcing.core.lerobot import HEAD, LeRobotDataset
from physisforcing.core.merge import merge
from physisforcing.core.pictures import shrink_area
from physisforcing.envs.baselines import Replay
from physisforcing.envs.collect import CollectConfig, collect, collect_together
from physisforcing.envs.collector import Collector
from physisforcing.envs.recording import EpisodeRecorder, record_expert, record_noisy_expert
from physisforcing.envs.rollout import run_episode
from physisforcing.envs.seeds import Job

pytestmark = pytest.mark.sim
TASK, SEEDS = "click_bell", (0, 1)


class CountingRecorder(EpisodeRecorder):
    """Notes the physics steps that the scene had made at each frame."""

    def frame(self, env, observation=None):
        self.physics = [*getattr(self, "physics", []), env._task.clock.steps]
        super().frame(env, observation)


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """Two episodes recorded in this process."""
    root = tmp_path_factory.mktemp("collect") / "bell"
    config = CollectConfig(output=str(root), tasks=[TASK], episodes=2, workers=0)
    return root, config, collect(config, progress=False)


@pytest.fixture
def env():
    import physisforcing.envs.robotwin  # noqa: F401

    env = gymnasium.make(f"RoboTwin/{TASK}-v0", disable_env_checker=True)
    yield env
    env.close()


@pytest.mark.parametrize("level", ["full", "sparse"])
def test_pictures_drawn_while_physics_goes_on_are_the_same(env, level):
    """Fetched a frame later against at once: pictures, joints, depth, body ids and poses, bit for bit."""
    plain, late = EpisodeRecorder(ground_truth=level), EpisodeRecorder(ground_truth=level)
    env.reset(seed=1, options={"observe": False})
    env.unwrapped.play_expert(lambda _: plain.frame(env.unwrapped, env.unwrapped.observe()))
    env.reset(seed=1, options={"observe": False})
    env.unwrapped.play_expert(lambda _: late.frame(env.unwrapped))
    assert len(late.images["head"]) == len(late) - 1, "the last picture is still being drawn"
    late.finish()
    assert len(plain) == len(late) > 20
    np.testing.assert_array_equal(np.stack(plain.images["head"]), np.stack(late.images["head"]))
    for name, column in plain.columns().items():
        np.testing.assert_array_equal(column, late.columns()[name], err_msg=name)
    one, two = plain.ground_truth(), late.ground_truth()
    for name in ("body_poses_TK7", "world_to_camera_TV44", "stored_frames_D", "depth_png", "ids_png"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)


def test_frames_stand_at_multiples_of_15_physics_steps(env):
    recorder = CountingRecorder()
    record_expert(env.unwrapped, 0, recorder, hold_frames=4)
    assert recorder.physics == [15 * t for t in range(len(recorder))]
    expert = recorder.columns()
    np.testing.assert_array_equal(expert["action"][:-1], expert["observation.state"][1:])
    np.testing.assert_array_equal(expert["action"][-1], expert["observation.state"][-1])
    assert np.abs(np.diff(expert["observation.state"][-5:], axis=0)).max() == 0, "the end is held"
    moved = np.abs(expert["observation.state"] - expert["observation.state_measured"]).max()
    assert 0 < moved < 0.5, "targets and measured joints are two things"

    noisy = CountingRecorder()
    record_noisy_expert(env.unwrapped, 0, noisy, hold_frames=4)
    assert noisy.physics == [15 * t for t in range(len(noisy))] and len(noisy) == len(recorder)
    offset = np.abs(noisy.columns()["observation.state"] - expert["observation.state"]).max(axis=1)
    assert offset[0] == 0 and 0.02 < offset[: len(offset) // 2].max() < 0.5
    assert offset[int(0.6 * len(offset)) :].max() < 1e-5, "the noise fades out and the expert's path is found again"


def test_summary_and_dataset(collected):
    root, _, summary = collected
    row = summary["tasks"][TASK]
    assert row["recorded"] == 2 and summary["episodes"] == 2
    data = LeRobotDataset(root)
    assert data.verify()["episodes"] == 2 and [e.seed for e in data.episodes] == list(SEEDS)
    assert sum(bool(e.success) for e in data.episodes) == row["successes"] >= 1
    for episode in data.episodes:
        assert episode.task_name == TASK and episode.policy == "expert" and len(episode.scene_hash) == 64
        assert episode.instruction and episode.assets_version and episode.embodiment
        success = data.columns(episode.index)["next.success"]
        assert bool(success[-1]) == episode.success and not success[0] and (np.diff(success.astype(int)) >= 0).all()
    assert summary["video_kb_per_episode"] < 100
    assert json.loads((root / "collect.json").read_text())["fingerprint"] == data.fingerprint()


def test_recorded_actions_repeat_the_episode(collected, env):
    root, _, _ = collected
    data = LeRobotDataset(root)
    episode = next(e for e in data.episodes if e.success)
    result = run_episode(env, Replay(data.columns(episode.index)["action"]), seed=episode.seed, record=True)
    assert result.status == "success" and result.scene_hash == episode.scene_hash
    recorded = data.frames(episode.index, range(result.steps + 1))
    error = np.abs(result.frames.astype(int) - recorded)
    assert error.mean() < 1.5, "what a planner sees at test time is what the dataset shows"
    first = data.columns(episode.index)["next.success"].argmax() + 1
    assert abs(result.steps - first) <= 1, "success comes at the recorded frame"


def test_ground_truth_is_that_of_the_simulator(collected, env):
    root, _, _ = collected
    data = LeRobotDataset(root)
    truth = load_ground_truth(data.ground_truth_path(0))
    length = data.episodes[0].length
    assert truth.body_poses_TK7.shape == (length, len(truth.body_ids_K), 7)
    assert truth.stored_frames_D.tolist() == list(range(0, length, 8))
    assert truth.view_names == ("head",) and truth.world_to_camera_TV44.shape == (length, 1, 4, 4)
    np.testing.assert_allclose(np.linalg.norm(truth.body_poses_TK7[..., 3:], axis=-1), 1, atol=1e-4)
    world = env.unwrapped
    world.reset(seed=SEEDS[0])
    depth, ids = world.depth_and_ids()
    np.testing.assert_array_equal(truth.depth(0), depth)
    np.testing.assert_array_equal(truth.body_id_map(0), ids)
    np.testing.assert_array_equal(truth.body_poses_TK7[0], world.body_poses()[1])
    actions = data.columns(0)["action"]
    for target in actions[:8]:
        world.step(target)
    depth, _ = world.depth_and_ids()
    assert np.mean(np.abs(truth.depth(8).astype(int) - depth) > 2) < 0.02, (
        "frame 8 shows what replaying 8 actions shows"
    )
    np.testing.assert_allclose(truth.body_poses_TK7[8][:, :3], world.body_poses()[1][:, :3], atol=2e-3)
    bell = {i for i, name in truth.body_names.items() if "bell" in name}
    touched = {int(b) for pair in truth.contact_pair_M2 for b in pair}
    assert bell & touched and (truth.contact_impulse_M > 0).all()


def test_resume_adds_and_never_repeats(collected):
    root, config, _ = collected
    data = LeRobotDataset(root)
    before = [data.content_hash(i) for i in range(2)]
    files = {p: p.stat().st_mtime_ns for p in root.glob("videos/**/*.mp4")}
    again = collect(config, progress=False)
    assert again["episodes"] == 2 and again["seconds"] < 5, "nothing is left to do"
    config.policy, config.max_steps, config.episodes = "random", 6, 1
    more = collect(config, progress=False)
    data = LeRobotDataset(root)
    assert more["tasks"][TASK]["recorded"] == 1 and len(data) == 3
    assert [data.content_hash(i) for i in range(2)] == before
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
    last = data.episodes[2]
    assert (last.policy, last.success, last.length) == ("random", False, 7)


def test_merged_shards_equal_the_collection_made_in_one_piece(collected, tmp_path):
    """``collected`` holds more by now where another test added to it: its first two episodes are compared."""
    root, _, _ = collected
    parts = []
    for part in range(2):
        parts.append(tmp_path / f"part{part}")
        config = CollectConfig(output=str(parts[-1]), tasks=[TASK], episodes=2, shard=f"{part}/2", workers=0)
        row = collect(config, progress=False)["tasks"][TASK]
        assert (row["recorded"], row["wanted"]) == (1, 1) and row["cpu_s_per_episode"] > 0
    merge(tmp_path / "all", parts[::-1])
    whole, merged = LeRobotDataset(root), LeRobotDataset(tmp_path / "all")
    assert [e.seed for e in merged.episodes] == list(SEEDS)
    assert [merged.content_hash(i) for i in range(2)] == [whole.content_hash(i) for i in range(2)]
    assert merged.episodes[0].runtime and merged.episodes[0].runtime == whole.episodes[0].runtime


def test_lean_collection_and_its_archive(collected, tmp_path):
    """Small pictures, poses without maps, successes only; the archive gives the same pictures back."""
    root, _, _ = collected
    lean = {"pictures": "120x160", "crf": 26, "ground_truth": "poses", "keep": "success"}
    config = CollectConfig(output=str(tmp_path / "lean"), tasks=[TASK], episodes=1, workers=0, **lean)
    collect(config, progress=False)
    whole, data = LeRobotDataset(root), LeRobotDataset(tmp_path / "lean")
    small = shrink_area(whole.frames(0), 2)
    assert data.frames(0).shape == small.shape and np.abs(data.frames(0).astype(int) - small).mean() < 3
    truth, full = (load_ground_truth(d.ground_truth_path(0)) for d in (data, whole))
    np.testing.assert_array_equal(truth.body_poses_TK7, full.body_poses_TK7)
    np.testing.assert_array_equal(truth.contact_pair_M2, full.contact_pair_M2)
    assert truth.size == (240, 320) and len(truth.stored_frames_D) == 0
    with pytest.raises(UserError, match="ground_truth=sparse"):
        truth.depth(0)
    report = pack(tmp_path / "lean.zip", {"lean": tmp_path / "lean"})
    unpack(tmp_path / "lean.zip", tmp_path / "out")
    back = LeRobotDataset(tmp_path / "out" / "lean")
    np.testing.assert_array_equal(back.frames(0), data.frames(0))
    assert np.abs(back.columns(0)["action"] - data.columns(0)["action"]).max() < 1e-5
    moved = load_ground_truth(back.ground_truth_path(0)).body_poses_TK7[..., :3] - truth.body_poses_TK7[..., :3]
    assert np.abs(moved).max() < 4e-4 and report["bytes"] < 40_000


@pytest.mark.slow
def test_another_process_records_the_same_bytes(collected, tmp_path):
    root, _, _ = collected
    words = [f"tasks=[{TASK}]", "episodes=1", f"output={tmp_path / 'again'}", "workers=1", "--json"]
    command = [sys.executable, "-m", "physisforcing.cli", "data", "collect", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["episodes"] == 1
    ours, theirs = LeRobotDataset(root), LeRobotDataset(tmp_path / "again")
    assert theirs.episodes[0].scene_hash == ours.episodes[0].scene_hash
    for name, values in ours.columns(0).items():
        if name not in ("task_index",):
            np.testing.assert_array_equal(theirs.columns(0)[name], values, err_msg=name)
    np.testing.assert_array_equal(theirs.frames(0), ours.frames(0))
    assert theirs.content_hash(0) == ours.content_hash(0)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"tasks": ["clik_bell"]}, "click_bell"),
        ({"policy": "export"}, "expert"),
        ({"policy": "no_such_module:make"}, "no_such_module"),
        ({"ground_truth": "all"}, "full"),
        ({"start_seed": 12_000}, "train"),
        ({"episodes": 0}, "episodes"),
        ({"shard": "2/2"}, "shard=0/4"),
        ({"shard": "1/2"}, "fewer shards"),
        ({"pictures": "100x100"}, "120x160"),
        ({"keep": "sucess"}, "success"),
        ({"instruction": "templat"}, "template"),
        ({"cameras": ["haed"]}, "head"),
    ],
)
def test_mistakes_are_named(tmp_path, change, names):
    values = {"output": str(tmp_path / "x"), "tasks": [TASK], "episodes": 1, "workers": 0} | change
    with pytest.raises(UserError, match=names):
        collect(CollectConfig(**values), progress=False)


def test_wrong_cameras_for_a_dataset_are_refused(collected):
    root, _, _ = collected
    values = CollectConfig(output=str(root), tasks=[TASK], episodes=3, workers=0, cameras=["head", "left_wrist"])
    with pytest.raises(UserError, match=r"observation\.images\.left_wrist"):
        collect(values, progress=False)
    assert LeRobotDataset(root).video_keys == [HEAD]


def test_a_seed_that_a_surviving_worker_wrote_meanwhile_is_kept(tmp_path):
    """A killed collection can leave a worker that finishes its seed; the run that continues must accept that seed."""
    job = Job(task=TASK, seed=SEEDS[0])
    config = CollectConfig(output=str(tmp_path / "data"), tasks=[TASK], ground_truth="none")
    for _ in range(2):
        collector = Collector(config)
        outcome = collector.handle(job)
        collector.close()
        assert outcome.kind == "recorded"
    collect(
        CollectConfig(output=config.output, tasks=[TASK], episodes=1, ground_truth="none", workers=0), progress=False
    )
    assert LeRobotDataset(config.output).num_episodes == 1


def test_collections_made_together_are_those_made_one_by_one(tmp_path):
    def configs(root):
        common = {"episodes": 1, "ground_truth": "poses", "pictures": "120x160", "workers": 1}
        return {
            "train": CollectConfig(output=str(root / "train"), tasks=[TASK], **common),
            "noise": CollectConfig(output=str(root / "noise"), tasks=[TASK], policy="expert+noise", **common),
        }

    together = collect_together(configs(tmp_path / "together"), progress=False)
    alone = {name: dataclasses.replace(config, workers=0) for name, config in configs(tmp_path / "apart").items()}
    apart = {name: collect(config, progress=False) for name, config in alone.items()}
    for name, summary in together.items():
        row, alone = summary["tasks"][TASK], apart[name]["tasks"][TASK]
        assert row["recorded"] == alone["recorded"] == 1 and row["frames"] == alone["frames"]
        one, two = (LeRobotDataset(tmp_path / folder / name) for folder in ("together", "apart"))
        assert one.fingerprint() == two.fingerprint()
        assert json.loads((tmp_path / "together" / name / "collect.json").read_text())["tasks"][TASK] == row
    again = collect_together(configs(tmp_path / "together"), progress=False)
    assert [summary["tasks"][TASK]["recorded"] for summary in again.values()] == [1, 1]
