"""Conformance by fuzzing: requests that break the schema in places that hypothesis chooses, and bodies of random bytes.

The strategies come from the JSON schema of ``PredictRequest``: every place of a valid request is known with what belongs there, and
up to three of them get something else. Nothing but a typed 4xx is right, or a complete answer where the request is still valid.
"""

from __future__ import annotations

import copy
import json
import tempfile
from typing import Any

import numpy as np

from .probe import FailedError, Probe, SkippedError, typed_error
from .schema import PredictRequest

Path = tuple[str | int, ...]
_TEXTS = ["", "0", "\0", "a" * 300, "ä\u202e\U0001f600", "../../etc/passwd", "{}", "null", "-1", "1.0", "%00", "'; --"]
_NUMBERS = [0, -1, 1, 2**31, 2**53, 2**63, -(2**63), 2**64, 0.5, -0.0, 1e-320, 1e39, 1e300]


def schema_fuzzing(probe: Probe) -> str:
    """Broken requests, made by hypothesis from the schema."""
    try:
        import hypothesis
        from hypothesis import HealthCheck, Phase
        from hypothesis.configuration import set_hypothesis_home_dir
    except ImportError:
        raise SkippedError("needs hypothesis (pip install hypothesis)") from None

    answered = 0

    def try_one(case: tuple[list[str], dict[str, Any]]) -> None:
        nonlocal answered
        broken, request = case
        answered += _judged(probe, json.dumps(request).encode(), ", ".join(broken), request)

    with tempfile.TemporaryDirectory() as home:
        set_hypothesis_home_dir(home)  # else it leaves a folder where the command was started
        try:
            settings = hypothesis.settings(
                max_examples=probe.options.examples,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            run = hypothesis.given(broken_requests(probe.request(), PredictRequest.model_json_schema()))(try_one)
            hypothesis.seed(probe.options.seed)(settings(run))()
        finally:
            set_hypothesis_home_dir(None)
    return f"{probe.options.examples} requests, {answered} of them still valid and answered"


def byte_fuzzing(probe: Probe) -> str:
    """Random bytes, and valid requests with some bytes changed, cut or doubled."""
    random = np.random.default_rng([probe.options.seed, 6])
    answered = 0
    for i in range(probe.options.examples):
        body = _damaged(json.dumps(probe.request()).encode(), random) if i % 2 else _noise(random)
        answered += _judged(probe, body, f"body {i} of seed {probe.options.seed}", None)
    return f"{probe.options.examples} bodies, {answered} of them still valid and answered"


def broken_requests(valid: dict[str, Any], schema: dict[str, Any]) -> Any:
    """A hypothesis strategy: (what was changed, a copy of ``valid`` with one to three places that break ``schema``)."""
    from hypothesis import strategies as st

    places = list(schema_places(valid, schema, schema))
    strangers = {kind: _strangers(kind) for _, kind in places}

    @st.composite
    def broken(draw: Any) -> tuple[list[str], dict[str, Any]]:
        request, told = copy.deepcopy(valid), []
        for path, kind in draw(st.lists(st.sampled_from(places), min_size=1, max_size=3, unique_by=lambda p: p[0])):
            action = draw(st.sampled_from(["replace", "replace", "remove", "wrap", "double"]))
            value = draw(strangers[kind])
            if _change(request, path, action, value):
                told.append(f"{action} {'.'.join(map(str, path))}")
        return told, request

    return broken()


def schema_places(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> Any:
    """Every place of ``value`` with the types that the JSON schema allows there: ((key, index, ...), {"string", ...})."""
    options = _resolved(schema, root)
    yield_types = frozenset(option["type"] for option in options if "type" in option)
    for option in options:
        if isinstance(value, dict) and option.get("type") == "object":
            for name, inner in option.get("properties", {}).items():
                if name in value:
                    kinds = frozenset(o["type"] for o in _resolved(inner, root) if "type" in o)
                    yield (name,), kinds
                    for path, kind in schema_places(value[name], inner, root):
                        yield (name, *path), kind
        elif isinstance(value, list) and option.get("type") == "array":
            for i, entry in enumerate(value[:2]):
                yield (i,), yield_types
                for path, kind in schema_places(entry, option["items"], root):
                    yield (i, *path), kind


def _resolved(schema: dict[str, Any], root: dict[str, Any]) -> list[dict[str, Any]]:
    """The alternatives of a schema, without references; a constant has the type of its value."""
    if "$ref" in schema:
        return _resolved(root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root)
    if "anyOf" in schema:
        return [found for option in schema["anyOf"] for found in _resolved(option, root)]
    return [schema]


def _strangers(kinds: frozenset[str]) -> Any:
    """Values of other types than ``kinds``, and strange ones of these types."""
    from hypothesis import strategies as st

    leaves = st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from(_NUMBERS),
        st.integers(-(2**70), 2**70),
        st.floats(allow_nan=False, allow_infinity=False),
        st.sampled_from(_TEXTS),
        st.binary(max_size=40).map(lambda data: data.decode("latin-1")),
    )
    anything = st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(_TEXTS), inner, max_size=3)
        ),
        max_leaves=8,
    )
    likely = {
        "string": st.sampled_from(_TEXTS),
        "integer": st.sampled_from(_NUMBERS),
        "number": st.sampled_from(_NUMBERS),
        "array": st.lists(leaves, max_size=4),
        "object": st.dictionaries(st.sampled_from(_TEXTS), leaves, max_size=3),
    }
    return st.one_of(anything, *(likely[kind] for kind in sorted(kinds) if kind in likely))


