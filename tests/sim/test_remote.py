"""Environments elsewhere: the manners of server, client and repeated episodes, on a small stand-in."""

import os
import socket
import threading
import time

import gymnasium
import numpy as np
import pytest

from physisforcing.core.connection import Connection, RemoteFailureError, hello
from physisforcing.core.errors import UnstableSceneError, UserError
from physisforcing.core.message_client import ServerLostError
from physisforcing.core.types import ActionSpec
from physisforcing.core.wire import HEADER, MAGIC
from physisforcing.envs.baselines import NoOp
from physisforcing.envs.remote import SERVICE, ClientEnv, RemoteEnv, RemoteEpisodes
from physisforcing.envs.serve import EnvServer, ServeConfig
from physisforcing.envs.spaces import build_space, describe_space

SPEC = ActionSpec(names=("a", "b"), low=(-1.0, -1.0), high=(1.0, 1.0))


class Dot(gymnasium.Env):
    """Shows its action; complains as RoboTwin does. ``made`` counts instances, ``closed`` those that were closed."""

    task_name, control, camera_names, step_limit, action_spec = "dot", "interpolated", ("head",), 20, SPEC
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    observation_space = gymnasium.spaces.Dict(
        {
            "head_rgb": gymnasium.spaces.Box(0, 255, (4, 4, 3), np.uint8),
            "state": gymnasium.spaces.Box(np.float32([-1, -2]), np.float32([1, 2]), dtype=np.float32),
            "instruction": gymnasium.spaces.Text(12, charset="abc"),
        }
    )
    made = closed = 0

    def __init__(self):
        type(self).made += 1
        self.steps, self.state = 0, np.zeros(2, np.float32)

    def reset(self, *, seed=None, options=None):
        if seed == 13:
            raise UnstableSceneError("it rolls away")
        if seed == 14:
            raise ZeroDivisionError("a bug")
        self.steps, self.state = 0, np.full(2, (seed or 0) / 100, np.float32)
        return self.observe(pictures=(options or {}).get("observe", True)), self._info()

    def step(self, action):
        if np.shape(action) != (2,):
            raise UserError("action", got=np.shape(action), wanted="shape (2,)", fix="give two")
        self.steps += 1
        self.state = np.asarray(action, np.float32)
        return self.observe(), 0.0, False, self.steps >= 20, self._info()

    def step_blind(self, action):
        _, *rest = self.step(action)
        return self.observe(pictures=False), *rest

    def observe(self, *, pictures=True):
        picture = {"head_rgb": np.full((4, 4, 3), self.steps, np.uint8)} if pictures else {}
        return {**picture, "state": self.state, "state_measured": self.state, "instruction": "abc"}

    def _info(self):
        names = {"scene_hash": "h", "task": "dot", "seed": 0, "step_limit": 20, "cameras": ("head",)}
        return {"is_success": False, "step": self.steps, "why": None, **names}

    def fork(self):
        return self.state.copy()

    def restore(self, state):
        self.state = state

    def close(self):
        type(self).closed += 1


@pytest.fixture
def serve():
    """Starts a server of ``Dot`` in a thread; stops it after the test and checks that it ends."""
    running = []

    def start(**settings):
        server = EnvServer(ServeConfig(task="dot", **settings), Dot)
        port = server.open()
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        return server, port

    yield start
    for server, thread in running:
        server.stop()
        thread.join(5)
        assert not thread.is_alive()


def test_the_client_looks_like_the_environment(serve):
    _, port = serve()
    local, env = Dot(), RemoteEnv("127.0.0.1", port, token="")
    assert env.observation_space == local.observation_space and env.action_space == local.action_space
    assert (env.task_name, env.step_limit, env.action_spec) == ("dot", 20, SPEC) and env.unwrapped is env
    for seed in (5, None):
        here, there = local.reset(seed=seed), env.reset(seed=seed)
        for _ in range(3):
            assert repr(here) == repr(there), "values and types"
            action = np.random.default_rng(0).uniform(-1, 1, 2)
            here, there = local.step(action), env.step(action)
    assert env.step_blind([0.5, 0.5])[0].keys() == {"state", "state_measured", "instruction"}
    assert "head_rgb" not in env.reset(seed=1, options={"observe": False})[0]
    env.close()
    env.close()
    with pytest.raises(UserError, match="closed environment"):
        env.observe()


