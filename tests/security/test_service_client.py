"""The client of a world-model service against hostile servers: manifests, answers, and who gets the token."""

from __future__ import annotations

import contextlib
import copy
import http.client
import http.server
import json
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from physisforcing.core.connection import TOKEN_VARIABLE
from physisforcing.core.errors import UserError
from physisforcing.core.types import RolloutRequest
from physisforcing.planner.service import conformance
from physisforcing.planner.service.client import HttpSettings, HttpWorldModel, ServiceError
from physisforcing.planner.service.conformance import run_suite
from physisforcing.planner.service.http import Address, exchange, token_for
from physisforcing.planner.service.limits import ServiceLimits
from physisforcing.planner.service.offers import capabilities_of, offers_of
from physisforcing.planner.service.pictures import encode_png
from physisforcing.planner.service.toy import ToyWorldModel, text

FAST = HttpSettings(attempts=1, timeout_s=5.0)
Answer = Callable[[str, bytes], bytes]


@contextlib.contextmanager
def answering(answer: Answer) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server that says what ``answer(path, body)`` gives -> (its address, the headers of what it was asked)."""
    seen: list[dict[str, str]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append({name.lower(): value for name, value in self.headers.items()})
            body = answer(self.path, self.rfile.read(int(self.headers.get("content-length", 0))))
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *words: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def manifest(model: ToyWorldModel | None = None) -> dict[str, Any]:
    """What an honest server says."""
    spec = (model or ToyWorldModel()).spec
    return json.loads(capabilities_of(spec, offers_of(spec, 14), ServiceLimits()).model_dump_json())


def health(found: dict[str, Any]) -> bytes:
    return json.dumps({"status": "ready", "api_version": "1.0", "model_version": found["model_version"]}).encode()


def changed(path: str, value: Any) -> dict[str, Any]:
    """The honest manifest with one field changed; ``-``: without what is ours."""
    found = manifest()
    if path.startswith("-"):
        found["world_model"], path = None, path[1:]
    at: Any = found
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in way:
        at = at[part]
    at[last] = value
    return found


HUGE = 10**9
HOSTILE = [
    ("profiles.0.prediction_frames.max", HUGE),
    ("-profiles.0.prediction_frames.max", HUGE),
    ("profiles.0.prediction_frames.min", 10),
    ("profiles.0.context_frames.max", HUGE),
    ("profiles.0.action.dimension", HUGE),
    ("-profiles.0.action.dimension", HUGE),
    ("-profiles.0.action.dimension", None),
    ("profiles.0.action.rows_per_frame", HUGE),
    ("profiles.0.state.dimension", HUGE),
    ("profiles.0.image.height", 200_000),
    ("-profiles.0.image.width", 200_000),
    ("profiles.0.image", manifest()["profiles"][0]["image"] | {"height": 8000, "width": 8000, "pad": 1}),
    ("profiles.0.profile_id", "x" * 10_000),
    ("limits.recommended_timeout_ms", 10**18),
    ("limits.max_batch_size", 10**18),
    ("model_version", "v" * 10_000),
    ("world_model.tiles", [[0, 0, 24]]),
    ("world_model.tiles", [[0, 0, 200_000, 200_000]]),
    ("world_model.tiles", [[0, 0, 24, 16], [0, 16, 24, 16]]),
    ("world_model.tiles", [[-5, 0, 24, 32]]),
    ("world_model.views", []),
    ("world_model.views", ["a"] * 1000),
    ("world_model.frame_dt", -1.0),
    ("world_model.frame_dt", 0.0),
    ("world_model.frame_dt", 1e300),
    ("world_model.frame_dt", 0.09),
    ("world_model.horizons", [-5]),
    ("world_model.horizons", [HUGE]),
    ("world_model.horizons", [5, 5]),
    ("world_model.horizons", []),
    ("world_model.context_frames", 0),
    ("world_model.context_frames", HUGE),
    ("world_model.conditions", ["actions", "mind"]),
    ("world_model.proprioception_lags", [-1]),
    ("world_model.proprioception_lags", [0] * 10_000),
    ("world_model.action.names", ["j"] * 100_000),
    ("world_model.action.low", [0.0]),
    ("world_model.action.dt", 0.0),
    ("world_model.action.dt", 1e-300),
    ("world_model.action", None),
    ("world_model.fingerprint", ""),
    ("world_model.name", ""),
]


@pytest.mark.parametrize(("path", "value"), HOSTILE, ids=[f"{p}={str(v)[:24]}" for p, v in HOSTILE])
def test_a_manifest_out_of_bounds_is_a_bad_reply(path: str, value: Any) -> None:
    found = changed(path, value)
    if path == "profiles.0.image":  # each side fine, all frames together 10 GB
        found["profiles"][0]["prediction_frames"]["max"] = 64
    body = json.dumps(found).encode()
    tracemalloc.start()
    begun = time.monotonic()
    try:
        with answering(lambda path, sent: body) as (url, _), pytest.raises(ServiceError) as caught:
            HttpWorldModel(url, settings=FAST)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.code == "BAD_REPLY" and not caught.value.retryable
    assert most < 64 * 2**20 and time.monotonic() - begun < 4
    assert len(str(caught.value)) < 2000


def test_a_sound_manifest_is_taken() -> None:
    for found in (manifest(), manifest(text()), manifest() | {"world_model": None}):
        body = json.dumps(found).encode()
        with answering(lambda path, sent, body=body: body) as (url, _):
            assert HttpWorldModel(url, settings=FAST).spec.views.height == 24


def test_an_answer_that_closes_itself_with_its_last_byte_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of Python 3.13 do, whichever Python this is."""
    read1 = http.client.HTTPResponse.read1

    def closing(response: http.client.HTTPResponse, size: int = -1) -> bytes:
        part = read1(response, size)
        if response.length == 0 and response.fp is not None:
            response._close_conn()  # type: ignore[attr-defined]
        return part

    monkeypatch.setattr(http.client.HTTPResponse, "read1", closing)
    with answering(lambda path, sent: b"x" * 2**19) as (url, _):
        reply = exchange(Address.of(url), "GET", "/", timeout_s=5.0)
    assert reply.status == 200 and reply.body == b"x" * 2**19


