"""Conformance: what is wrong with a request is found before anything is computed, and said with the right status and code."""

from __future__ import annotations

import base64
import copy
import io
import json
import struct
import uuid
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .probe import FailedError, Probe, SkippedError, expect, typed_error
from .schema import Profile

Change = Callable[[dict[str, Any]], Any]
_REMOVED = object()
_OTHER_TYPES: tuple[Any, ...] = (None, {}, True, 1.5)
_OUT_OF_RANGE: dict[str, tuple[Any, ...]] = {
    "seed": (-1, 2**63, "3", 1e30),
    "request_id": ("", "not-a-uuid", str(uuid.UUID(int=1))[:-1]),
    "encoding": ("jpeg_base64",),
    "color_space": ("BGR",),
    "channels": (4,),
    "height": (0,),
}


def wrong_fields(probe: Probe) -> str:
    """Each field missing, of a wrong type or out of its range: 400 INVALID_ARGUMENT."""
    return _all_refused(probe, _wrong_fields(probe.profile()))


def wrong_lengths(probe: Probe) -> str:
    """Frames, actions, states and samples of other lengths than the profile says."""
    return _all_refused(probe, _wrong_lengths(probe))


def wrong_pictures(probe: Probe) -> str:
    """Pictures that are no PNG, damaged, of another size or of another kind than 8-bit RGB."""
    return _all_refused(probe, _wrong_pictures(probe.profile()))


def decompression_bombs(probe: Probe) -> str:
    """A few kilobytes that claim, or unpack to, gigabytes: refused as quickly as any other picture."""
    image = probe.profile().image
    cases: list[tuple[str, Change]] = [
        ("a header of 65535x65535", _data(_png(65535, 65535, 2, b"\0" * 1000))),
        ("a compressed text of 64 MB", _data(_png(image.height, image.width, 2, b"", extra=_text_bomb()))),
        ("announced and real size 30000x30000", _picture(height=30000, width=30000, data=_png(30000, 30000, 2, b"\0"))),
    ]
    return _all_refused(probe, iter(cases))


def wrong_versions(probe: Probe) -> str:
    """Another API, model or profile: 422 UNSUPPORTED_VERSION."""
    for name, value in (("api_version", "2.0"), ("model_version", "other"), ("profile_id", "other")):
        try:
            found = typed_error(probe.post(probe.request() | {name: value}), 422, code="UNSUPPORTED_VERSION")
        except FailedError as error:
            raise FailedError(f"{name}={value!r}: {error}") from None
        expect(not found.retryable, "UNSUPPORTED_VERSION is marked retryable")
    return "422 for another API version, model and profile"


