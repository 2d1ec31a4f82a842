"""RoboTwin behind gymnasium: its contract, determinism, replay, both control modes, ground truth, refusals."""

import os
import random
import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest

from physisforcing.core.errors import UnstableSceneError, UserError

pytestmark = pytest.mark.sim
BLIND = {"observe": False}


def make(task, **options):
    import physisforcing.envs.robotwin  # noqa: F401

    return gymnasium.make(f"RoboTwin/{task}-v0", disable_env_checker=True, **options).unwrapped


@pytest.fixture
def open_env():
    """Makes environments and closes them after the test."""
    opened = []

    def opener(task, **options):
        opened.append(make(task, **options))
        return opened[-1]

    yield opener
    for env in opened:
        env.close()


def expert_targets(env, seed):
    """Drive targets [T+1,14] of an expert episode, body poses at its frames, and whether it succeeded."""
    env.reset(seed=seed, options=BLIND)
    targets, poses = [], []

    def on_frame(number):
        assert number == len(targets) and env._task.clock.steps == 15 * number
        targets.append(env.observe()["state"])
        poses.append(env.body_poses()[1])

    succeeded = env.play_expert(on_frame)
    return np.stack(targets), np.stack(poses), succeeded


def test_a_task_whose_objects_the_pack_lacks_names_the_fix(open_env, monkeypatch):
    monkeypatch.delenv("ROBOTWIN_ASSETS", raising=False)
    env = open_env("open_laptop")
    with pytest.raises(UserError, match="ROBOTWIN_ASSETS"):
        env.reset(seed=0)


def test_gymnasium_checks_it(open_env):
    from gymnasium.utils.env_checker import check_env

    env = open_env("click_bell")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # actions are joint targets in radians
        warnings.filterwarnings("ignore", message=".*symmetric and normalized space.*")
        check_env(env)


def test_equal_resets_draw_equal_pictures_and_leave_the_generators_alone(open_env):
    import torch

    env = open_env("adjust_bottle", cameras=("head", "left_wrist", "right_wrist"), depth=True, body_ids=True)
    first, info = env.reset(seed=3)
    np.random.seed(11), random.seed(12), torch.manual_seed(13)
    expected = np.random.rand(), random.random(), torch.rand(1).item()
    other, _ = env.reset(seed=4)
    np.random.seed(11), random.seed(12), torch.manual_seed(13)
    second, info_again = env.reset(seed=3)
    assert (np.random.rand(), random.random(), torch.rand(1).item()) == expected
    assert info == info_again and first["instruction"] == second["instruction"]
    pictures = [key for key in first if key.split("_")[-1] in ("rgb", "depth", "ids")]
    assert len(pictures) == 9
    for key in pictures:
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)
    assert (first["head_rgb"] != other["head_rgb"]).any()
    assert env.observation_space.contains(second)
    assert first["head_rgb"].std() > 10, "not a blank picture"


