"""The world-model service as its clients see it: its own suite, other servers under the suite, the client, capacity and deadlines."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import http.server
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.protocols import WorldModel
from physisforcing.core.types import Rollout, RolloutRequest
from physisforcing.planner.service import server as server_module
from physisforcing.planner.service.client import HttpSettings, HttpWorldModel, ServiceError
from physisforcing.planner.service.conformance import Check, main, run_suite
from physisforcing.planner.service.http import Address, Reply, exchange
from physisforcing.planner.service.limits import ServiceLimits
from physisforcing.planner.service.probe import Probe, SuiteOptions
from physisforcing.planner.service.server import serving
from physisforcing.planner.service.toy import ToyWorldModel, text

LIMITS = ServiceLimits(max_request_bytes=2**20, max_concurrency=8, header_s=5.0, grace_s=2.0)
TOKEN = "0123456789abcdef0123"
FAST = HttpSettings(backoff_s=0.01, attempts=2)


def suite(url: str, **options: Any) -> dict[str, Check]:
    settings: dict[str, Any] = {"examples": 40, "timeout_s": 60, "clients": 8} | options
    return {check.name: check for check in run_suite(url, **settings)}


def told(found: dict[str, Check]) -> str:
    return "\n".join(f"{check.status} {check.name}: {check.words}" for check in found.values())


@pytest.mark.parametrize("driven", ["actions", "text"])
def test_the_suite_passes_under_eight_clients(driven: str) -> None:
    model = ToyWorldModel(seconds=0.02) if driven == "actions" else dataclasses.replace(text(), seconds=0.02)
    token = TOKEN if driven == "text" else ""
    with serving(model, LIMITS, token=token) as url:
        found = suite(url, token=token)
    skipped = {name for name, check in found.items() if check.status == "skipped"}
    assert all(check.status != "fail" for check in found.values()), told(found)
    assert skipped == ({"authentication", "needs actions"} if driven == "actions" else set()), told(found)
    assert "429" in found["overload"].words and "8 clients" in found["many clients"].words
    assert model.largest >= 2  # requests of several clients were computed together


def test_the_suite_passes_with_the_shipped_model_and_no_file_is_written(written: list[str]) -> None:
    from physisforcing.core.paths import weights_root
    from physisforcing.worldmodel.model import load_world_model
    from physisforcing.worldmodel.text import TextEmbedder

    def load() -> WorldModel:
        folder = weights_root()
        model = load_world_model(folder / "worldmodel", codec=folder / "vae", steps=1, text=TextEmbedder(store=False))
        model.text.tokens("the encoder is loaded")
        return model

    with serving(load, ServiceLimits(max_batch_size=2)) as url:
        written.clear()
        found = suite(
            url, only=["determinism", "idempotency", "wrong fields", "wrong pictures", "needs actions"], timeout_s=0
        )
        assert all(check.status == "pass" for check in found.values()), told(found)
        assert written == []
        spec = HttpWorldModel(url).spec
        assert spec.horizons == (17,) and spec.proprioception_lags == (0, 8, 16)


@pytest.fixture
def written() -> Iterator[list[str]]:
    """Files that this process opens for writing, or makes, moves or removes, while the test runs."""
    found: list[str] = []
    watching = [True]

    def hook(event: str, arguments: tuple) -> None:  # a hook stays until the process ends
        if watching and event == "open" and isinstance(arguments[2], int):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and arguments[0] != os.devnull:
                found.append(str(arguments[0]))
        elif watching and event in ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink"):
            found.append(str(arguments[0]))

    sys.addaudithook(hook)
    yield found
    watching.clear()


def test_the_command_says_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(text(), LIMITS) as url:
        assert main([url, "--only", "wrong versions", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [check["name"] for check in found["checks"]] == ["capabilities", "wrong versions"] and found["pass"] == 2
        with pytest.raises(UserError, match="determinism"):
            main([url, "--only", "determinsm"])
    assert main([url, "--only", "health", "--timeout", "2"]) == 1  # nobody is there any more
    assert "fail" in capsys.readouterr().out
    assert main(["--list"]) == 0 and "many clients" in capsys.readouterr().out


# ---------------------------------------------------------------------- servers that do not keep the contract


class Spoiled(ToyWorldModel):
    """A toy whose frames are spoiled by ``spoil(frames, count of calls)``."""

    spoil: Callable[[np.ndarray, int], np.ndarray]

    def rollout(self, request: RolloutRequest) -> Rollout:
        found = ToyWorldModel.rollout(self, request)
        found.frames_BSVTHWC = type(self).spoil(found.frames_BSVTHWC, self.rollouts)
        return found


def spoiled(spoil: Callable[[Any, int], Any]) -> ToyWorldModel:
    return type("Spoiled", (Spoiled,), {"spoil": staticmethod(spoil)})()


def test_the_suite_finds_a_model_that_depends_on_its_batch_or_on_its_past() -> None:
    def by_batch(frames: np.ndarray, _: int) -> np.ndarray:
        return frames + np.uint8(len(frames))

    def by_place(frames: np.ndarray, _: int) -> np.ndarray:
        return frames + np.arange(len(frames), dtype=np.uint8).reshape(-1, 1, 1, 1, 1, 1, 1)

    def by_past(frames: np.ndarray, count: int) -> np.ndarray:
        return frames + np.uint8(count)

    for spoil, name, words in (
        (by_batch, "determinism", "in a batch"),
        (by_place, "determinism", "another order of the batch"),
        (by_past, "no session", "in between"),
        (by_past, "determinism", "second request"),
    ):
        with serving(spoiled(spoil), LIMITS) as url:
            found = suite(url, only=[name])
        assert found[name].status == "fail" and words in found[name].words, told(found)


class Careless(http.server.BaseHTTPRequestHandler):
    """Says yes to health and capabilities, and answers every prediction with a traceback."""

    manifest = b""
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        ready = b'{"status": "ready", "api_version": "1.0", "model_version": "x"}'
        self._say(200, ready if self.path.endswith("health") else self.manifest)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._say(500, b'Traceback (most recent call last):\n  File "/srv/me/server.py", line 3')

    def _say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def careless() -> Iterator[str]:
    profile = {
        "profile_id": "official-profile",
        "image": {"encoding": "png_base64", "color_space": "RGB", "height": 16, "width": 16, "channels": 3},
        "context_frames": {"min": 1, "max": 8},
        "prediction_frames": {"min": 1, "max": 16},
        "action": {"dtype": "float32", "dimension": 14, "representation": "profile_canonical"},
        "state": {"supported": False, "dimension": None},
        "instruction": {"supported": True},
    }
    limits = {"max_batch_size": 2, "max_request_bytes": 10**6, "max_concurrency": 2, "recommended_timeout_ms": 5000}
    manifest = {"api_version": "1.0", "model_version": "x", "profiles": [profile], "limits": limits}
    manifest["determinism"] = {"seed_supported": True, "same_seed_same_pixels": True}
    Careless.manifest = json.dumps(manifest).encode()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Careless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_the_suite_judges_a_server_that_is_not_ours(careless: str) -> None:
    names = ["health", "single sample", "wrong fields", "bad documents", "byte fuzzing", "no leaks"]
    found = suite(careless, only=names, examples=5)
    assert {name: check.status for name, check in found.items()} == {
        "health": "pass", "capabilities": "pass", "single sample": "fail", "wrong fields": "fail",
        "bad documents": "fail", "byte fuzzing": "fail", "no leaks": "fail",
    }, told(found)  # fmt: skip
    assert "500" in found["single sample"].words and "Traceback" in found["no leaks"].words
    client = HttpWorldModel(careless, settings=FAST)
    with pytest.raises(ServiceError) as caught:
        client.rollout(request_for(client, np.random.default_rng(0)))
    assert (caught.value.status, caught.value.code) == (500, "BAD_REPLY")


# ---------------------------------------------------------------------- the client


def request_for(model: WorldModel, random: np.random.Generator, batch: int = 1, samples: int = 1) -> RolloutRequest:
    spec = model.spec
    rows = round((spec.horizons[0] - 1) * spec.frame_dt / spec.action_spec.dt) if spec.action_spec else 0
    lags = len(spec.proprioception_lags)
    shape = (batch, 1, 1, spec.views.height, spec.views.width, 3)
    return RolloutRequest(
        context_BVTHWC=random.integers(0, 256, shape, dtype=np.uint8),
        instructions=[f"do {i}" for i in range(batch)],
        seeds_BS=random.integers(0, 2**62, (batch, samples)),
        horizon=spec.horizons[0],
        proprioception_BKA=random.normal(size=(batch, lags, 14)).astype(np.float32) if lags else None,
        actions_BSPA=random.normal(size=(batch, samples, rows, 14)).astype(np.float32) if rows else None,
    )


@pytest.mark.parametrize("driven", ["actions", "text"])
def test_a_model_over_http_is_the_model(driven: str) -> None:
    model = ToyWorldModel() if driven == "actions" else text()
    with serving(model, dataclasses.replace(LIMITS, max_batch_size=4), token=TOKEN) as url:
        client = HttpWorldModel(url, token=TOKEN)
        assert isinstance(client, WorldModel) and client.health() == "ready"
        assert client.spec == dataclasses.replace(model.spec, max_batch=4)
        request = request_for(model, np.random.default_rng(1), batch=3, samples=2)  # six samples: two requests
        here, there = model.rollout(request), client.rollout(request)
        assert np.array_equal(here.frames_BSVTHWC, there.frames_BSVTHWC)
        assert np.array_equal(here.times_T, there.times_T) and there.cost["server_seconds"] > 0
        for wrong, error in (
            ({"horizon": 9}, MissingCapabilityError),
            ({"returns": frozenset({"latents"})}, MissingCapabilityError),
            ({"instructions": []}, UserError),
        ):
            with pytest.raises(error):
                client.rollout(dataclasses.replace(request, **wrong))
        with pytest.raises(UserError, match="token"):
            HttpWorldModel(url, token="another")


def test_a_model_of_another_version_is_not_mistaken() -> None:
    with serving(text(), LIMITS) as url:
        client = HttpWorldModel(url)
        client.capabilities.model_version = "toy-older"
        with pytest.raises(UserError, match="connect again"):
            client.rollout(request_for(client, np.random.default_rng(0)))


def test_nobody_there_is_said_quickly() -> None:
    begun = time.monotonic()
    with pytest.raises(ServiceError) as caught:
        HttpWorldModel("http://127.0.0.1:9", settings=FAST)
    assert caught.value.code == "NO_REPLY" and caught.value.retryable and time.monotonic() - begun < 5
    for url in ("ftp://x", "127.0.0.1:80", "http://", "http://a:b", "http://u@h", "http://h/?q"):
        with pytest.raises(UserError, match="url"):
            Address.of(url)
    assert Address.of("https://h/wm/") == Address(scheme="https", host="h", port=443, prefix="/wm")


def test_an_overloaded_server_is_asked_again_as_it_wishes() -> None:
    with serving(
        dataclasses.replace(text(), seconds=0.3), dataclasses.replace(LIMITS, max_concurrency=1), batch=1
    ) as url:
        patient = HttpWorldModel(url, settings=HttpSettings(attempts=12, longest_wait_s=0.2))
        hasty = HttpWorldModel(url, settings=HttpSettings(attempts=1))
        requests = [request_for(patient, np.random.default_rng(i)) for i in range(4)]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert len(list(pool.map(patient.rollout, requests))) == 4
            running = pool.submit(patient.rollout, request_for(patient, np.random.default_rng(9)))
            time.sleep(0.1)
            with pytest.raises(ServiceError) as caught:
                hasty.rollout(requests[0])
            running.result()
    assert (caught.value.status, caught.value.code) == (429, "OVERLOADED")


# ---------------------------------------------------------------------- deadlines, failures, beginning and end


def post(url: str, body: dict[str, Any]) -> Reply:
    headers = {"content-type": "application/json"}
    return exchange(Address.of(url), "POST", "/v1/predict", json.dumps(body).encode(), headers, timeout_s=20)


def probed(url: str) -> Probe:
    """Makes valid requests."""
    probe = Probe(address=Address.of(url), token="", options=SuiteOptions())
    probe.capabilities = HttpWorldModel(url).capabilities
    return probe


def test_a_deadline_is_kept_and_the_answer_is_there_for_a_retry() -> None:
    model = dataclasses.replace(text(), seconds=1.0)
    with serving(model, dataclasses.replace(LIMITS, deadline_s=0.3)) as url:
        request = probed(url).request()
        begun = time.monotonic()
        reply = post(url, request)
        error = json.loads(reply.body)["error"]
        assert (reply.status, error["code"], error["retryable"]) == (504, "DEADLINE_EXCEEDED", True)
        assert error["request_id"] == request["request_id"] and time.monotonic() - begun < 0.9
        assert HttpWorldModel(url).health() == "degraded"
        deadline = time.monotonic() + 10
        while (again := post(url, request)).status == 504 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert again.status == 200 and model.rollouts == 1  # computed once
        while (health := HttpWorldModel(url).health()) != "ready" and time.monotonic() < deadline:
            time.sleep(0.05)  # the answer is there a moment before its thread is free
        assert health == "ready"


def test_a_model_that_fails_is_an_internal_error_without_its_words() -> None:
    def boom(frames: np.ndarray, count: int) -> np.ndarray:
        if count % 2:
            raise RuntimeError("secret path /srv/me/weights")
        return frames

    def gives_up(frames: np.ndarray, _: int) -> np.ndarray:
        raise SystemExit("secret path /srv/me/weights")

    def wrong(frames: np.ndarray, _: int) -> np.ndarray:
        raise UserError("codec", got="/srv/me", wanted="another", fix="x")

    with serving(spoiled(boom), LIMITS) as url:
        request = probed(url).request()
        reply = post(url, request)
        assert reply.status == 500 and b"secret" not in reply.body and b"INTERNAL" in reply.body
        assert post(url, request).status == 200  # a failure is not remembered
    with serving(spoiled(gives_up), LIMITS) as url:
        for _ in range(2):
            reply = post(url, probed(url).request())
            error = json.loads(reply.body)["error"]
            assert (reply.status, error["code"], error["retryable"]) == (500, "INTERNAL", True), reply.body
            assert b"secret" not in reply.body
    with serving(spoiled(wrong), LIMITS) as url:
        reply = post(url, probed(url).request())
        assert reply.status == 400 and b"/srv" not in reply.body and b"codec" in reply.body


def test_a_server_that_loads_says_so_and_one_that_cannot_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    let_go = threading.Event()

    def slow() -> WorldModel:
        let_go.wait(10)
        return text()

    def ask(url: str, path: str) -> Reply:
        return exchange(Address.of(url), "GET", path, timeout_s=5)

    seen: dict[str, Reply] = {}

    def watch(url: str) -> None:
        seen["health"], seen["capabilities"] = ask(url, "/v1/health"), ask(url, "/v1/capabilities")
        seen["predict"] = post(url, {})
        let_go.set()

    def noted(host: str, number: int) -> Any:
        sock = listen(host, number)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        threading.Thread(target=watch, args=(url,), daemon=True).start()
        return sock

    listen = server_module.listen
    monkeypatch.setattr(server_module, "listen", noted)
    with serving(slow, LIMITS) as url:
        assert ask(url, "/v1/capabilities").status == 200
    monkeypatch.undo()
    assert json.loads(seen["health"].body)["status"] == "starting" and seen["health"].status == 200
    for name in ("capabilities", "predict"):
        assert seen[name].status == 503 and b"NOT_READY" in seen[name].body and "retry-after" in seen[name].headers

    def broken() -> WorldModel:
        raise UserError("codec", got=1, wanted=2, fix="x")

    with pytest.raises(UserError, match="codec"):
        with serving(broken, LIMITS):
            raise AssertionError("it does not start")


def test_the_end_waits_for_what_is_under_way_and_for_no_longer() -> None:
    with serving(dataclasses.replace(text(), seconds=0.5), LIMITS) as url:
        request = probed(url).request()
        pool = concurrent.futures.ThreadPoolExecutor(1)
        running = pool.submit(post, url, request)
        time.sleep(0.2)
    assert running.result().status == 200
    begun = time.monotonic()
    with serving(dataclasses.replace(text(), seconds=30), dataclasses.replace(LIMITS, grace_s=0.5)) as url:
        running = pool.submit(post, url, probed(url).request())
        time.sleep(0.2)
    assert time.monotonic() - begun < 10
    assert running.result().status == 503
    pool.shutdown()
