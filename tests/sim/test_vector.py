"""Environments in processes: gymnasium's vector interface, and what happens when a process dies, hangs or raises."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from physisforcing.core.errors import UnstableSceneError, UserError
from process_state import alive

pytestmark = pytest.mark.sim
BLIND = {"observe": False}
TASKS = ("click_bell", "stack_blocks_two", "adjust_bottle")


@pytest.fixture
def open_vector():
    """Makes vector environments; afterwards none of their processes may be left."""
    opened, pids = [], set()

    def opener(tasks, num_envs=None, **options):
        import gymnasium

        import physisforcing.envs.robotwin  # noqa: F401
        from physisforcing.envs.vector import robotwin_vector

        if num_envs is None:
            opened.append(robotwin_vector(tasks, **options))
        else:
            opened.append(gymnasium.make_vec(f"RoboTwin/{tasks}-v0", num_envs=num_envs, **options))
        return opened[-1]

    yield opener
    for vector in opened:
        pids |= set(vector.pids()) | {crash.pid for crash in vector.crashes}
        vector.close()
    assert pids and not [pid for pid in pids if alive(pid)]


def waves(states_NA, steps):
    joints = np.arange(states_NA.shape[1])
    return [np.float32(states_NA + 0.15 * np.sin(0.3 * k + joints)) for k in range(1, steps + 1)]


def episode(vector, kill_at=None, victim=1):
    """States [T,N,A], body poses at the end and the flags of 12 steps; the victim is killed while it works."""
    observation, infos = vector.reset(seed=[1, 5, 3], options=BLIND)
    states, flags = [], []
    for k, actions_NA in enumerate(waves(observation["state"], 12)):
        if k == kill_at:
            threading.Timer(0.002, os.kill, (vector.pids()[victim], signal.SIGKILL)).start()
        observation, rewards, ended, cut, infos = vector.step(actions_NA, pictures=False)
        states.append(observation["state_measured"])
        flags.append((rewards, ended, cut, infos["crashed"]))
    return np.stack(states), vector.call("body_poses"), flags, infos


def test_a_killed_process_is_replaced_and_the_others_go_on_bit_equally(open_vector):
    vector = open_vector(TASKS, cameras=())
    states, poses, flags, infos = episode(vector)
    assert not vector.crashes and not np.any([f[3] for f in flags])
    assert infos["seed"].tolist() == [1, 5, 3] and infos["task"].tolist() == list(TASKS)
    began = time.monotonic()
    killed_states, killed_poses, killed_flags, infos = episode(vector, kill_at=4)
    assert time.monotonic() - began < 60
    for i in (0, 2):
        np.testing.assert_array_equal(killed_states[:, i], states[:, i])
        np.testing.assert_array_equal(killed_poses[i][1], poses[i][1])
    (crash,) = vector.crashes
    assert (crash.env, crash.exit_code, crash.seed, crash.doing) == (1, -signal.SIGKILL, 5, "step")
    (k,) = [k for k, f in enumerate(killed_flags) if f[3].any()]
    assert crash.step == k in (4, 5)
    _, ended, cut, crashed = killed_flags[k]
    assert crashed.tolist() == cut.tolist() == [False, True, False] and not ended.any()
    assert infos["seed"][1] != 5 and infos["step"].tolist() == [12, 11 - k, 12], "it acts again in a fresh scene"
    np.testing.assert_array_equal(killed_states[:k, 1], states[:k, 1])


def test_pictures_seeds_and_automatic_resets(open_vector):
    vector = open_vector("click_bell", 2)
    observation, infos = vector.reset(seed=7)
    assert infos["seed"].tolist() == [7, 8]
    assert vector.observation_space.contains(observation) and observation["head_rgb"].shape == (2, 240, 320, 3)
    assert observation["head_rgb"][0].std() > 10 and (observation["head_rgb"][0] != observation["head_rgb"][1]).any()
    vector.call_one(0, "__setattr__", "step_limit", 2)
    actions_NA = observation["state"]
    for expected in ([False, False], [True, False]):
        observation, _, _, cut, infos = vector.step(actions_NA, pictures=False)
        assert cut.tolist() == expected and "head_rgb" not in observation
    observation, rewards, _, cut, infos = vector.step(actions_NA)
    assert infos["step"].tolist() == [0, 3] and not cut.any() and rewards[0] == 0.0
    assert infos["seed"][0] != 7 and 0 <= infos["seed"][0] < 10_000 and observation["head_rgb"].shape[0] == 2
    with pytest.raises(UserError, match="environments 1"):
        vector.step(np.stack([actions_NA[0], np.full(14, np.nan, dtype=np.float32)]))
    with pytest.raises(UserError, match="shape"):
        vector.step(actions_NA[:1])
    assert vector.call("steps") == (0, 3), "a refused action moves no environment"


def test_forks_travel_between_processes(open_vector):
    vector = open_vector("stack_blocks_two", 2, cameras=())
    observation, _ = vector.reset(seed=[4, 4], options=BLIND)
    actions = waves(observation["state"], 12)
    for actions_NA in actions[:6]:
        vector.step(actions_NA, pictures=False)
    fork = vector.call_one(0, "fork")
    for actions_NA in actions[6:]:
        vector.step(actions_NA[::-1].copy(), pictures=False)
    vector.reset(seed=[9, 4], options=BLIND)
    vector.call_one(1, "restore", fork)
    for actions_NA in actions[6:]:
        vector.step(actions_NA, pictures=False)
    again = vector.call_one(1, "body_poses")[1]
    vector.reset(seed=[4, 4], options=BLIND)
    for actions_NA in actions:
        vector.step(actions_NA, pictures=False)
    for _, poses_K7 in vector.call("body_poses"):
        np.testing.assert_array_equal(poses_K7, again)


def test_hanging_raising_and_unstable_environments(tmp_path, monkeypatch):
    (tmp_path / "odd_envs.py").write_text(ODD)
    monkeypatch.syspath_prepend(str(tmp_path))
    import odd_envs

    from physisforcing.envs.vector import ProcessVectorEnv

    vector = ProcessVectorEnv([odd_envs.Odd] * 3, timeout_s=4.0)
    pids = set(vector.pids())
    try:
        vector.reset(seed=[10, 20, 30])
        _, _, _, cut, infos = vector.step(np.float32([[1], [2], [0]]))
        assert cut.tolist() == [True, True, False] == infos["crashed"].tolist()
        hung, raised = vector.crashes
        assert (hung.env, hung.exit_code, hung.seed) == (0, None, 10) and "no answer in 4 s" in hung.message
        assert (raised.env, raised.seed) == (1, 20) and "ZeroDivisionError" in raised.message
        assert vector.unstable, "half the training seeds do not come to rest here, and are passed over"
        assert all(seed % 2 == 1 for _, seed in vector.unstable)
        with pytest.raises(UnstableSceneError, match="seed 11"):
            vector.reset(seed=[10, 11, 12])
        observation, *_ = vector.step(np.float32([[0], [0], [0]]))
        assert observation["state"][[0, 2]].ravel().tolist() == [10, 12]
        pids |= set(vector.pids())
    finally:
        vector.close()
    assert not [pid for pid in pids if alive(pid)]
    with pytest.raises(UserError, match="top of a module"):
        ProcessVectorEnv([lambda: odd_envs.Odd()])


ORPHANS = """
import sys, time
import odd_envs
from physisforcing.envs.vector import ProcessVectorEnv
if __name__ == "__main__":
    vector = ProcessVectorEnv([odd_envs.Odd] * 2)
    vector.reset(seed=[2, 4])
    print(*vector.pids(), flush=True)
    time.sleep(60)
"""


def test_no_process_outlives_a_killed_parent(tmp_path):
    (tmp_path / "odd_envs.py").write_text(ODD)
    (tmp_path / "orphans.py").write_text(ORPHANS)
    parent = subprocess.Popen([sys.executable, "orphans.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(map(alive, pids))
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


ODD = '''
import time

import gymnasium
import numpy as np
from physisforcing.core.errors import UnstableSceneError


class Odd(gymnasium.Env):
    """Action 1 hangs, 2 raises; odd seeds are unstable."""

    observation_space = gymnasium.spaces.Dict({"state": gymnasium.spaces.Box(0, 10_000, (1,), np.float32)})
    action_space = gymnasium.spaces.Box(0, 2, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        if seed % 2:
            raise UnstableSceneError(f"seed {seed} moves")
        self.state = np.float32([seed])
        return {"state": self.state}, {"seed": seed}

    def step(self, action):
        if action[0] == 1:
            time.sleep(60)
        if action[0] == 2:
            1 / 0
        return {"state": self.state}, 0.0, False, False, {}
'''
