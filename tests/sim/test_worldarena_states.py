"""Rows of WorldArena's ``states/`` against what RoboTwin itself says of its end effectors."""

import gymnasium
import numpy as np
import pytest

import physisforcing.envs.robotwin  # noqa: F401  (registers the tasks)
from physisforcing.planner.worldarena_states import link_poses, poses_of, states_of

pytestmark = pytest.mark.sim


def test_link_poses_are_robotwins_end_effector_poses():
    env = gymnasium.make("RoboTwin/click_bell-v0", cameras=(), disable_env_checker=True).unwrapped
    try:
        env.reset(seed=100_000, options={"observe": False})
        poses, told, joints = [], [], []

        def look(_):
            poses.append(env.body_poses()[1])
            robot = env._task.robot
            told.append([robot.get_left_ee_pose(), robot.get_right_ee_pose()])
            joints.append(env.observe(pictures=False)["state"])

        env.play_expert(look)
        mine = link_poses(np.stack(poses), env.body_poses()[0], env.body_names())
    finally:
        env.close()
    assert len(told) > 40 and np.ptp(np.array(told)[:, :, :3], axis=0).max() > 0.05, "an arm moved"
    np.testing.assert_allclose(mine, np.array(told), atol=1e-5)
    back, _ = poses_of("left_first", states_of("left_first", np.stack(joints), mine))
    np.testing.assert_allclose(back, np.array(told), atol=1e-5)
