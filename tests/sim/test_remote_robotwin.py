"""RoboTwin on a server of its own against its local self, and what is left when server or client are killed."""

import json
import os
import signal
import subprocess
import sys
import time

import gymnasium
import numpy as np
import pytest

from physisforcing.core.errors import UserError
from physisforcing.core.message_client import ServerLostError
from physisforcing.envs.baselines import NoOp
from physisforcing.envs.remote import RemoteEnv, RemoteEpisodes
from process_state import alive


def same(left, right):
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, np.ndarray):
            assert value.dtype == right[key].dtype
            np.testing.assert_array_equal(value, right[key], err_msg=key)
        else:
            assert value == right[key], key


@pytest.fixture(scope="module")
def command():
    """``physis serve env`` as people start it; ends by SIGTERM with exit code 0."""
    words = ["serve", "env", "task=click_bell", "cameras=[left_wrist]", "depth=true", "--json"]
    process = subprocess.Popen([sys.executable, "-m", "physisforcing", *words], stdout=subprocess.PIPE)
    ready = json.loads(process.stdout.readline())
    yield process, ready
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert process.stdout.read() == b"", "one line of JSON and nothing else"
    process.stdout.close()


@pytest.mark.sim
def test_remote_robotwin_is_bit_equal_to_the_local_one(command):
    import physisforcing.envs.robotwin  # noqa: F401

    process, ready = command
    assert ready["pid"] == process.pid and ready["host"] == "127.0.0.1" and ready["task"] == "click_bell"
    options = {"cameras": ("left_wrist",), "depth": True}
    local = gymnasium.make("RoboTwin/click_bell-v0", disable_env_checker=True, **options).unwrapped
    env = RemoteEnv(ready["host"], ready["port"])
    try:
        assert env.observation_space == local.observation_space and env.action_space == local.action_space
        assert env.action_spec == local.action_spec and env.step_limit == local.step_limit
        (here, info_here), (there, info_there) = local.reset(seed=100_003), env.reset(seed=100_003)
        same(here, there)
        assert info_here == info_there and type(info_there["cameras"]) is tuple
        rng = np.random.default_rng(0)
        for number in range(3):
            action_A = (here["state"] + rng.uniform(-0.1, 0.1, 14)).astype(np.float32)
            step = ("step", "step_blind")[number % 2]
            (here, *rest_here), (there, *rest_there) = getattr(local, step)(action_A), getattr(env, step)(action_A)
            same(here, there)
            assert rest_here == rest_there
        np.testing.assert_array_equal(local.body_poses()[1], env.body_poses()[1])
        assert local.body_names() == env.body_names() and local.contacts() == env.contacts()
        same(local.observe(), env.observe())
        fork = env.fork()
        env.step_blind(action_A + 0.1)
        env.restore(fork)
        same(local.observe(), env.observe())
        for wrong in (np.full(14, np.nan), np.zeros(13), [["a"]]):
            messages = []
            for either in (local, env):
                with pytest.raises(UserError, match="action") as caught:
                    either.step(wrong)
                messages.append(str(caught.value))
            assert messages[0] == messages[1]
    finally:
        env.close()
        local.close()


class Hold(NoOp):
    """Holds still, and kills the server once, in the middle of an episode."""

    def __init__(self, pid_of):
        self.pid_of, self.killed = pid_of, 0

    def act(self, observation):
        if observation.step == 4 and not self.killed:
            self.killed = self.pid_of()
            os.kill(self.killed, signal.SIGKILL)
        return super().act(observation)[:2]


@pytest.mark.sim
def test_a_killed_server_is_replaced_and_errors_at_its_start_arrive():
    with pytest.raises(UserError, match="did you mean 'click_bell'"):
        RemoteEnv.spawn("clik_bell")
    with pytest.raises(UserError, match="did you mean 'cameras'"):
        RemoteEnv.spawn("click_bell", camera=["head"])
    with pytest.raises(UserError, match="python"):
        RemoteEnv.spawn("click_bell", python="/nowhere/python")
    bare = os.path.realpath(sys.executable)  # this interpreter without the packages of its environment
    with pytest.raises(ServerLostError, match=r"(?s)ended with code 1.*No module named 'physisforcing"):
        RemoteEnv.spawn("click_bell", python=bare)
    episodes = RemoteEpisodes(lambda: RemoteEnv.spawn("click_bell", cameras=[]))
    policy = Hold(lambda: episodes.environment().process.pid)
    result = episodes.run(policy, seed=100_000, max_steps=8)
    assert (result.status, result.steps, result.telemetry["server_losses"]) == ("failure", 8, 1.0)
    process = episodes.environment().process
    assert process.pid != policy.killed
    episodes.close()
    assert process._process.poll() == 0, "close stops it in order"


@pytest.mark.sim
def test_a_server_does_not_outlive_the_process_that_spawned_it():
    code = (
        "import os, signal\n"
        "from physisforcing.envs.remote import RemoteEnv\n"
        "env = RemoteEnv.spawn('click_bell', cameras=[])\n"
        "print(env.process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    server, deadline = int(done.stdout), time.monotonic() + 20
    while alive(server):
        assert time.monotonic() < deadline
        time.sleep(0.1)