def test_the_same_seed_gives_the_same_scene_in_another_process(open_env):
    code = (
        "import gymnasium, physisforcing.envs.robotwin, sys\n"
        "env = gymnasium.make('RoboTwin/stack_blocks_two-v0', cameras=('left_wrist',)).unwrapped\n"
        "for seed in (5, 100000):\n"
        "    _, info = env.reset(seed=seed, options={'observe': False})\n"
        "    print(info['scene_hash'], env.body_poses()[1].tobytes().hex()[-400:])\n"
        "print('torch' in sys.modules, 'matplotlib.figure' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    *_, imported = done.stdout.splitlines()
    assert imported == "False False", "seconds of every process, for what no episode uses"
    env = open_env("stack_blocks_two")
    for seed, line in zip((5, 100000), done.stdout.split("\n"), strict=False):
        _, info = env.reset(seed=seed, options=BLIND)
        digest, poses = line.split()
        assert info["scene_hash"] == digest, "which cameras are drawn does not change the scene"
        there_K = np.frombuffer(bytes.fromhex(poses), dtype=np.float32)
        here_K = env.body_poses()[1].ravel()[-len(there_K) :]
        np.testing.assert_allclose(here_K, there_K, atol=1e-3)


@pytest.mark.parametrize("task", ["click_bell", "stack_blocks_two"])
def test_recorded_targets_replay(open_env, task):
    env = open_env(task, cameras=())
    for seed in range(3):
        targets_TA, poses_TK7, succeeded = expert_targets(env, seed)
        assert succeeded, env.expert_failure
        assert np.abs(targets_TA).max() <= np.pi + 1e-6
        _, info = env.reset(seed=seed)
        np.testing.assert_array_equal(env.body_poses()[1], poses_TK7[0])
        assert not info["is_success"] and info["step_limit"] == env.step_limit
        for number, target_A in enumerate(targets_TA[1:], start=1):
            observation, reward, terminated, truncated, info = env.step(target_A)
            np.testing.assert_allclose(observation["state"], target_A, atol=2e-6)
            assert env._task.clock.steps == 15 * number and not truncated
            assert reward == float(terminated)
            if terminated:
                break
        assert info["is_success"] and info["clipped_steps"] == 0
        drift = np.abs(env.body_poses()[1][:, :3] - poses_TK7[number][:, :3]).max()
        assert drift < 0.02, f"a body is {drift:.3f} m from where the expert had it"


def test_upstream_control_replays_too_and_names_itself(open_env):
    env = open_env("click_bell", control="topp", cameras=())
    targets_TA, _, succeeded = expert_targets(env, 1)
    assert succeeded
    _, info = env.reset(seed=1)
    assert info["control"] == "topp"
    for target_A in targets_TA[1:]:
        _, _, terminated, _, info = env.step(target_A)
        if terminated:
            break
    assert info["is_success"] and info["step"] <= len(targets_TA)


def test_ground_truth_agrees_with_the_picture(open_env):
    env = open_env("stack_blocks_two", depth=True, body_ids=True)
    observation, _ = env.reset(seed=0)
    ids_K, poses_K7 = env.body_poses()
    names = env.body_names()
    assert list(names) == ids_K.tolist() and set(np.unique(observation["head_body_ids"])) <= set(ids_K.tolist()) | {0}
    camera = env.cameras()[0]
    centres = {n: poses_K7[k, :3] for k, n in enumerate(ids_K) if names[int(n)] == "box"}
    assert len(centres) == 2
    for number, centre in centres.items():
        eye = camera.world_to_camera_44 @ [*centre, 1]
        x, y, _ = camera.intrinsics_33 @ eye[:3] / eye[2]
        rows, columns = np.nonzero(observation["head_body_ids"] == number)
        assert np.hypot(columns.mean() - x, rows.mean() - y) < 4, (
            "the projected centre is the middle of the block's pixels"
        )
        nearest = observation["head_depth"][rows, columns].min() / 1000
        assert 0 < eye[2] - nearest < 0.025 * np.sqrt(3), (
            "the visible side is at most half a diagonal before the centre"
        )
    touching = {(names[a], names[b]) for a, b, impulse in env.contacts() if impulse > 0}
    assert touching == {("table", "box")}
    impulses = [impulse for _, _, impulse in env.contacts()]
    np.testing.assert_allclose(impulses, 0.01 * 9.81 / 250, rtol=0.05, err_msg="RoboTwin's objects weigh 10 g")
    env.step(observation["state"])
    impulses = [impulse for _, _, impulse in env.contacts()]
    np.testing.assert_allclose(
        impulses, 15 * 0.01 * 9.81 / 250, rtol=0.05, err_msg="summed over the 15 steps of a frame"
    )


def test_actions_are_checked_and_clipped(open_env):
    env = open_env("click_bell", cameras=())
    with pytest.raises(UserError, match="reset"):
        env.step(np.zeros(14))
    env.reset(seed=0)
    with pytest.raises(UserError, match=r"shape \(13,\)"):
        env.step(np.zeros(13))
    wrong = np.zeros(14)
    wrong[7] = np.nan
    with pytest.raises(UserError, match="right_joint_1"):
        env.step(wrong)
    high = env.observe(pictures=False)["state"].copy()
    high[6] = 1.5
    observation, _, _, _, info = env.step(high)
    assert info["clipped_steps"] == 1 and info["step"] == 1 and observation["state"][6] == 1.0
    with pytest.raises(UserError, match="just reset"):
        env.play_expert()


def test_the_limit_truncates(open_env):
    env = open_env("click_bell", cameras=())
    env.reset(seed=0)
    env.step_limit = 3
    hold_A = env.observe(pictures=False)["state"]
    assert [env.step(hold_A)[3] for _ in range(3)] == [False, False, True]


def test_wrong_names_are_refused():
    with pytest.raises(UserError, match="did you mean 'head'"):
        make("click_bell", cameras=("haed",))
    with pytest.raises(UserError, match="did you mean 'interpolated'"):
        make("click_bell", control="interpolate")
    with pytest.raises(UserError, match="embodiments/"):
        make("click_bell", assets="/nowhere")


def test_a_second_live_environment_is_refused(open_env):
    env, second = open_env("click_bell", cameras=()), open_env("adjust_bottle", cameras=())
    env.reset(seed=0)
    with pytest.raises(UserError, match=r"gymnasium\.vector.*remote environment"):
        second.reset(seed=0)
    env.step(env.observe(pictures=False)["state"])
    env.close()
    second.reset(seed=0)


def test_an_unstable_scene_is_an_error_and_the_next_seed_works(open_env, monkeypatch):
    env = open_env("click_bell", cameras=())
    env.reset(seed=0)
    base = env._runtime.base_task.Base_Task
    monkeypatch.setattr(base, "check_stable", lambda self: (False, ["bell"]))
    with pytest.raises(UnstableSceneError, match="seed 1"):
        env.reset(seed=1)
    monkeypatch.undo()
    _, info = env.reset(seed=2)
    assert info["seed"] == 2


def test_no_vulkan_device_is_refused():
    code = (
        "import gymnasium, physisforcing.envs.robotwin\n"
        "try:\n"
        "    gymnasium.make('RoboTwin/click_bell-v0')\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, '|', error)\n"
    )
    environment = {**os.environ, "VK_DRIVER_FILES": "/nonexistent.json", "VK_ICD_FILENAMES": "/nonexistent.json"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.startswith("VulkanUnavailableError") and "Fix:" in done.stdout


class Chunks:
    """Holds the arms in chunks of 8 targets."""

    fingerprint = "chunks"

    def reset(self, **_):
        self.looks = 0

    def act(self, observation):
        assert observation.images["head"].shape == (240, 320, 3)
        self.looks += 1
        return np.repeat(observation.state_A[None], 8, axis=0)

    def telemetry(self):
        return {}


def test_only_what_is_asked_for_is_built_and_drawn(open_env, monkeypatch):
    from physisforcing.envs.robotwin.renderer import Pictures
    from physisforcing.envs.rollout import run_episode
    from physisforcing.plan_episodes import SparsePictures

    drawn = []
    draw = Pictures.draw

    def counting(self):
        draw(self)
        drawn.append(tuple(self.cameras))

    monkeypatch.setattr(Pictures, "draw", counting)
    env = open_env("click_bell", cameras=("head", "right_wrist"))
    observation, _ = env.reset(seed=0, options=BLIND)
    built = env._task.scene.get_cameras
    assert drawn == [] and built() == [] and "head_rgb" not in observation
    rig = env._task.cameras
    assert len(rig.static_camera_list) >= 2, "RoboTwin asked for all of its cameras"
    env.step_blind(observation["state"])
    assert drawn == [] and built() == []
    observation = env.observe()
    assert drawn == [("head", "right_wrist")] and {c.name for c in built()} == {"head_camera", "right_camera"}
    assert observation["head_rgb"].std() > 10 and observation["right_wrist_rgb"].std() > 1, "the first picture is drawn"
    np.testing.assert_array_equal(env.observe()["head_rgb"], observation["head_rgb"])
    env.close()

    for options, expected in (({}, 3), ({"record": True}, 25)):
        env, policy = open_env("click_bell"), Chunks()
        drawn.clear()
        result = run_episode(env, policy, seed=0, max_steps=24, **options)
        assert (result.status, result.steps, policy.looks) == ("failure", 24, 3), result.error
        assert len(drawn) == expected, "the reset's, one for each further chunk, or every step where frames are kept"
        env.close()
    env = open_env("click_bell")
    for every, expected in ((8, 3), (0, 1)):
        drawn.clear()
        env.reset(seed=0, options=BLIND)
        watched = SparsePictures(env, every)
        watched.reset(seed=0)
        for k in range(1, 21):
            (watched.step if k % 8 == 0 else watched.step_blind)(env.observe(pictures=False)["state"])
        assert len(drawn) == expected
