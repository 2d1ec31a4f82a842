"""A world model's server that hangs, dies, is told to end, or whose model is slow or gives up: what its clients hear, and when."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import double_model
from double_model import Double, H, W, a_request, serving
from physisforcing.core.connection import RemoteFailureError
from physisforcing.core.errors import UserError
from physisforcing.core.message_client import ServerLostError, parse_address
from physisforcing.core.types import (
    DecoderNeeds,
    Rollout,
)
from physisforcing.planner.model_client import SocketWorldModel
from physisforcing.planner.model_server import ModelServer, ModelServerConfig

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
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The double in a process as ``physis eval plan planner.server=auto`` starts it."""
    from physisforcing.model_process import ModelProcess

    here = Path(double_model.__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{here}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    process = ModelProcess({"model": "double_model:make", "threads": 1}, restarts=1)
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
