"""One world model for many simulators over sockets: equal answers, errors as they were, hostile messages."""

from __future__ import annotations

import socket
import struct
import threading
import time
from typing import Any

import numpy as np
import pytest

from double_model import Double, H, W, a_request, serving
from physisforcing.core import message_server
from physisforcing.core.connection import Connection, RemoteFailureError, hello
from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.message_client import ServerLostError, parse_address
from physisforcing.core.protocols import WorldModel
from physisforcing.core.types import (
    ActionSpec,
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
