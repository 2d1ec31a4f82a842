"""Conformance: health, a true manifest, complete answers, equal pixels for equal seeds, one answer for one request id."""

from __future__ import annotations

import concurrent.futures
import copy
import json
import uuid
from typing import Any

from .manifest import manifest_problems
from .probe import FailedError, Probe, SkippedError, expect, parsed, same_frames, typed_error
from .schema import Capabilities, Health


def health(probe: Probe) -> str:
    """``GET /v1/health`` says that the service is ready."""
    reply = probe.ask("GET", "/v1/health")
    expect(reply.status == 200, f"status {reply.status}")
    found: Health = parsed(Health, reply)
    if found.status != "ready":
        raise FailedError(f"the service is {found.status}, wanted ready")
    return f"ready, {found.model_version}"


def capabilities(probe: Probe) -> str:
    """``GET /v1/capabilities`` is a complete manifest, and names the same model as health does."""
    reply = probe.ask("GET", "/v1/capabilities")
    expect(reply.status == 200, f"status {reply.status}: {reply.body[:200]!r}")
    found: Capabilities = parsed(Capabilities, reply)
    named = parsed(Health, probe.ask("GET", "/v1/health")).model_version
    expect(found.model_version == named, f"model_version {found.model_version}, in health {named}")
    names = [profile.profile_id for profile in found.profiles]
    expect(len(set(names)) == len(names), "a profile_id stands twice")
    for profile in found.profiles:
        for bounds in (profile.context_frames, profile.prediction_frames):
            expect(bounds.min <= bounds.max, f"{profile.profile_id}: min {bounds.min} above max {bounds.max}")
        if profile.driven_by == "actions":
            expect(profile.action.dimension is not None, f"{profile.profile_id}: no action dimension")
        stated = profile.state.supported == (profile.state.dimension is not None)
        expect(stated, f"{profile.profile_id}: state.supported and state.dimension disagree")
    problems = manifest_problems(found)
    expect(not problems, "; ".join(problems[:5]))
    probe.capabilities = found
    return f"profiles {', '.join(names)}; batch {found.limits.max_batch_size}, at once {found.limits.max_concurrency}"


def authentication(probe: Probe) -> str:
    """Without the token, and with another one, only health is answered."""
    if not probe.token:
        raise SkippedError("no token was given")
    body = json.dumps(probe.request()).encode()
    for method, path, sent in (("GET", "/v1/capabilities", None), ("POST", "/v1/predict", body)):
        for token in ("", "x" + probe.token[1:], probe.token + "x"):
            typed_error(probe.ask(method, path, sent, token=token), 401, code="UNAUTHENTICATED")
    return "401 without the token and with two others"


def single_sample(probe: Probe) -> str:
    """Every profile answers one sample, at both ends of its range."""
    words = []
    for profile in probe.manifest.profiles:
        request = probe.request(profile=profile)
        probe.predict(request)
        words.append(profile.profile_id)
        bounds = profile.prediction_frames
        if bounds.max > bounds.min and profile.driven_by == "actions":
            sample = request["samples"][0]
            sample["actions"] = sample["actions"][:1] * bounds.max
            probe.predict(request | {"request_id": str(uuid.uuid4())})
    return f"answered: {', '.join(words)}"


def largest_batch(probe: Probe) -> str:
    """A batch of the declared size is answered completely."""
    probe.predict(probe.request(probe.batch))
    declared = probe.manifest.limits.max_batch_size
    return f"{probe.batch} samples" + (f" of {declared} declared" if probe.batch < declared else "")


def determinism(probe: Probe) -> str:
    """The same sample gives the same pixels again, in a batch, and in another order of the batch."""
    if not probe.manifest.determinism.same_seed_same_pixels:
        raise SkippedError("the manifest does not promise it")
    alone = probe.predict(probe.request())
    expect(same_frames(alone, probe.predict(probe.request())), "the same sample gave other pixels in a second request")
    count = min(3, probe.batch)
    if count == 1:
        return "in two requests; the server takes no batches"
    request = probe.request(count)
    together = probe.predict(request)
    expect(same_frames(alone, together[:1]), "the same sample gave other pixels in a batch")
    turned = _renewed(request)
    turned["samples"].reverse()
    expect(same_frames(together, probe.predict(turned)[::-1]), "another order of the batch gave other pixels")
    return f"in two requests, in a batch of {count}, and in the batch turned round"


