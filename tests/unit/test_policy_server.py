"""A policy in another process: equal rows, common batches, errors as they were, hostile messages, deploy interfaces, the whole command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from physisforcing import deploy
from physisforcing.core.connection import Connection, hello
from physisforcing.core.errors import UserError
from physisforcing.core.message_client import ServerLostError
from physisforcing.core.message_server import MessageServerConfig
from physisforcing.core.protocols import Policy
from physisforcing.core.types import Observation
from physisforcing.core.wire import WireError
from physisforcing.policies import PolicySettings
from physisforcing.policy.act import ExecutionConfig, WorldActionPolicy
from physisforcing.policy.remote import LIMITS, SERVICE, PlanBatcher, PolicyServer, SocketChunks, remote_policy
from physisforcing.policy.requests import PlanAnswer, PlanRequest, PolicySpec
from physisforcing.policy_opening import open_policy
from tests.helpers.pico_policy import write_pico_policy

SPEC = PolicySpec(
    name="sums", canvas="head", size=(120, 160), lags=(0, 8), state_dim=14, action_dim=14, chunk=32, control_hz=50 / 3,
    fingerprint="sums",
)  # fmt: skip


class Sums:
    """Row i of a plan is the last state + seed mod 5 + i / 100. A sentence with "wrong" raises."""

    spec = SPEC

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def plan(self, request: PlanRequest) -> PlanAnswer:
        self.sizes.append(len(request.instructions))
        if any("wrong" in sentence for sentence in request.instructions):
            raise UserError("instruction", got="wrong", wanted="right", fix="say it right")
        ramp = np.arange(32, dtype=np.float32)[None, :, None] / 100
        rows = request.state_BKA[:, :1] + (request.seeds_B % 5).astype(np.float32)[:, None, None] + ramp
        return PlanAnswer(actions_BPA=rows.astype(np.float32), seconds={"steps": 0.5})


def a_request(seed: int, sentence: str = "press") -> PlanRequest:
    return PlanRequest(
        canvas_BHWC=np.zeros((1, 120, 160, 3), np.uint8), instructions=[sentence],
        state_BKA=np.full((1, 2, 14), seed / 7, np.float32), seeds_B=np.array([seed], np.int64),
    )  # fmt: skip


@contextmanager
def serving(source: Any = None, **settings: Any) -> Iterator[str]:
    server = PolicyServer(source or Sums(), MessageServerConfig(**settings), about={"device": "cpu"})
    port = server.open()
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop()
        thread.join(10)
        assert not thread.is_alive()


def observation(step: int, draw: np.random.Generator) -> Observation:
    picture = draw.integers(0, 256, (240, 320, 3), dtype=np.uint8)
    state = draw.normal(size=14).astype(np.float32)
    return Observation(images={"head": picture}, state_A=state, measured_A=state, instruction="press", step=step)


def test_clients_share_batches_and_get_their_own_rows() -> None:
    source = Sums()
    with serving(source, wait_s=0.2, batch=6) as address:
        clients = [SocketChunks(address) for _ in range(6)]
        assert clients[0].spec == SPEC and clients[0].about == {"device": "cpu", "batch": 6}
        answers: list[Any] = [None] * 6

        def ask(place: int) -> None:
            answers[place] = clients[place].plan(a_request(place))

        threads = [threading.Thread(target=ask, args=(place,)) for place in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        for place, answer in enumerate(answers):
            assert np.array_equal(answer.actions_BPA, Sums().plan(a_request(place)).actions_BPA)
        assert sum(source.sizes) == 6 and max(source.sizes) > 1
        assert max(answer.seconds["batched"] for answer in answers) == max(source.sizes)


def test_one_clients_mistake_is_its_own() -> None:
    with serving(wait_s=0.1) as address:
        right, wrong = SocketChunks(address), SocketChunks(address)
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(right.plan(a_request(3))))
        thread.start()
        with pytest.raises(UserError, match="say it right"):
            wrong.plan(a_request(1, "wrong"))
        thread.join(10)
        assert np.array_equal(found[0].actions_BPA, Sums().plan(a_request(3)).actions_BPA)
        misfit = a_request(1)
        misfit.state_BKA = misfit.state_BKA[:, :1]
        with pytest.raises(UserError, match="state_BKA"):
            wrong.plan(misfit)
        many = PlanRequest(
            canvas_BHWC=np.zeros((65, 120, 160, 3), np.uint8), instructions=["x"] * 65,
            state_BKA=np.zeros((65, 2, 14), np.float32), seeds_B=np.zeros(65, np.int64),
        )  # fmt: skip
        with pytest.raises(WireError, match="instructions"):
            wrong.plan(many)
        assert np.array_equal(wrong.plan(a_request(2)).actions_BPA, Sums().plan(a_request(2)).actions_BPA)


def test_strangers_and_damaged_messages_are_refused() -> None:
    with serving(token="a" * 20) as address:
        with pytest.raises(UserError, match="token"):
            SocketChunks(address, token="b" * 20)
        import socket

        host, port = address.split(":")
        connection = Connection(socket.create_connection((host, int(port)), timeout=10), peer=address, limits=LIMITS)
        connection.send(hello(SERVICE, "a" * 20))
        assert connection.receive(idle_s=10)["ok"] is True
        for message in (
            {"op": "rollout"},
            {"op": "plan", "request": {"canvas_BHWC": 3}},
            {"op": "plan", "request": None},
        ):
            connection.send(message)
            answer = connection.receive(idle_s=10)
            assert answer["ok"] is False and answer["error"]["kind"] == "WireError"
        connection.close()
    with pytest.raises(UserError, match="token"):
        PolicyServer(Sums(), MessageServerConfig(host="0.0.0.0"))
    with pytest.raises(ServerLostError, match="no policy server"):
        SocketChunks(address, connect_s=0.1)


def test_a_remote_policy_acts_as_the_one_here() -> None:
    here = WorldActionPolicy(Sums(), ExecutionConfig(execute=5))
    with serving() as address:
        there = remote_policy(address, ExecutionConfig(execute=5))
        assert isinstance(there, Policy) and there.fingerprint == here.fingerprint
        draw = [np.random.default_rng(0), np.random.default_rng(0)]
        for policy in (here, there):
            policy.reset(task="click_bell", seed=11, instruction="press the bell")
        for step in (0, 5, 10):
            rows = [policy.act(observation(step, own)) for policy, own in zip((here, there), draw, strict=True)]
            assert np.array_equal(*rows) and rows[0].shape == (5, 14)
        with pytest.raises(UserError, match=r"policy\.steps"):
            open_policy(PolicySettings(server=address, steps=4))
        assert open_policy(PolicySettings(server=address, execute=5)).fingerprint == here.fingerprint


def test_a_closed_batcher_refuses() -> None:
    batcher = PlanBatcher(Sums())
    assert np.array_equal(batcher.plan(a_request(4)).actions_BPA, Sums().plan(a_request(4)).actions_BPA)
    batcher.close()
    with pytest.raises(RuntimeError, match="the policy is closed"):
        batcher.plan(a_request(4))


def test_deploy_names_a_server_or_a_folder() -> None:
    with serving() as address:
        settings = {"task_name": "click_bell", "physis_policy": "world_action", "policy": {"server": address}}
        model = deploy.get_model(settings)
        deploy.reset_model(model)
        draw = np.random.default_rng(0)
        state = draw.normal(size=14)
        raw = {
            "observation": {"head_camera": {"rgb": draw.integers(0, 256, (240, 320, 3), dtype=np.uint8)}},
            "joint_action": {"vector": state},
        }
        taken: list[np.ndarray] = []
        env = SimpleNamespace(
            get_instruction=lambda: "press", take_action_cnt=0, eval_success=False, step_lim=400, seed=9,
            take_action=lambda action, action_type: taken.append(action),
        )  # fmt: skip
        deploy.eval(env, model, raw)
        assert len(taken) == 12
        np.testing.assert_allclose(np.diff([row[0] for row in taken]), 0.01, atol=1e-5)


def test_what_a_deployed_policy_cannot_be_is_refused_by_name() -> None:
    def make(**values: Any) -> Any:
        return deploy.make_policy({"physis_policy": "world_action", "policy": values})

    for given, what in (
        ({}, "policy: got '', wanted a source or a server"),
        ({"source": "policy_none"}, "policy: got 'policy_none'"),
        ({"sourse": "a"}, "did you mean 'source'"),
        ({"threads": 2, "server": "127.0.0.1:1"}, "policy: got 'threads'"),
        ({"server": "auto"}, r"policy\.server: got 'auto'.*physis serve policy"),
        ({"server": "here"}, r"policy\.server: got 'here', wanted HOST:PORT"),
        ({"source": "planner"}, "physis_policy: planner"),
        ({"source": "toy_policies:swaying", "server": "127.0.0.1:1"}, r"policy\.server.*no policy's folder"),
        ({"source": "toy_policies:swaying", "execution": "asinc"}, "did you mean 'async'"),
    ):
        with pytest.raises(UserError, match=what):
            make(**given)
    # what the server decides, also as it decides it: nothing here can say that it does
    usual = PolicySettings()
    for name in ("steps", "video_steps", "mode", "device", "compute", "autoencoder"):
        with pytest.raises(UserError, match=rf"policy\.{name}: .*the server decides it"):
            make(server="127.0.0.1:1", **{name: getattr(usual, name)})
    assert make(source="toy_policies:swaying", execute=3).rows == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_command_serves_a_folder_and_its_rows_are_those_of_the_folder(tmp_path) -> None:
    """A policy of the shipped world model, in a process of its own, over a socket, on a CPU: bit-equal to the policy loaded here."""
    folder = write_pico_policy(tmp_path / "pico")
    words = ["serve", "policy", f"policy={folder}", "threads=1", "steps=2", "--json"]
    process = subprocess.Popen([sys.executable, "-m", "physisforcing", *words], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["ok"] is True
        there = remote_policy(f"127.0.0.1:{ready['port']}")
        here = open_policy(PolicySettings(source=str(folder), steps=2))
        assert there.fingerprint == here.fingerprint and there.spec.lags == (0, 8, 16)
        draw = [np.random.default_rng(0), np.random.default_rng(0)]
        for policy in (here, there):
            policy.reset(task="click_bell", seed=1, instruction="press the bell")
        rows = [policy.act(observation(0, own)) for policy, own in zip((here, there), draw, strict=True)]
        assert np.array_equal(*rows) and rows[0].shape == (12, 14) and np.isfinite(rows[0]).all()
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
