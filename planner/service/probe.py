"""What the conformance suite asks a server with: valid requests from its own manifest, and every answer looked at for what it should not say."""

from __future__ import annotations

import json
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .http import Address, NoReplyError, Reply, exchange
from .pictures import decode_png, encode_png
from .schema import API_VERSION, Capabilities, ErrorBody, ErrorDetails, PredictResponse, Profile, Strict

#: Traces of the server's insides: a Python traceback, a path of its file system.
_LEAK = re.compile(
    rb"Traceback|File \\?\"|(?:^|[\s\"'(=])/(?:home|root|usr|var|tmp|opt|mnt|srv|workspace)/", re.IGNORECASE
)


class FailedError(AssertionError):
    """The server does not keep the contract; the text says where."""


class SkippedError(Exception):
    """This check cannot be made here; the text says why."""


@dataclass(slots=True, kw_only=True)
class SuiteOptions:
    """``timeout_s``: after which an answer counts as missing (0: what the server recommends, 60 before it has said). ``clients``: at the same time, ``rounds`` requests each. ``examples``:
    of each kind of fuzzing. ``largest_batch``: at most so many samples in a batch, also where the server takes more. ``seed``: of
    pictures, actions and fuzzing."""

    timeout_s: float = 0.0
    clients: int = 8
    rounds: int = 2
    examples: int = 100
    largest_batch: int = 8
    seed: int = 0


