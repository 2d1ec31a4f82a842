"""One world model for many simulators over sockets: equal answers, errors as they were, hostile messages, a server that dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from physisforcing.core import message_server
from physisforcing.core.connection import Connection, RemoteFailureError, hello
from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.message_client import ServerLostError, parse_address
from physisforcing.core.protocols import WorldModel
from physisforcing.core.types import (
    ActionSpec,
    DecoderNeeds,
    FeatureRequest,
    Rollout,
    RolloutRequest,
    ViewLayout,
    WorldModelSpec,
)
from physisforcing.core.wire import WireError, encode
from physisforcing.planner.model_client import SocketWorldModel
from physisforcing.planner.model_messages import (
    MOST_SAMPLES,
    SERVICE,
    pack_request,
    pack_rollout,
    pack_spec,
    unpack_request,
    unpack_rollout,
    unpack_spec,
)
from physisforcing.planner.model_server import ModelServer, ModelServerConfig

H, W, FRAMES = 8, 12, 17

DOUBLE = '''
import time
import numpy as np
from physisforcing.core.types import Rollout, ViewLayout, WorldModelSpec

class Double:
    """Pictures are a function of the context and the seed of each sample. A seed of 7 raises, 8 takes seconds."""

    def __init__(self, fingerprint="one", **changes):
        values = dict(
            name="double", views=ViewLayout(height=8, width=12), context_frames=1, horizons=(17,), frame_dt=0.12,
            conditions=frozenset({"text"}), returns=frozenset({"frames", "features"}), max_batch=16, fingerprint=fingerprint,
        )
        self.spec = WorldModelSpec(**(values | changes))
        self.sizes = []

    def rollout(self, request):
        self.sizes.append(request.seeds_BS.size)
        if (request.seeds_BS == 7).any():
            raise RuntimeError("the seed is 7")
        if (request.seeds_BS == 8).any():
            time.sleep(3)
        value_BS = request.context_BVTHWC[:, 0, 0, 0, 0, 0][:, None] + request.seeds_BS
        ramp = value_BS[:, :, None, None, None, None, None] + np.arange(17)[None, None, None, :, None, None, None]
        shape = (*value_BS.shape, 1, 17, 8, 12, 3)
        features = None
        if "features" in request.returns:
            taps = np.array(request.features.taps, np.float32)
            features = (value_BS[:, :, None, None, None, None, None] * taps[None, None, :, None, None, None, None]) * request.features.sigma
        return Rollout(
            times_T=np.arange(17) * 0.12, frames_BSVTHWC=np.broadcast_to(ramp, shape).astype(np.uint8),
            features_BSKFhwD=features, cost={"seconds": 0.5},
        )

def make():
    return Double()
'''
scope: dict[str, Any] = {}
exec(compile(DOUBLE, "double", "exec"), scope)
Double = scope["Double"]


def a_request(seed: int, *, samples: int = 1, **changes: Any) -> RolloutRequest:
    values: dict[str, Any] = {
        "context_BVTHWC": np.full((1, 1, 1, H, W, 3), seed % 90, np.uint8),
        "instructions": ["press the bell"],
        "seeds_BS": (seed + 10 * np.arange(samples))[None].astype(np.int64),
        "horizon": FRAMES,
    }
    return RolloutRequest(**(values | changes))


@contextmanager
def serving(model: Any = None, **settings: Any) -> Iterator[tuple[str, ModelServer]]:
    server = ModelServer(model or Double(), ModelServerConfig(**settings), about={"device": "cpu"})
    port = server.open()
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{port}", server
    finally:
        server.stop()
        thread.join(10)
        assert not thread.is_alive()


def raw(address: str) -> socket.socket:
    host, port = parse_address(address, field="planner.server")
    return socket.create_connection((host, port), timeout=10)


def test_the_answers_are_those_of_the_model_itself_and_clients_share_rollouts() -> None:
    model = Double()
    with serving(model, wait_s=0.1) as (address, _):
        clients = [SocketWorldModel(address) for _ in range(6)]
        assert isinstance(clients[0], WorldModel) and clients[0].spec == model.spec
        assert clients[0].about == {"device": "cpu", "batch": 16, "pad": False}
        answers: list[Any] = [None] * 6

        def ask(place: int) -> None:
            features = FeatureRequest(taps=(1, 3), sigma=0.5)
            returns = frozenset({"frames", "features"})
            answers[place] = clients[place].rollout(
                a_request(20 + place, samples=2, returns=returns, features=features)
            )

        threads = [threading.Thread(target=ask, args=(place,)) for place in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        features = FeatureRequest(taps=(1, 3), sigma=0.5)
        for place, answer in enumerate(answers):
            request = a_request(20 + place, samples=2, returns=frozenset({"frames", "features"}), features=features)
            alone = Double().rollout(request)
            np.testing.assert_array_equal(answer.frames_BSVTHWC, alone.frames_BSVTHWC)
            np.testing.assert_array_equal(answer.features_BSKFhwD, alone.features_BSKFhwD)
            np.testing.assert_array_equal(answer.times_T, alone.times_T)
        assert max(model.sizes) >= 4, "several clients in one rollout"
        for client in clients:
            client.close()
        np.testing.assert_array_equal(  # a closed client connects again
            clients[0].rollout(a_request(3)).frames_BSVTHWC, Double().rollout(a_request(3)).frames_BSVTHWC
        )


def test_errors_arrive_as_what_they_were_and_the_connection_goes_on() -> None:
    with serving() as (address, _), SocketWorldModel(address) as client:
        with pytest.raises(MissingCapabilityError, match="horizon: got 9"):
            client.rollout(a_request(1, horizon=9))
        with pytest.raises(UserError, match="context_BVTHWC"):
            client.rollout(a_request(1, context_BVTHWC=np.zeros((1, 1, 1, H, W, 4), np.uint8)))
        with pytest.raises(RemoteFailureError, match="the seed is 7"):
            client.rollout(a_request(7))
        assert client.rollout(a_request(1)).frames_BSVTHWC is not None


def test_a_wrong_hello_is_refused_with_its_reason() -> None:
    with serving(token="right-" * 4) as (address, _):
        with pytest.raises(UserError, match="token"):
            SocketWorldModel(address, token="wrong")
        SocketWorldModel(address, token="right-" * 4).close()
        for change, field in (({"protocol": 99}, "protocol"), ({"hello": "physis env"}, "hello")):
            connection = Connection(raw(address), peer=address)
            connection.send(hello(SERVICE, "right-" * 4) | change)
            answer = connection.receive(idle_s=10)
            assert answer["ok"] is False and answer["error"]["field"] == field
            connection.close()
    with pytest.raises(UserError, match="token"):
        ModelServer(Double(), ModelServerConfig(host="0.0.0.0", token="short"))


def test_messages_that_are_too_large_or_damaged_end_their_connection_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving() as (address, server), SocketWorldModel(address) as good:
        for evil in (
            struct.pack(">4sI", b"PHW1", 2**31),  # announces two gigabytes
            struct.pack(">4sI", b"NOPE", 10) + b"x" * 10,
            struct.pack(">4sI", b"PHW1", 6) + b"\xc1" * 6,
        ):
            connection = Connection(raw(address), peer=address)
            connection.send(hello(SERVICE, ""))
            assert connection.receive(idle_s=10)["ok"] is True
            connection.socket.sendall(evil)
            answer = connection.receive(idle_s=10)
            assert answer["ok"] is False and answer["error"]["kind"] == "WireError"
            with pytest.raises(OSError):
                connection.receive(idle_s=10)
            connection.close()
        assert good.rollout(a_request(1)).frames_BSVTHWC is not None
        # Before the hello, not even four kilobytes are read.
        connection = Connection(raw(address), peer=address)
        connection.socket.sendall(struct.pack(">4sI", b"PHW1", 10_000))
        assert connection.receive(idle_s=10)["ok"] is False
        connection.close()
        generator = np.random.default_rng(0)
        for _ in range(60):
            sock = raw(address)
            sock.sendall(generator.bytes(int(generator.integers(1, 200))))
            sock.close()
        assert good.rollout(a_request(2)).frames_BSVTHWC is not None
        until = time.monotonic() + 10
        while len(server._connections) > 1 and time.monotonic() < until:
            time.sleep(0.01)
        assert len(server._connections) == 1, "the others gave their place back"


def test_whole_messages_with_the_wrong_content_are_refused_one_by_one() -> None:
    right = pack_request(a_request(1))
    wrong: list[Any] = [
        None,
        {},
        {k: v for k, v in right.items() if k != "goal_BVHWC"},
        right | {"more": 1},
        right | {"context_BVTHWC": [1, 2]},
        right | {"seeds_BS": np.zeros((1, 1))},
        right | {"seeds_BS": np.zeros((1, MOST_SAMPLES + 1), np.int64)},
        right | {"horizon": True},
        right | {"instructions": "press"},
        right | {"returns": [1]},
        right | {"features": {"taps": [1.5], "sigma": 1.0, "first_frame_mask": "correct"}},
        right | {"features": {"taps": [1]}},
        right | {"ids": [["task", "5", 0]]},
        right | {"plan_steps": [1.5]},
        right | {"plan_steps": 0},
    ]
    with serving() as (address, _):
        connection = Connection(raw(address), peer=address)
        connection.send(hello(SERVICE, ""))
        assert connection.receive(idle_s=10)["ok"] is True
        for request in wrong:
            connection.send({"op": "rollout", "request": request})
            answer = connection.receive(idle_s=10)
            assert answer["ok"] is False and answer["error"]["kind"] == "WireError", request
        connection.send({"op": "shutdown"})
        assert connection.receive(idle_s=10)["error"]["field"] == "op"
        connection.send({"op": "rollout", "request": right})
        assert connection.receive(idle_s=10)["ok"] is True
        connection.close()


def test_more_clients_than_places_are_told_so_and_silence_costs_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_server, "HELLO_S", 0.3)
    with serving(clients=1) as (address, _):
        silent = raw(address)
        with pytest.raises(UserError, match="more than 1 clients"):
            SocketWorldModel(address)
        assert silent.recv(1) == b"", "sent away"
        with connected(address) as client:
            with pytest.raises(UserError, match="more than 1 clients"):
                SocketWorldModel(address)
            assert client.rollout(a_request(1)).frames_BSVTHWC is not None
        silent.close()


def connected(address: str) -> SocketWorldModel:
    """A client, once the place of the one before is free."""
    for _ in range(200):
        try:
            return SocketWorldModel(address)
        except UserError:
            time.sleep(0.02)
    raise AssertionError("no place came free")


def test_what_travels_is_the_same_on_the_other_side() -> None:
    generator = np.random.default_rng(1)
    request = a_request(
        5,
        samples=3,
        proprioception_BKA=generator.normal(size=(1, 3, 14)).astype(np.float32),
        actions_BSPA=generator.normal(size=(1, 3, 32, 14)).astype(np.float32),
        goal_BVHWC=generator.integers(0, 255, (1, 1, H, W, 3)).astype(np.uint8),
        returns=frozenset({"features", "latents"}),
        features=FeatureRequest(taps=(2, 5), sigma=0.25, first_frame_mask="worldarena_compat"),
        ids=[("click_bell", 100_000, 3)],
        plan_steps=[32],
    )
    for value in (request, a_request(1)):
        back = unpack_request(_sent(pack_request(value)))
        for name in RolloutRequest.__dataclass_fields__:
            a, b = getattr(value, name), getattr(back, name)
            assert a == b if not isinstance(a, np.ndarray) else (a.dtype == b.dtype and (a == b).all()), name
    spec = WorldModelSpec(
        name="a",
        views=ViewLayout(names=("head", "wrist"), height=8, width=8, tiles=((0, 0, 4, 8), (4, 0, 4, 8))),
        context_frames=1,
        horizons=(9, 17),
        frame_dt=0.12,
        conditions=frozenset({"text", "actions"}),
        returns=frozenset({"frames"}),
        proprioception_lags=(0, 8),
        action_spec=ActionSpec(names=("a", "b"), low=(-1.0, 0.0), high=(1.0, 1.0)),
        blocks=6,
    )
    assert unpack_spec(_sent(pack_spec(spec))) == spec
    rollout = Rollout(times_T=np.arange(3.0), latents_BSCFhw=np.ones((1, 1, 2, 1, 2, 2), np.float32), cost={"s": 1.0})
    back_rollout = unpack_rollout(_sent(pack_rollout(rollout)))
    assert back_rollout.cost == {"s": 1.0} and (back_rollout.latents_BSCFhw == 1).all()
    for function, message in ((unpack_rollout, {"cost": {}}), (unpack_spec, {"name": "x"}), (unpack_spec, 3)):
        with pytest.raises(WireError):
            function(message)


def _sent(message: dict[str, Any]) -> Any:
    from physisforcing.core.wire import decode

    return decode(encode({"it": message}))["it"]


def test_addresses() -> None:
    assert parse_address("10.0.0.1:7000", field="f") == ("10.0.0.1", 7000) and parse_address("[::1]:80", field="f") == (
        "::1",
        80,
    )
    for text in ("auto", "host", "host:", ":80", "host:0", "host:70000", "host:x"):
        with pytest.raises(UserError, match=r"HOST:PORT"):
            parse_address(text, field="planner.server")
    began = time.monotonic()
    with pytest.raises(ServerLostError, match="no world-model server"):
        SocketWorldModel("127.0.0.1:1", connect_s=0.5)
    assert time.monotonic() - began < 5


# ---------------------------------------------------------------------- a process that dies


class Reader:
    """Test double: a decoder that moves joint 0."""

    fingerprint = "reader"
    needs = DecoderNeeds()

    def decode(self, rollout: Rollout, state_BA: Any, instructions: Any) -> Any:
        from physisforcing.core.types import ActionChunk

        return [[ActionChunk(actions_PA=np.full((32, 14), 0.5, np.float32))] for _ in state_BA]


class StillEnv:
    """Test double of a simulator: nothing ever happens in it."""

    task_name = "click_bell"

    def __init__(self) -> None:
        self.unwrapped, self.action_space = self, np.zeros(14)

    def _raw(self) -> dict[str, Any]:
        joints = np.zeros(14, np.float32)
        picture = np.zeros((H, W, 3), np.uint8)
        return {"head_rgb": picture, "state": joints, "state_measured": joints, "instruction": "press the bell"}

    def reset(self, *, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return self._raw(), {"scene_hash": "x", "step_limit": 64}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        return self._raw(), 0.0, False, False, {"is_success": False}


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The double in a process as ``physis eval plan planner.server=auto`` starts it."""
    from physisforcing.model_process import ModelProcess

    (tmp_path / "served_double.py").write_text(DOUBLE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    process = ModelProcess({"model": "served_double:make", "threads": 1}, restarts=1)
    try:
        yield process
    finally:
        process.stop()


def test_a_server_that_hangs_or_dies(served: Any) -> None:
    """Silence is given up. A death is survived once, in the middle of a request; after that it is the episode's error."""
    from physisforcing.envs.rollout import run_episode
    from physisforcing.planner.action_planner import ActionPlanner

    model = SocketWorldModel(served.address.address, token=served.address.token, connect_s=120)
    planner = ActionPlanner(model, Reader())
    assert run_episode(StillEnv(), planner, seed=1).status == "failure"

    model.reply_s = 1.0
    os.kill(served.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(ServerLostError, match="no answer in 1 s"):
        model.rollout(a_request(1))
    assert time.monotonic() - began < 10
    os.kill(served.pid, signal.SIGCONT)
    model.reply_s = 60.0
    assert model.rollout(a_request(1)).frames_BSVTHWC is not None

    first = served.pid
    timer = threading.Timer(0.5, os.kill, (first, signal.SIGKILL))
    timer.start()
    answer = model.rollout(a_request(8))  # takes seconds: the server is killed meanwhile
    np.testing.assert_array_equal(answer.frames_BSVTHWC, Double().rollout(a_request(8)).frames_BSVTHWC)
    assert served.pid != first

    os.kill(served.pid, signal.SIGKILL)  # it is not started a second time
    model.connect_s, began = 1.0, time.monotonic()
    result = run_episode(StillEnv(), planner, seed=3)
    assert result.status == "error" and "ServerLostError" in result.error
    assert time.monotonic() - began < 10


def test_another_model_at_the_same_address_is_refused() -> None:
    with serving() as (address, _):
        client = SocketWorldModel(address)
    with (
        serving(Double("another"), port=parse_address(address, field="planner.server")[1]),
        pytest.raises(UserError, match=r"planner\.server"),
    ):
        client.rollout(a_request(1))


# ---------------------------------------------------------------------- the end, with a rollout under way


def test_a_rollout_that_does_not_end_is_not_waited_for_beyond_the_grace_period() -> None:
    server = ModelServer(Double(max_batch=1), ModelServerConfig(grace_s=0.3))
    address = f"127.0.0.1:{server.open()}"
    said: list[tuple[str, float]] = []

    def ask(seed: int) -> None:
        try:
            SocketWorldModel(address, connect_s=0.5).rollout(a_request(seed))
        except Exception as error:
            said.append((type(error).__name__ + str(error), time.monotonic()))

    threads = [threading.Thread(target=ask, args=(seed,), daemon=True) for seed in (8, 9)]  # 8 takes three seconds
    threads[0].start()
    time.sleep(0.4)
    threads[1].start()
    until = time.monotonic() + 5
    while not server.batcher.waiting and time.monotonic() < until:
        time.sleep(0.01)
    begun = time.monotonic()
    assert server.close() is False and time.monotonic() - begun < 2.0
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert len(said) == 2 and all(when - begun < 3 for _, when in said)
    assert "closed before this request began" in said[0][0], "what waits is told at once"
    assert said[0][1] - begun < 1.0


def test_a_rollout_that_ends_in_time_is_answered() -> None:
    server = ModelServer(Double(), ModelServerConfig(grace_s=20.0))
    address = f"127.0.0.1:{server.open()}"
    made: list[Rollout] = []
    thread = threading.Thread(target=lambda: made.append(SocketWorldModel(address).rollout(a_request(8))), daemon=True)
    thread.start()
    time.sleep(0.5)
    assert server.close() is True
    thread.join(5)
    assert len(made) == 1 and made[0].frames_BSVTHWC is not None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_ends_though_its_model_is_slow(number: signal.Signals) -> None:
    model = "physisforcing.planner.service.toy:slow"  # thirty seconds a rollout
    command = [sys.executable, "-m", "physisforcing", "serve", "model", "--json", f"model={model}", "grace_s=0.5"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        client = SocketWorldModel(f"127.0.0.1:{ready['port']}", connect_s=1.0)
        spec, failed = client.spec, threading.Event()
        request = a_request(
            1,
            context_BVTHWC=np.zeros((1, 1, 1, spec.views.height, spec.views.width, 3), np.uint8),
            horizon=spec.horizons[0],
            proprioception_BKA=np.zeros((1, 2, 14), np.float32),
            actions_BSPA=np.zeros((1, 1, 8, 14), np.float32),
        )
        if "actions" not in spec.conditions:
            request.actions_BSPA = None

        def ask() -> None:
            try:
                client.rollout(request)
            except Exception:
                failed.set()

        threading.Thread(target=ask, daemon=True).start()
        time.sleep(0.7)
        assert not failed.is_set(), "the rollout is under way"
        begun = time.monotonic()
        process.send_signal(number)
        assert process.wait(10) == 0 and time.monotonic() - begun < 5
        assert failed.wait(5), "its client hears of it"
    finally:
        process.kill()
        process.wait()


def test_a_model_that_raises_system_exit_is_an_error_of_its_client() -> None:
    class GivesUp(Double):
        def rollout(self, request: Any) -> Any:
            raise SystemExit("enough")

    with serving(GivesUp()) as (address, _):
        for _ in range(2):
            with pytest.raises(RemoteFailureError, match="enough"):
                SocketWorldModel(address).rollout(a_request(1))