def no_session(probe: Probe) -> str:
    """What was asked before does not matter, nor do names."""
    if not probe.manifest.determinism.same_seed_same_pixels:
        raise SkippedError("the manifest does not promise equal pixels")
    first = probe.predict(probe.request(first_seed=100))
    probe.predict(probe.request(first_seed=200))
    again = probe.request(first_seed=100)
    again["samples"][0]["sample_id"] = "another name"
    expect(same_frames(first, probe.predict(again)), "a request in between, or another sample_id, changed the pixels")
    return "another request in between and another sample_id change nothing"


def seeds(probe: Probe) -> str:
    """The ends of the range of seeds are accepted; whether seeds matter is told, not judged."""
    request = probe.request()
    found = []
    for seed in (0, 2**63 - 1):
        request = _renewed(request)
        request["samples"][0]["seed"] = seed
        found.append(probe.predict(request))
    return "0 and 2^63-1; the pictures " + ("do not depend on the seed" if same_frames(*found) else "differ")


def idempotency(probe: Probe) -> str:
    """A repeated request id gives the same answer; another payload under it gives 409."""
    request = probe.request(first_seed=300)
    first = probe.predict(request)
    expect(same_frames(first, probe.predict(request)), "the same request_id and payload gave other pixels")
    other = copy.deepcopy(request)
    other["samples"][0]["seed"] += 1
    found = typed_error(probe.post(other), 409, code="REQUEST_ID_CONFLICT")
    expect(not found.retryable, "409 is marked retryable")
    expect(found.request_id == request["request_id"], "the error does not name the request_id")
    expect(same_frames(first, probe.predict(request)), "the conflict changed what the request_id stands for")
    return "same answer; 409 for another payload, and the first answer after it"


def twins(probe: Probe) -> str:
    """The same request twice at the same moment: both get the same answer, or one a typed error that may be tried again."""
    request = probe.request(first_seed=400)
    body = json.dumps(request).encode()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        replies = list(pool.map(lambda _: probe.ask("POST", "/v1/predict", body), range(2)))
    answered = [probe.frames(reply, request) for reply in replies if reply.status == 200]
    for reply in replies:
        if reply.status != 200:
            typed_error(reply, 409, 429, 503)
    expect(bool(answered), "neither of them was answered")
    expect(len(answered) == 1 or same_frames(*answered), "two answers with other pixels")
    return "both answered alike" if len(answered) == 2 else "one answered, one told to come again"


def unknown_fields(probe: Probe) -> str:
    """Fields that a later 1.x may add are ignored."""
    request: dict[str, Any] = probe.request(first_seed=500)
    plain = probe.predict(request)
    request = _renewed(request) | {"later": {"a": [1, None]}}
    request["samples"][0]["later"] = "x"
    request["samples"][0]["context"]["later"] = -1
    found = probe.predict(request)
    if probe.manifest.determinism.same_seed_same_pixels:
        expect(same_frames(plain, found), "an unknown field changed the pixels")
    return "ignored in the request, a sample and a context"


def stable_manifest(probe: Probe) -> str:
    """The manifest at the end is the manifest of the beginning."""
    now: Capabilities = parsed(Capabilities, probe.ask("GET", "/v1/capabilities"))
    expect(now == probe.manifest, "the capabilities changed while the suite ran")
    return "unchanged"


def no_leaks(probe: Probe) -> str:
    """No answer named a path or a traceback."""
    expect(not probe.leaks, f"{len(probe.leaks)} answers show the server's insides, the first: {probe.leaks[:1]}")
    return "no path, no traceback in any answer"


def _renewed(request: dict[str, Any]) -> dict[str, Any]:
    """A copy under a new id."""
    return copy.deepcopy(request) | {"request_id": str(uuid.uuid4())}
