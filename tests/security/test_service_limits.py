"""The world-model service against hostile clients, and the archive checker against hostile archives: bounds hold, nothing hangs."""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import json
import os
import socket
import struct
import tarfile
import time
import tracemalloc
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.PngImagePlugin  # noqa: F401 - here, so that memory is not counted below
import pytest

from physisforcing.core.errors import UserError
from physisforcing.planner.service.http import Address, exchange
from physisforcing.planner.service.limits import ServiceLimits
from physisforcing.planner.service.pictures import decode_png, encode_png
from physisforcing.planner.service.server import ServeWorldModelConfig, serving
from physisforcing.planner.service.toy import ToyWorldModel, text
from physisforcing.planner.track1 import check_archive
from physisforcing.planner.track1_archive import ArchiveLimits
from physisforcing.planner.track1_report import Track1Rules

TOKEN = "0123456789abcdef0123"
LIMITS = ServiceLimits(
    max_request_bytes=200_000, buffered_bytes=300_000, max_connections=12, header_s=0.6, body_s=0.6, grace_s=1.0
)


@pytest.fixture(scope="module")
def server() -> Iterator[Address]:
    """With a token, short deadlines and few connections."""
    with serving(text(), LIMITS, token=TOKEN) as url:
        yield Address.of(url)


def ask(server: Address, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict]:
    sent = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"} | headers
    reply = exchange(server, method, path, body, {k: v for k, v in sent.items() if v}, timeout_s=10)
    return reply.status, json.loads(reply.body)


def raw(server: Address, *parts: bytes, pause_s: float = 0.0) -> tuple[bytes, float]:
    """What comes until the server closes, and how long that took."""
    begun, answer = time.monotonic(), b""
    with socket.create_connection((server.host, server.port), timeout=10) as sock:
        try:
            for part in parts:
                sock.sendall(part)
                time.sleep(pause_s)
            while data := sock.recv(2**16):
                answer += data
        except (ConnectionError, BrokenPipeError):
            pass
    return answer, time.monotonic() - begun


def healthy(server: Address) -> bool:
    return ask(server, "GET", "/v1/health")[0] == 200


# ---------------------------------------------------------------------- pictures


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(height: int, width: int, pixels: bytes, *, before: bytes = b"", depth: int = 8, colour: int = 2) -> str:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + before + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + parts).decode()


def zeros(megabytes: int) -> bytes:
    squeeze = zlib.compressobj(9)
    return b"".join([squeeze.compress(bytes(2**20)) for _ in range(megabytes)]) + squeeze.flush()


