"""Conformance: many clients at once, more than the server has room for, clients that leave, and bytes that are no HTTP."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import socket
import ssl
import time
from typing import Any

import numpy as np

from .http import Reply
from .probe import FailedError, Probe, SkippedError, expect, same_frames, typed_error


def many_clients(probe: Probe) -> str:
    """``options.clients`` clients at once, several requests each: every answer is that of the request alone."""
    clients, rounds = probe.options.clients, probe.options.rounds
    same = probe.manifest.determinism.same_seed_same_pixels
    count = min(2, probe.batch)
    alone = [probe.predict(probe.request(count, first_seed=1000 + i)) for i in range(clients)] if same else []

    def client(index: int) -> None:
        for turn in range(rounds):
            number = (index + turn) % clients
            found = probe.predict(probe.request(count, first_seed=1000 + number))
            if same:
                expect(same_frames(found, alone[number]), f"client {index} got other pixels than a client alone")

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        for done in [pool.submit(client, index) for index in range(clients)]:
            done.result()
    checked = "all as alone" if same else "all complete; pixels not compared, the manifest does not promise them"
    return f"{clients} clients, {rounds} requests of {count} samples each: {checked}"


def declared_concurrency(probe: Probe) -> str:
    """As many requests at once as declared: none is refused."""
    count = min(probe.manifest.limits.max_concurrency, 32)
    replies = _at_once(probe, [probe.request(first_seed=2000 + i) for i in range(count)])
    refused = sum(reply.status != 200 for reply, _ in replies)
    expect(not refused, f"{refused} of {count} requests at once were refused, declared are {count}")
    for reply, request in replies:
        probe.frames(reply, request)
    return f"{count} at once, all answered"


def overload(probe: Probe) -> str:
    """Far more requests at once than declared: each is answered or gets a typed 429, and afterwards all is as before."""
    declared = probe.manifest.limits.max_concurrency
    count = min(3 * declared + 5, 200)
    begun = time.monotonic()
    replies = _at_once(probe, [probe.request(first_seed=3000 + i) for i in range(count)])
    seconds = time.monotonic() - begun
    refused = [reply for reply, _ in replies if reply.status != 200]
    for reply in refused:
        found = typed_error(reply, 429, code="OVERLOADED")
        expect(found.retryable, "429 is not marked retryable")
        asked = reply.headers.get("retry-after")
        expect(asked is None or asked.isdecimal(), f"Retry-After is {asked!r}, wanted seconds")
    for reply, request in replies:
        if reply.status == 200:
            probe.frames(reply, request)
    probe.predict(probe.request(first_seed=3000))
    if not refused:
        raise SkippedError(f"{count} requests at once ({declared} declared) were all answered in {seconds:.1f} s")
    return f"{count} at once: {count - len(refused)} answered, {len(refused)} got 429"


def leaving_clients(probe: Probe) -> str:
    """Clients that leave in the middle of their request, or before its answer, disturb nobody."""
    reference = probe.predict(probe.request(first_seed=4000))
    body = json.dumps(probe.request(first_seed=4001)).encode()
    head = _head(probe, len(body))
    for sent in (head[: len(head) // 2], head, head + body[: len(body) // 2], head + body):
        with _raw(probe) as sock:
            sock.sendall(sent)
    found = probe.predict(probe.request(first_seed=4000))
    if probe.manifest.determinism.same_seed_same_pixels:
        expect(same_frames(reference, found), "a client that left changed another one's pixels")
    return "gone in the head, before and in the body, and before the answer"


def no_http(probe: Probe) -> str:
    """Random bytes on the connection: refused or cut, and the next client is answered."""
    random = np.random.default_rng([probe.options.seed, 5])
    for _ in range(20):
        junk = random.integers(0, 256, int(random.integers(1, 2000)), dtype=np.uint8).tobytes() + b"\r\n\r\n"
        answer = _say(probe, junk)
        if answer:
            expect((answer.split(b" ") + [b""])[1][:1] == b"4", f"random bytes were answered with {answer[:60]!r}")
    for line in (
        b"GET / HTTP/9.9",
        b"GET /v1/health HTTP/1.1\r\nHost: a\r\nHost: b",
        b"G" * 70_000,
        b"GET \xff HTTP/1.1",
    ):
        answer = _say(probe, line + b"\r\n\r\n")
        expect(
            not answer or (answer.split(b" ") + [b""])[1][:1] in (b"4", b"5"),
            f"{line[:30]!r} was answered with {answer[:60]!r}",
        )
    reply = probe.ask("GET", "/v1/health")
    expect(reply.status == 200, f"health says {reply.status} afterwards")
    return "20 times random bytes and 4 broken heads: refused or cut, health is well"


def _at_once(probe: Probe, requests: list[dict[str, Any]]) -> list[tuple[Reply, dict[str, Any]]]:
    bodies = [json.dumps(request).encode() for request in requests]
    with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
        replies = list(pool.map(lambda body: probe.ask("POST", "/v1/predict", body), bodies))
    return list(zip(replies, requests, strict=True))


def _head(probe: Probe, length: int) -> bytes:
    address = probe.address
    lines = [
        f"POST {address.prefix}/v1/predict HTTP/1.1",
        f"Host: {address.host}:{address.port}",
        "Content-Type: application/json",
        f"Content-Length: {length}",
    ]
    if probe.token:
        lines.append(f"Authorization: Bearer {probe.token}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


@contextlib.contextmanager
def _raw(probe: Probe) -> Any:
    address = probe.address
    try:
        sock = socket.create_connection((address.host, address.port), timeout=10)
        if address.scheme == "https":
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=address.host)
    except OSError as error:
        raise FailedError(f"no connection: {error}") from error
    with sock:
        yield sock


def _say(probe: Probe, data: bytes) -> bytes:
    """What the server answers to raw bytes before it closes; ``FailedError`` when it does neither in time."""
    with _raw(probe) as sock:
        sock.settimeout(min(probe.timeout_s, 40.0))
        answer = b""
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while part := sock.recv(2**16):
                answer += part
        except TimeoutError:
            raise FailedError(f"{data[:30]!r}: neither answered nor closed") from None
        except OSError:
            pass  # cut in the middle: that is an answer, too
    return answer