def test_errors_cross_and_the_session_goes_on(serve):
    _, port = serve()
    env = RemoteEnv("127.0.0.1", port, token="")
    with pytest.raises(UserError) as caught:
        env.step(np.zeros(3))
    assert str(caught.value) == "action: got (3,), wanted shape (2,). Fix: give two"
    with pytest.raises(UnstableSceneError, match="it rolls away"):
        env.reset(seed=13)
    with pytest.raises(RemoteFailureError, match=r"(?s)ZeroDivisionError.*a bug.*Traceback"):
        env.reset(seed=14)
    with pytest.raises(UserError, match=r"message\['options'\]\['x'\]"):
        env.reset(seed=1, options={"x": object()})
    with pytest.raises(UserError, match="op"):
        env._call("__class__")
    with pytest.raises(UserError, match="step"):
        env._call("step", shots=3)
    assert env.reset(seed=1)[1]["step"] == 0 and not env.lost
    env.close()


def test_forks_stay_on_their_side(serve):
    _, port = serve()
    env = RemoteEnv("127.0.0.1", port, token="")
    env.step([0.5, 0.5])
    first = env.fork()
    env.step([-1, 1])
    second = env.fork()
    for fork, state in ((first, [0.5, 0.5]), (second, [-1, 1]), (first, [0.5, 0.5])):
        env.restore(fork)
        assert env.observe()["state"].tolist() == state
    with pytest.raises(UserError, match="state"):
        env._call("restore", handle=7)
    env.close()
    other = when_free(port)
    with pytest.raises(UserError, match="another session"):
        other.restore(first)
    other.close()


def test_one_client_at_a_time_and_a_fresh_environment_each(serve):
    _, port = serve()
    made, closed = Dot.made, Dot.closed
    first = RemoteEnv("127.0.0.1", port, token="")
    with pytest.raises(UserError, match="a second client"):
        RemoteEnv("127.0.0.1", port, token="")
    first.step([0.1, 0.1])
    first.close()
    second = when_free(port)
    assert second.observe()["state"].tolist() == [0, 0]
    second._disconnect()  # gone without a word: the next one may come, too
    when_free(port).close()
    when_free(port).close()
    assert Dot.made - made == 3 and Dot.closed - closed >= 3


def when_free(port):
    """A client as soon as the server has seen the end of the one before."""
    for _ in range(100):
        try:
            return RemoteEnv("127.0.0.1", port, token="")
        except UserError:
            time.sleep(0.1)
    raise AssertionError("the server never came free")


def test_tokens(serve, monkeypatch):
    _, port = serve(token="correct horse battery")
    for wrong in ("", "correct horse batterz", "ü"):
        with pytest.raises(UserError, match="token") as caught:
            RemoteEnv("127.0.0.1", port, token=wrong)
        assert "correct horse" not in str(caught.value)
    monkeypatch.setenv("PHYSIS_TOKEN", "correct horse battery")
    RemoteEnv("127.0.0.1", port).close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_a_reachable_host_demands_a_token(host):
    for token in ("", "short"):
        with pytest.raises(UserError, match="token"):
            EnvServer(ServeConfig(task="dot", host=host, token=token), Dot)
    ServeConfig(task="dot", host=host, token="0123456789abcdef").check()
    for local in ("127.0.0.1", "::1", "localhost", "127.8.0.1"):
        ServeConfig(task="dot", host=local).check()