def bad_documents(probe: Probe) -> str:
    """Bodies that are no JSON object, or JSON that is not finite, not UTF-8, or nested without end."""
    good = json.dumps(probe.request()).encode()
    seed = f'"seed": {probe.request()["samples"][0]["seed"]}'.encode()
    assert seed in good
    cases = {
        "nothing": b"",
        "half a document": good[: len(good) // 2],
        "a list": b"[" + good + b"]",
        "null": b"null",
        "not UTF-8": b'{"api_version": "\xff\xfe"}',
        "100000 levels": b"[" * 100_000,
        "a field of 100000 levels": b'{"later": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "NaN": good.replace(seed, b'"seed": NaN'),
        "Infinity": good.replace(seed, b'"seed": Infinity'),
        "1e999": good.replace(seed, b'"seed": 1e999'),
        "a seed of 5000 digits": good.replace(seed, b'"seed": ' + b"9" * 5000),
        "two documents": good + good,
    }
    for name, body in cases.items():
        try:
            typed_error(probe.post(body), 400, code="INVALID_ARGUMENT")
        except FailedError as error:
            raise FailedError(f"{name}: {error}") from None
    return f"400 for {len(cases)} documents"


def wrong_routes(probe: Probe) -> str:
    """Other paths and methods get 404 and 405 with the common body."""
    typed_error(probe.ask("GET", "/v1/unknown"), 404)
    typed_error(probe.ask("GET", "/v1/../etc/passwd"), 400, 404)
    typed_error(probe.ask("GET", "/v1/predict"), 405)
    typed_error(probe.ask("POST", "/v1/health", b"{}"), 405)
    return "404 and 405"


def too_large(probe: Probe) -> str:
    """One byte more than declared is 413, whether it is announced or sent."""
    most = probe.manifest.limits.max_request_bytes
    try:
        reply = probe.ask("POST", "/v1/predict", b"{}", content_length=str(2**50))
        typed_error(reply, 413, code="PAYLOAD_TOO_LARGE")
    except FailedError as error:
        raise FailedError(f"announced 2^50 bytes: {error}") from None
    if most > 2**28:
        return f"413 for an announced length (declared are {most} bytes, which were not sent)"
    request = probe.request()
    request["later"] = "x" * (most - len(json.dumps(request | {"later": ""})) + 1)
    found = typed_error(probe.post(request), 413, code="PAYLOAD_TOO_LARGE")
    expect(not found.retryable, "413 is marked retryable")
    return f"413 for an announced length, and for {most + 1} bytes"


def needs_actions(probe: Probe) -> str:
    """A model driven by text that is given actions says 422 and ``needs: actions``."""
    if any(profile.driven_by == "actions" for profile in probe.manifest.profiles):
        raise SkippedError("the model follows actions")
    request = probe.request()
    request["samples"][0]["actions"] = [[0.0] * 14] * 8
    found = typed_error(probe.post(request), 422)
    expect(found.needs == "actions", f"needs is {found.needs!r}, wanted 'actions'")
    expect(not found.retryable, "it is marked retryable")
    return f"422 {found.code}, needs: actions"


# ---------------------------------------------------------------------- cases


def _wrong_fields(profile: Profile) -> Iterator[tuple[str, Change]]:
    paths: list[tuple[str | int, ...]] = [("api_version",), ("request_id",), ("model_version",), ("profile_id",)]
    paths += [("samples",), ("samples", 0, "sample_id"), ("samples", 0, "seed"), ("samples", 0, "context")]
    paths += [("samples", 0, "context", "frames"), ("samples", 0, "context", "actions")]
    image = ("samples", 0, "context", "frames", 0)
    paths += [(*image, name) for name in ("encoding", "color_space", "height", "width", "channels", "data")]
    if profile.driven_by == "actions":
        paths.append(("samples", 0, "actions"))
    for path in paths:
        where = ".".join(map(str, path))
        yield f"no {where}", _set(path, _REMOVED)
        for value in _OTHER_TYPES:
            yield f"{where} = {value!r}", _set(path, value)
    for name, values in _OUT_OF_RANGE.items():
        path = ("samples", 0, name) if name == "seed" else (name,) if name == "request_id" else (*image, name)
        for value in values:
            yield f"{name} = {value!r}", _set(path, value)
    if profile.instruction.supported:
        yield "an instruction that is a list", _set(("samples", 0, "context", "instruction"), ["go"])


def _wrong_lengths(probe: Probe) -> Iterator[tuple[str, Change]]:
    profile = probe.profile()
    context, sample = ("samples", 0, "context"), ("samples", 0)

    def stretched(path: tuple[str | int, ...], count: int) -> Change:
        return lambda request: _put(request, path, (_get(request, path) * (count + 1))[:count])

    yield "no samples", _set(("samples",), [])
    yield "no frames", _set((*context, "frames"), [])
    yield "too many frames", stretched((*context, "frames"), profile.context_frames.max + 1)
    width = profile.action.dimension or 14
    yield "an action too many in the context", _set((*context, "actions"), [[0.0] * width] * profile.context_frames.max)
    if profile.driven_by == "actions":
        yield "no actions", _set((*sample, "actions"), [])
        yield "too many actions", stretched((*sample, "actions"), profile.prediction_frames.max + 1)
        yield "actions too short", _set((*sample, "actions"), [[0.0] * (width - 1)] * profile.prediction_frames.min)
        yield "actions too long", _set((*sample, "actions"), [[0.0] * (width + 1)] * profile.prediction_frames.min)
        yield "an action of text", _set((*sample, "actions", 0, 0), "0.0")
        yield "an action beyond float32", _set((*sample, "actions", 0, 0), 1e300)
    if profile.state.supported:
        count, width = profile.context_frames.min, profile.state.dimension or 1
        yield "states too short", _set((*context, "states"), [[0.0] * (width - 1)] * count)
        yield "a state too many", _set((*context, "states"), [[0.0] * width] * (count + 1))

    def same_names(request: dict[str, Any]) -> None:
        request["samples"].append(copy.deepcopy(request["samples"][0]))

    yield "a sample_id twice", same_names

    def too_many(request: dict[str, Any]) -> None:
        first = request["samples"][0]
        count = probe.manifest.limits.max_batch_size + 1
        request["samples"] = [first | {"sample_id": f"s{i}"} for i in range(count)]

    yield "a sample too many", too_many


def _wrong_pictures(profile: Profile) -> Iterator[tuple[str, Change]]:
    from PIL import Image

    height, width = profile.image.height, profile.image.width
    good = _png(height, width, 2, b"\0" * (height * (3 * width + 1)))
    text = base64.b64encode(good).decode()
    yield "a data: prefix", _set(_DATA, "data:image/png;base64," + text)
    yield "line breaks in Base64", _set(_DATA, text[:20] + "\n" + text[20:])
    yield "no Base64", _set(_DATA, "ä!")
    yield "an empty file", _data(b"")
    yield "no PNG", _data(b"GIF89a" + bytes(40))
    yield "half a PNG", _data(good[: len(good) // 2])
    damaged = bytearray(good)
    damaged[-20] ^= 0xFF
    yield "a damaged PNG", _data(bytes(damaged))
    yield "pixels missing", _data(_png(height, width, 2, b"\0" * (height // 2 * (3 * width + 1))))
    yield "another size than announced", _data(_png(height + 1, width, 2, b"\0" * ((height + 1) * (3 * width + 1))))
    yield (
        "another size than the profile",
        _picture(height=height + 8, width=width, data=_png(height + 8, width, 2, b"")),
    )
    for mode in ("L", "P", "RGBA", "LA", "1", "I;16"):
        file = io.BytesIO()
        Image.new(mode, (width, height)).save(file, format="PNG")
        yield f"a PNG of mode {mode}", _data(file.getvalue())
    moving = io.BytesIO()
    frames = [Image.fromarray(np.full((height, width, 3), value, np.uint8)) for value in (0, 255)]
    frames[0].save(moving, format="PNG", save_all=True, append_images=frames[1:])
    yield "an animated PNG", _data(moving.getvalue())
    jpeg = io.BytesIO()
    Image.new("RGB", (width, height)).save(jpeg, format="JPEG")
    yield "a JPEG", _data(jpeg.getvalue())


# ---------------------------------------------------------------------- making them

_IMAGE = ("samples", 0, "context", "frames", 0)
_DATA = (*_IMAGE, "data")


def _all_refused(probe: Probe, cases: Iterator[tuple[str, Change]]) -> str:
    count = 0
    for name, change in cases:
        request = probe.request()
        change(request)
        try:
            found = typed_error(probe.post(request), 400, code="INVALID_ARGUMENT")
            expect(not found.retryable, "INVALID_ARGUMENT is marked retryable")
        except FailedError as error:
            raise FailedError(f"{name}: {error}") from None
        count += 1
    return f"400 for {count} requests"


def _get(value: Any, path: tuple[str | int, ...]) -> Any:
    for part in path:
        value = value[part]
    return value


def _put(request: dict[str, Any], path: tuple[str | int, ...], value: Any) -> None:
    parent = _get(request, path[:-1])
    if value is _REMOVED:
        parent.pop(path[-1], None)
    else:
        parent[path[-1]] = value


def _set(path: tuple[str | int, ...], value: Any) -> Change:
    return lambda request: _put(request, path, value)


def _data(file: bytes) -> Change:
    return _set(_DATA, base64.b64encode(file).decode())


def _picture(*, height: int, width: int, data: bytes) -> Change:
    def change(request: dict[str, Any]) -> None:
        encoded = base64.b64encode(data).decode()
        _get(request, _IMAGE).update(height=height, width=width, data=encoded)

    return change


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(height: int, width: int, colour: int, raw: bytes, *, extra: bytes = b"") -> bytes:
    """A PNG file whose pixel stream is ``raw``, whatever its header says."""
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    body = _chunk(b"IHDR", header) + extra + _chunk(b"IDAT", zlib.compress(raw)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _text_bomb() -> bytes:
    """A compressed text chunk of 64 MB, made a megabyte at a time."""
    squeeze = zlib.compressobj(9)
    parts = [squeeze.compress(bytes(2**20)) for _ in range(64)] + [squeeze.flush()]
    return _chunk(b"zTXt", b"Comment\0\0" + b"".join(parts))