def _change(request: dict[str, Any], path: Path, action: str, value: Any) -> bool:
    """Whether the place was still there to be changed."""
    here: Any = request
    for part in path[:-1]:
        try:
            here = here[part]
        except (KeyError, IndexError, TypeError):
            return False
    last = path[-1]
    fits = (isinstance(here, dict) and last in here) or (
        isinstance(here, list) and isinstance(last, int) and last < len(here)
    )
    if not fits:
        return False
    if action == "remove":
        del here[last]
    elif action == "double" and isinstance(here, list) and isinstance(last, int):
        here.append(copy.deepcopy(here[last]))
    else:
        here[last] = [here[last]] if action == "wrap" else value
    return True


def _judged(probe: Probe, body: bytes, what: str, request: dict[str, Any] | None) -> int:
    """1 when the body was answered, 0 when it was refused as it should be."""
    reply = probe.post(body)
    try:
        if reply.status == 200:
            probe.frames(reply, request if request is not None else json.loads(body))
            return 1
        typed_error(reply, 400, 409, 413, 422)
    except (FailedError, KeyError, TypeError, ValueError, StopIteration) as error:
        raise FailedError(f"{what}: {error}") from error
    return 0


def _noise(random: np.random.Generator) -> bytes:
    size = int(random.integers(0, 4000))
    if random.random() < 0.5:
        return random.integers(0, 256, size, dtype=np.uint8).tobytes()
    return bytes(random.choice(np.frombuffer(b'{}[]",:0123456789.eE+-\\u truefalsn', np.uint8), size))


def _damaged(body: bytes, random: np.random.Generator) -> bytes:
    """``body`` with bytes changed, cut out, put in, or its end missing."""
    data, at = bytearray(body), int(random.integers(0, len(body)))
    kind = int(random.integers(0, 4))
    if kind == 0:
        for place in random.integers(0, len(data), 5):
            data[int(place)] = int(random.integers(0, 256))
    elif kind == 1:
        del data[at : at + int(random.integers(1, 50))]
    elif kind == 2:
        data[at:at] = random.integers(0, 256, int(random.integers(1, 50)), dtype=np.uint8).tobytes()
    else:
        del data[at:]
    return bytes(data)