def test_settings_that_cannot_be(serve):
    _, port = serve()
    with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port}"):
        EnvServer(ServeConfig(task="dot", port=port), Dot).open()
    for wrong in ({"port": 70000}, {"idle_s": 0}, {"message_s": -1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            ServeConfig(task="dot", **wrong).check()


def raw_client(port):
    return Connection(socket.create_connection(("127.0.0.1", port), timeout=5), peer="server")


def test_strangers_and_nonsense_do_not_disturb_an_episode(serve):
    _, port = serve(idle_s=30)
    env = RemoteEnv("127.0.0.1", port, token="")
    silent = [raw_client(port) for _ in range(12)]  # more than may wait for their hello
    for noise in (b"GET / HTTP/1.1\r\n\r\n", HEADER.pack(MAGIC, 2**31), os.urandom(100), b""):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
            sock.sendall(noise)
    env.reset(seed=1)
    for connection in silent:
        connection.close()
    time.sleep(0.3)
    stranger = raw_client(port)
    stranger.socket.sendall(HEADER.pack(MAGIC, 5000))  # longer than a hello may be
    assert "4096 bytes" in str(stranger.receive(timeout_s=5)["error"])
    stranger.close()
    assert env.step([0, 0])[4]["step"] == 1
    env.close()


def test_a_client_that_says_nothing_is_sent_away(serve):
    _, port = serve(idle_s=0.2, message_s=0.2)
    client = raw_client(port)
    client.send(hello(SERVICE, ""))
    assert client.receive()["ok"] is True
    assert client.receive(idle_s=5)["error"]["got"] == "silence"
    slow = raw_client(port)
    for _ in range(50):
        slow.send(hello(SERVICE, ""))
        if slow.receive()["ok"]:
            break
        slow = raw_client(port)
        time.sleep(0.05)
    slow.socket.sendall(HEADER.pack(MAGIC, 1000) + b"\x81")
    assert slow.receive(idle_s=5)["error"]["got"] == "silence"
    slow.close(), client.close()


def test_a_server_that_stops_is_named(serve):
    server, port = serve()
    env = RemoteEnv("127.0.0.1", port, token="")
    env.reset(seed=1)
    server.stop()
    with pytest.raises(ServerLostError, match=rf"127\.0\.0\.1:{port}"):
        env.observe()
    assert env.lost
    with pytest.raises(ServerLostError, match="new RemoteEnv"):
        env.observe()
    env.close()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    with pytest.raises(ServerLostError, match=rf"127\.0\.0\.1:{free}.*physis serve env"):
        RemoteEnv("127.0.0.1", free, token="")


def test_a_server_that_hangs_is_lost_in_time():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ServerLostError, match=r"no answer in 0.2 s"):
            RemoteEnv("127.0.0.1", port, token="", reply_timeout_s=0.2)


class Mortal(ClientEnv):
    """A client whose server dies at the given step."""

    def __init__(self, dies_at):
        self._dot, self._dies_at = Dot(), dies_at
        self._introduce({**self._describe(), "cameras": ["head"]})

    @staticmethod
    def _describe():
        spaces = {"action_space": describe_space(Dot.action_space)}
        spaces["observation_space"] = describe_space(Dot.observation_space)
        spec = {"names": SPEC.names, "low": SPEC.low, "high": SPEC.high}
        return {
            "session": "1",
            "task": "dot",
            "control": "interpolated",
            "step_limit": 20,
            "action_spec": spec,
            **spaces,
        }

    def _call(self, op, **arguments):
        if self._dot.steps >= self._dies_at:
            self.lost = True
            raise ServerLostError("server at nowhere:1 died")
        if op == "reset":
            return dict(zip(("observation", "info"), self._dot.reset(**arguments), strict=True))
        keys = ("observation", "reward", "terminated", "truncated", "info")
        return dict(zip(keys, self._dot.step(arguments["action"]), strict=True))


@pytest.mark.parametrize(
    ("deaths", "status", "losses", "made"),
    [([99], "failure", 0, 1), ([3, 99], "failure", 1, 2), ([3, 0], "error", 2, 2)],
)
def test_a_lost_episode_is_run_once_more(deaths, status, losses, made):
    ends = iter(deaths)
    envs = []
    episodes = RemoteEpisodes(lambda: envs.append(Mortal(next(ends))) or envs[-1])
    result = episodes.run(NoOp(), seed=1)
    assert (result.status, len(envs), result.telemetry.get("server_losses", 0)) == (status, made, losses)
    assert ("nowhere:1" in result.error) == (status == "error")
    episodes.close()
    assert status == "error" or result.steps == 20


def test_a_replacement_that_does_not_start_counts_as_lost():
    def start():
        starts.append(1)
        if len(starts) != 2:
            raise ServerLostError("did not start")
        return Mortal(3)

    starts = []
    episodes = RemoteEpisodes(start)
    with pytest.raises(ServerLostError):
        episodes.run(NoOp(), seed=1)
    result = episodes.run(NoOp(), seed=1)
    assert (result.status, result.task, result.telemetry) == ("error", "dot", {"server_losses": 2.0})


def test_spaces_of_other_kinds_are_refused():
    with pytest.raises(UserError, match="Discrete"):
        describe_space(gymnasium.spaces.Discrete(3))
    with pytest.raises(UserError, match="sphere"):
        build_space({"kind": "sphere"})