def test_a_manifest_of_many_bytes_is_not_read() -> None:
    body = json.dumps(manifest() | {"more": "x" * 2**22}).encode()
    with answering(lambda path, sent: body) as (url, _), pytest.raises(ServiceError, match="larger than") as caught:
        HttpWorldModel(url, settings=HttpSettings(attempts=3, backoff_s=5.0))
    assert caught.value.code == "BAD_REPLY"


def test_the_suite_says_what_is_out_of_bounds_and_makes_no_such_picture() -> None:
    found = changed("profiles.0.image.height", 200_000)
    body = json.dumps(found).encode()
    with answering(lambda path, sent: health(found) if path.endswith("health") else body) as (url, _):
        checks = {check.name: check for check in run_suite(url, only=["single sample"], timeout_s=5)}
    assert checks["capabilities"].status == "fail" and "200000" in checks["capabilities"].words
    assert checks["single sample"].status == "skipped"


def predicting(spoil: Callable[[dict[str, Any]], None]) -> Answer:
    """A server that answers as it should, but for what ``spoil`` does to its prediction."""
    found = manifest(text())
    data = encode_png(np.zeros((24, 32, 3), np.uint8))
    image = found["profiles"][0]["image"] | {"data": data}

    def answer(path: str, body: bytes) -> bytes:
        if not path.endswith("predict"):
            return health(found) if path.endswith("health") else json.dumps(found).encode()
        asked = json.loads(body)
        predictions = [{"sample_id": s["sample_id"], "frames": [image] * s["horizon"]} for s in asked["samples"]]
        reply = {"api_version": "1.0", "request_id": asked["request_id"], "model_version": asked["model_version"]}
        reply["predictions"] = copy.deepcopy(predictions)
        spoil(reply)
        return json.dumps(reply).encode()

    return answer


def asked(model: HttpWorldModel) -> RolloutRequest:
    spec = model.spec
    return RolloutRequest(
        context_BVTHWC=np.zeros((1, 1, 1, spec.views.height, spec.views.width, 3), np.uint8),
        instructions=["go"],
        seeds_BS=np.zeros((1, 1), np.int64),
        horizon=spec.horizons[0],
        proprioception_BKA=np.zeros((1, len(spec.proprioception_lags), 14), np.float32),
    )


def test_an_answer_with_more_than_was_asked_for_is_refused_unread() -> None:
    def flood(reply: dict[str, Any]) -> None:
        reply["predictions"][0]["frames"] *= 1000

    def stuffed(reply: dict[str, Any]) -> None:
        reply["more"] = "x" * 4 * 2**20

    with answering(predicting(lambda reply: None)) as (url, _):
        model = HttpWorldModel(url, settings=FAST)
        assert model.rollout(asked(model)).frames_BSVTHWC.shape == (1, 1, 1, 5, 24, 32, 3)
    for spoil in (flood, stuffed):
        with answering(predicting(spoil)) as (url, _):
            model = HttpWorldModel(url, settings=FAST)
            with pytest.raises(ServiceError) as caught:
                model.rollout(asked(model))
        assert caught.value.code == "BAD_REPLY"


def test_health_that_is_none_is_a_bad_reply() -> None:
    body = json.dumps(manifest()).encode()
    with answering(lambda path, sent: b"[1]" if path.endswith("health") else body) as (url, _):
        model = HttpWorldModel(url, settings=FAST)
        with pytest.raises(ServiceError) as caught:
            model.health()
    assert caught.value.code == "BAD_REPLY"


# ---------------------------------------------------------------------- the token

SECRET = "0123456789abcdef0123"


def test_the_variables_token_goes_to_this_machine_and_over_https_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, SECRET)
    for url in (
        "http://127.0.0.1:1",
        "http://localhost:1",
        "http://[::1]:1",
        "http://127.9.9.9:1",
        "https://wm.example",
    ):
        assert token_for(Address.of(url), None, TOKEN_VARIABLE) == SECRET
    for url in ("http://wm.example", "http://10.0.0.7:8080", "http://127.0.0.1.wm.example", "http://[fe80::1]:1"):
        with pytest.raises(UserError, match="SSH tunnel") as caught:
            token_for(Address.of(url), None, TOKEN_VARIABLE)
        assert SECRET not in str(caught.value)
        assert token_for(Address.of(url), "for this one", TOKEN_VARIABLE) == "for this one"
        assert token_for(Address.of(url), "", TOKEN_VARIABLE) == ""
        with pytest.raises(UserError, match=TOKEN_VARIABLE):
            HttpWorldModel(url, settings=FAST)
        with pytest.raises(UserError, match=TOKEN_VARIABLE):
            conformance.main([url, "--only", "health", "--timeout", "0.2"])
    monkeypatch.delenv(TOKEN_VARIABLE)
    assert token_for(Address.of("http://wm.example"), None, TOKEN_VARIABLE) == ""


def test_the_local_server_gets_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, SECRET)
    body = json.dumps(manifest()).encode()
    with answering(lambda path, sent: body) as (url, seen):
        HttpWorldModel(url, settings=FAST)
        HttpWorldModel(url, token="", settings=FAST)
    assert [headers.get("authorization") for headers in seen] == [f"Bearer {SECRET}", None]