@dataclass(slots=True, kw_only=True)
class Probe:
    """One server. ``leaks``: where an answer named its insides."""

    address: Address
    token: str
    options: SuiteOptions
    capabilities: Capabilities | None = None
    leaks: list[str] = field(default_factory=list)

    @property
    def timeout_s(self) -> float:
        """Seconds for one exchange."""
        if self.options.timeout_s or self.capabilities is None:
            return self.options.timeout_s or 60.0
        return self.capabilities.limits.recommended_timeout_ms / 1000 + 5

    # ------------------------------------------------------------------ asking

    def ask(
        self, method: str, path: str, body: bytes | None = None, *, token: str | None = None, **headers: str
    ) -> Reply:
        """One exchange; ``FailedError`` when no whole answer comes in time."""
        sent = {"content-type": "application/json"} if body is not None else {}
        given = self.token if token is None else token
        if given:
            sent["authorization"] = f"Bearer {given}"
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            reply = exchange(self.address, method, path, body, sent, timeout_s=self.timeout_s)
        except NoReplyError as error:
            raise FailedError(f"{method} {path}: {error}") from error
        found = _LEAK.search(reply.body)
        if found is not None:
            self.leaks.append(f"{method} {path} ({reply.status}): ...{found[0].decode('latin-1')}...")
        return reply

    def post(self, body: bytes | dict[str, Any], **headers: str) -> Reply:
        """``POST /v1/predict``, again while the server is overloaded (at most for ``timeout_s``)."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        deadline = time.monotonic() + self.timeout_s
        while True:
            reply = self.ask("POST", "/v1/predict", data, **headers)
            if reply.status != 429 or time.monotonic() > deadline:
                return reply
            asked = reply.headers.get("retry-after", "")
            time.sleep(min(float(asked) if asked.isdecimal() else 0.25, 2.0))

    def predict(self, request: dict[str, Any]) -> list[NDArray[np.uint8]]:
        """Frames [T,H,W,3] of each sample; ``FailedError`` unless the answer is complete and belongs to the request."""
        return self.frames(self.post(request), request)

    def frames(self, reply: Reply, request: dict[str, Any]) -> list[NDArray[np.uint8]]:
        """The pixels of a successful answer to ``request``."""
        if reply.status != 200:
            raise FailedError(f"a valid request got {reply.status}: {reply.body[:200]!r}")
        answer: PredictResponse = parsed(PredictResponse, reply)
        for name in ("api_version", "request_id", "model_version"):
            expect(getattr(answer, name) == request[name], f"{name} is not echoed")
        sent = [sample["sample_id"] for sample in request["samples"]]
        expect([p.sample_id for p in answer.predictions] == sent, "sample_ids are not those of the request, in order")
        profile = self.profile(request["profile_id"])
        found = []
        for prediction, sample in zip(answer.predictions, request["samples"], strict=True):
            wanted = len(sample["actions"]) if sample.get("actions") else profile.prediction_frames.min
            expect(len(prediction.frames) == wanted, f"{len(prediction.frames)} frames for {wanted}")
            try:
                size = profile.image.height, profile.image.width
                pictures = [decode_png(image.data, *size) for image in prediction.frames]
            except ValueError as error:
                raise FailedError(f"a frame of the answer cannot be read: {error}") from error
            found.append(np.stack(pictures))
        return found

    # ------------------------------------------------------------------ making requests

    @property
    def manifest(self) -> Capabilities:
        if self.capabilities is None:
            raise SkippedError("the capabilities could not be read")
        return self.capabilities

    def profile(self, profile_id: str | None = None) -> Profile:
        """The first profile, or the one of this name."""
        return next(p for p in self.manifest.profiles if profile_id in (None, p.profile_id))

    def request(self, count: int = 1, *, profile: Profile | None = None, first_seed: int = 0) -> dict[str, Any]:
        """A valid request of ``count`` samples, with an id of its own. Content depends on ``options.seed`` and ``first_seed`` alone."""
        profile = profile or self.profile()
        random = np.random.default_rng([self.options.seed, first_seed])
        return {
            "api_version": API_VERSION,
            "request_id": str(uuid.uuid4()),
            "model_version": self.manifest.model_version,
            "profile_id": profile.profile_id,
            "samples": [_sample(profile, random, i, first_seed + i) for i in range(count)],
        }

    @property
    def batch(self) -> int:
        """Samples of the largest batch that is tried."""
        return min(self.manifest.limits.max_batch_size, self.options.largest_batch)


def _sample(profile: Profile, random: np.random.Generator, index: int, seed: int) -> dict[str, Any]:
    image, count = profile.image.model_dump(), profile.context_frames.min
    context: dict[str, Any] = {
        "frames": [{**image, "data": encode_png(_picture(profile, random))} for _ in range(count)],
        "actions": _rows(random, count - 1, profile.action.dimension or 0),
    }
    if profile.state.supported:
        context["states"] = _rows(random, count, profile.state.dimension or 0)
    if profile.instruction.supported:
        context["instruction"] = "move the arm to the object"
    sample: dict[str, Any] = {"sample_id": f"sample-{index}", "seed": seed, "context": context}
    if profile.driven_by == "actions":
        sample["actions"] = _rows(random, profile.prediction_frames.min, profile.action.dimension or 0)
    else:
        sample["horizon"] = profile.prediction_frames.min
    return sample


def _picture(profile: Profile, random: np.random.Generator) -> NDArray[np.uint8]:
    """Large coloured squares: compresses well, and no two are alike."""
    height, width = profile.image.height, profile.image.width
    coarse = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]


def _rows(random: np.random.Generator, count: int, width: int) -> list[list[float]]:
    """Numbers around 0 that are exact in float32."""
    return (random.integers(-64, 65, (count, width)) / 512).tolist()


def expect(fine: bool, otherwise: str) -> None:
    """``FailedError`` unless ``fine``."""
    if not fine:
        raise FailedError(otherwise)


def parsed(model: type[Strict], reply: Reply) -> Any:
    """The answer as one of the contract's messages."""
    try:
        return model.model_validate_json(reply.body)
    except ValueError as error:
        first = " ".join(str(error).split())[:200]
        raise FailedError(f"status {reply.status}, but no {model.__name__}: {first}") from error


def typed_error(reply: Reply, *statuses: int, code: str | None = None) -> ErrorDetails:
    """The error of an answer that has one of ``statuses`` (none: any 4xx)."""
    fine = reply.status in statuses if statuses else 400 <= reply.status < 500
    wanted = " or ".join(map(str, statuses)) or "4xx"
    expect(fine, f"status {reply.status}, wanted {wanted}")
    found: ErrorDetails = parsed(ErrorBody, reply).error
    if code is not None:
        expect(found.code == code, f"status {reply.status} with code {found.code}, wanted {code}")
    return found


def same_frames(first: list[NDArray[np.uint8]], second: list[NDArray[np.uint8]]) -> bool:
    """Whether all pixels are equal."""
    return len(first) == len(second) and all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