BOMBS = {
    "65535x65535 in the header": png(65535, 65535, zeros(1)),
    "pixels that unpack to 64 MB": png(24, 32, zeros(64)),
    "a text of 64 MB": png(24, 32, zlib.compress(bytes(24 * 96)), before=chunk(b"zTXt", b"a\0\0" + zeros(64)) * 3),
    "a colour profile of 64 MB": png(
        24, 32, zlib.compress(bytes(24 * 96)), before=chunk(b"iCCP", b"a\0\0" + zeros(64))
    ),
    "a hundred thousand chunks": png(24, 32, b"", before=chunk(b"tEXt", b"") * 100_000),
    "16 bits": png(24, 32, zlib.compress(bytes(24 * 193)), depth=16),
    "no pixels": png(24, 32, b""),
    "half of the pixels": png(24, 32, zlib.compress(bytes(12 * 97))),
    "a pixel too many": png(24, 32, zlib.compress(bytes(24 * 97 + 1))),
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_bombs_are_refused_before_they_grow(data: str) -> None:
    tracemalloc.start()
    begun = time.process_time()
    with pytest.raises(ValueError):
        decode_png(data, 24, 32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(data) + 2_000_000, f"{peak} bytes for {len(data)} sent"
    assert time.process_time() - begun < 2


def test_bombs_beside_the_pixels_are_not_even_read() -> None:
    bombs = chunk(b"iCCP", b"a\0\0" + zeros(64)) + chunk(b"zTXt", b"a\0\0" + zeros(64))
    data = png(24, 32, zlib.compress(bytes(24 * 97)), before=bombs)
    tracemalloc.start()
    assert decode_png(data, 24, 32).max() == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


# ---------------------------------------------------------------------- requests


def test_a_body_that_is_too_large_is_refused_at_its_first_byte_too_many(server: Address) -> None:
    status, found = ask(server, "POST", "/v1/predict", b" " * 200_001)
    assert (status, found["error"]["code"]) == (413, "PAYLOAD_TOO_LARGE")
    head = (
        f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
    )
    announced, _ = raw(server, head.encode() + b"Content-Length: 99999999999999\r\n\r\n")
    assert announced.startswith(b"HTTP/1.1 413") and b"PAYLOAD_TOO_LARGE" in announced
    piece = b"c350\r\n" + b" " * 50_000 + b"\r\n"  # chunked: no length is announced
    unannounced, _ = raw(server, head.encode() + b"Transfer-Encoding: chunked\r\n\r\n", *[piece] * 5)
    assert unannounced.startswith(b"HTTP/1.1 413")
    assert healthy(server)


def test_a_slow_head_and_a_slow_body_are_cut(server: Address) -> None:
    nothing, seconds = raw(server)
    assert nothing == b"" and seconds < 3
    _, seconds = raw(server, *[b"G"] * 20, pause_s=0.1)
    assert seconds < 4  # a letter every tenth of a second does not prolong it
    lines = [b"GET /v1/health HTTP/1.1\r\n", *[b"X-A: b\r\n"] * 20]
    assert raw(server, *lines, pause_s=0.1)[1] < 4
    head = (
        f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
    )
    answer, seconds = raw(server, head.encode() + b"Content-Length: 1000\r\n\r\n", *[b" "] * 12, pause_s=0.1)
    assert answer.startswith(b"HTTP/1.1 504") and b"DEADLINE_EXCEEDED" in answer and seconds < 4
    assert healthy(server)


def test_connections_are_bounded_and_come_free_again(server: Address) -> None:
    held = [socket.create_connection((server.host, server.port), timeout=10) for _ in range(LIMITS.max_connections + 6)]
    time.sleep(0.2)
    refused = 0
    for sock in held:
        sock.settimeout(0.05)
        try:
            refused += sock.recv(100).startswith(b"HTTP/1.1 429")
        except TimeoutError:
            pass
    assert refused == 6
    time.sleep(LIMITS.header_s + 0.3)
    assert healthy(server)
    for sock in held:
        sock.close()


def test_bodies_of_all_clients_together_are_bounded(server: Address) -> None:
    head = (
        f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
    )
    begin = head.encode() + b"Content-Length: 180000\r\n\r\n" + b" " * 170_000
    with socket.create_connection((server.host, server.port), timeout=10) as first:
        first.sendall(begin)
        time.sleep(0.2)
        with socket.create_connection((server.host, server.port), timeout=10) as second:
            second.sendall(begin)
            assert second.recv(100).startswith(b"HTTP/1.1 429")
    time.sleep(LIMITS.body_s + 0.3)
    assert ask(server, "POST", "/v1/predict", b" " * 170_000)[0] == 400  # what the others held is free again


def test_answers_that_nobody_reads_do_not_keep_their_connection() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    with serving(ToyWorldModel(conditions=frozenset(), height=120, width=160), LIMITS) as url:
        server = Address.of(url)
        version = ask(server, "GET", "/v1/capabilities")[1]["model_version"]
        image = {"encoding": "png_base64", "color_space": "RGB", "height": 120, "width": 160, "channels": 3}
        sample = {
            "sample_id": "a",
            "seed": 0,
            "context": {"frames": [image | {"data": encode_png(picture)}], "actions": []},
        }
        request = {"api_version": "1.0", "request_id": str(uuid.UUID(int=1)), "model_version": version}
        body = json.dumps(request | {"profile_id": "text-5", "samples": [sample]}).encode()
        size = len(json.dumps(ask(server, "POST", "/v1/predict", body)[1]))
        assert size > 300_000
        head = f"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.settimeout(10)
            sock.connect((server.host, server.port))
            sock.settimeout(1)
            with contextlib.suppress(OSError):  # the server stops reading while its answers are not read
                for _ in range(40):
                    sock.sendall(head.encode() + body)
            time.sleep(2 * LIMITS.header_s + 0.5)
            received = 0
            with contextlib.suppress(ConnectionError):
                while data := sock.recv(2**16):
                    received += len(data)
        assert received < 25 * size  # it was cut
        assert healthy(server)


def test_only_the_token_opens(server: Address) -> None:
    for given in ("", "Bearer", "Bearer ", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xff"):
        status, found = ask(server, "GET", "/v1/capabilities", authorization=given)
        assert (status, found["error"]["code"]) == (401, "UNAUTHENTICATED"), given
        assert TOKEN not in json.dumps(found)
    assert ask(server, "GET", "/v1/health", authorization="")[0] == 200
    assert ask(server, "GET", "/v1/capabilities", host="anything.example")[0] == 200  # a token is enough from anywhere


def test_a_service_without_a_token_answers_to_this_machines_names_only() -> None:
    with serving(text(), LIMITS) as url:
        server = Address.of(url)
        for host, status in (
            ("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("evil.example", 403), ("127.0.0.1.evil.example", 403),
        ):  # fmt: skip
            assert ask(server, "GET", "/v1/capabilities", authorization="", host=host)[0] == status, host
        status, found = ask(server, "POST", "/v1/predict", b"{}", authorization="", **{"content-type": "text/plain"})
        assert status == 400 and "content-type" in found["error"]["message"]  # what a web page could send unasked


def test_a_host_that_others_reach_needs_a_token() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.1", "example.org"):
        with pytest.raises(UserError, match="token"):
            ServeWorldModelConfig(host=host, token="short").check()
        ServeWorldModelConfig(host=host, token=TOKEN).check()
    for host in ("127.0.0.1", "localhost", "::1"):
        ServeWorldModelConfig(host=host).check()


# ---------------------------------------------------------------------- archives


def archive(path: Path, *members: tarfile.TarInfo, content: bytes = b"") -> Path:
    with tarfile.open(path, "w:gz") as made:
        for info in members:
            info.size = len(content) if info.isreg() else 0
            made.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return path


def entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


HOSTILE = {
    "a parent folder": entry("../evil.mp4"),
    "a parent folder inside": entry("videos/../../evil.mp4"),
    "an absolute path": entry("/etc/evil.mp4"),
    "a drive": entry("C:evil.mp4"),
    "a backslash": entry("videos\\..\\evil.mp4"),
    "a control character": entry("videos/a\nb.mp4"),
    "a symbolic link": entry("videos/a_episode1.mp4", tarfile.SYMTYPE, "/etc/passwd"),
    "a hard link": entry("videos/a_episode1.mp4", tarfile.LNKTYPE, "model_readme.md"),
    "a device": entry("videos/a_episode1.mp4", tarfile.CHRTYPE),
    "a pipe": entry("videos/a_episode1.mp4", tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("member", HOSTILE.values(), ids=HOSTILE)
def test_hostile_members_are_named_and_nothing_is_written(member: tarfile.TarInfo, tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar.gz", entry("model_readme.md"), member)
    report = check_archive(path)
    assert report.findings[-1].code == "unsafe_tar_path" and not report.valid
    assert os.listdir(tmp_path) == ["a.tar.gz"] and not (tmp_path.parent / "evil.mp4").exists()


def test_the_same_path_twice_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar.gz", entry("videos/a_episode1.mp4"), entry("./videos/a_episode1.mp4"))
    assert check_archive(path).findings[-1].code == "unsafe_tar_path"


def test_archives_that_grow_are_refused_before_they_do(tmp_path: Path) -> None:
    limits = ArchiveLimits(total_bytes=2**22, video_bytes=2**20, members=50, header_bytes=2**16)
    rules = Track1Rules(limits=limits)
    big = archive(tmp_path / "a.tar.gz", entry("videos/a_episode1.mp4"), content=bytes(2**21))
    many = archive(tmp_path / "b.tar.gz", *[entry(f"videos/a_episode{i}.mp4") for i in range(60)])
    total = archive(tmp_path / "c.tar.gz", *[entry(f"x{i}.bin") for i in range(9)], content=bytes(2**19))
    lying = tmp_path / "d.tar.gz"  # a description (pax header) that announces 8 GB
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 8 * 2**30 - 1
    lying.write_bytes(gzip.compress(info.tobuf(tarfile.USTAR_FORMAT) + bytes(2**20)))
    tail = tmp_path / "e.tar.gz"  # a good end, and then 64 MB more
    tail.write_bytes(gzip.compress(bytes(1024)) + gzip.compress(bytes(2**26)))
    for path in (big, many, total, lying, tail):
        tracemalloc.start()
        codes = [finding.code for finding in check_archive(path, rules).findings]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert "unsafe_tar_size" in codes, path.name
        assert peak < 20_000_000, path.name
