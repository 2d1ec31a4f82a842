"""``HttpWorldModel``: a world model that is served elsewhere by the v1 contract, as a ``core.protocols.WorldModel``."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.connection import TOKEN_VARIABLE
from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.requests import check_request
from physisforcing.core.types import DT, ActionSpec, Rollout, RolloutRequest, ViewLayout, WorldModelSpec

from ..contract_checks import spec_problems
from .http import Address, NoReplyError, Reply, TooLargeError, exchange, token_for
from .manifest import LIMITS, answer_bytes, manifest_problems
from .pictures import decode_png, encode_png
from .schema import API_VERSION, Capabilities, ErrorBody, ErrorDetails, Health, PredictResponse, Profile, Strict

#: What helps, by error code.
_FIXES = {
    "UNAUTHENTICATED": f"pass token=..., or set {TOKEN_VARIABLE}",
    "UNSUPPORTED_VERSION": "connect again: the server runs another model than when this client asked",
    "PAYLOAD_TOO_LARGE": "send fewer samples at once",
}
_RETRIED = frozenset({429, 502, 503, 504})


class ServiceError(RuntimeError):
    """The service did not answer, or failed. ``status`` 0: no whole answer came. ``code``: the service's, or ``NO_REPLY``,
    ``BAD_REPLY``. ``retryable``: whether the same request may succeed later (this client has tried already)."""

    def __init__(self, message: str, *, code: str, status: int = 0, retryable: bool = True) -> None:
        super().__init__(message)
        self.code, self.status, self.retryable = code, status, retryable


@dataclass(slots=True, kw_only=True)
class HttpSettings:
    """``timeout_s``: for one exchange (0: what the server recommends). ``attempts``: tries in all, with the same request id.
    ``backoff_s``: before the second try, doubled each time; a server's Retry-After counts instead, up to ``longest_wait_s``.
    ``frame_dt``: seconds between frames of a server that does not say it."""

    timeout_s: float = 0.0
    attempts: int = 5
    backoff_s: float = 0.25
    longest_wait_s: float = 30.0
    frame_dt: float = DT


class HttpWorldModel:
    """Asks the service for its capabilities once; ``rollout`` sends as many requests as its batch bound demands.

    Frames come back as the service made them; in a profile driven by actions the picture of time 0 is the model's own where the
    service sends it, else the context. ``token``: for this server; by default the variable PHYSIS_TOKEN, which goes over https or to
    this machine only.

    The server is not trusted: what its manifest says is bounded (``manifest.ManifestLimits``) and has to be a sound spec, and no answer
    is read beyond what was asked for. Raises ``UserError`` for what the service refuses as wrong, ``MissingCapabilityError`` for what
    it does not offer, and ``ServiceError`` when it does not answer, is overloaded to the last attempt, fails, or says something else
    than it promised (``BAD_REPLY``).
    """

    def __init__(self, url: str, *, token: str | None = None, settings: HttpSettings | None = None) -> None:
        self._address = Address.of(url)
        self._token = token_for(self._address, token, TOKEN_VARIABLE)
        self.settings = settings or HttpSettings()
        self.capabilities: Capabilities = _read(Capabilities, self._call("GET", "/v1/capabilities", None, 30.0))
        self._spec = trusted_spec(self.capabilities, self.settings.frame_dt)

    @property
    def spec(self) -> WorldModelSpec:
        return self._spec

    def health(self) -> str:
        """``ready``, ``starting`` or ``degraded``."""
        found: Health = _read(Health, self._call("GET", "/v1/health", None, 10.0))
        return found.status

    def rollout(self, request: RolloutRequest) -> Rollout:
        """See core's ``WorldModel``."""
        check_request(request, self._spec)
        begun = time.perf_counter()
        profile = self._profile(request)
        batch, samples = request.seeds_BS.shape
        places = [(b, s) for b in range(batch) for s in range(samples)]
        most = self.capabilities.limits.max_batch_size
        frames, seconds = [], 0.0
        for start in range(0, len(places), most):
            part, computed = self._predict(request, profile, places[start : start + most])
            frames += part
            seconds += computed
        stacked = np.stack(frames).reshape(batch, samples, 1, *frames[0].shape)
        return Rollout(
            times_T=np.arange(request.horizon, dtype=np.float64) * self._spec.frame_dt,
            frames_BSVTHWC=stacked,
            cost={"seconds": time.perf_counter() - begun, "server_seconds": seconds},
        )

    # ------------------------------------------------------------------ one request

    def _profile(self, request: RolloutRequest) -> Profile:
        by = "text" if request.actions_BSPA is None else "actions"
        wanted = request.horizon - (by == "actions")
        for profile in self.capabilities.profiles:
            if profile.driven_by == by and profile.prediction_frames.min <= wanted <= profile.prediction_frames.max:
                return profile
        needs = "actions" if by == "text" else "a profile driven by actions"
        got = f"{request.horizon} frames, driven by {by}"
        offered = ", ".join(profile.profile_id for profile in self.capabilities.profiles)
        raise MissingCapabilityError(needs, got=got, wanted=f"one of the profiles {offered}", fix="see capabilities")

    def _predict(
        self, request: RolloutRequest, profile: Profile, places: list[tuple[int, int]]
    ) -> tuple[list[NDArray[np.uint8]], float]:
        """-> (frames [T,H,W,3] of each place, seconds that the server says it took)."""
        request_id = str(uuid.uuid4())
        document = {
            "api_version": API_VERSION,
            "request_id": request_id,
            "model_version": self.capabilities.model_version,
            "profile_id": profile.profile_id,
            "samples": [_sample(request, profile, b, s) for b, s in places],
        }
        timeout_s = self.settings.timeout_s or self.capabilities.limits.recommended_timeout_ms / 1000 + 5
        most = answer_bytes(profile, len(places), request.horizon)
        reply = self._call("POST", "/v1/predict", json.dumps(document).encode(), timeout_s, most)
        answer: PredictResponse = _read(PredictResponse, reply)
        if answer.request_id != request_id or answer.model_version != self.capabilities.model_version:
            raise _bad("another request_id or model_version than was asked for")
        if [prediction.sample_id for prediction in answer.predictions] != [f"{b}-{s}" for b, s in places]:
            raise _bad("other sample_ids than were asked for")
        first = answer.diagnostics.first_frames if answer.diagnostics is not None else None
        if first is not None and len(first) != len(places):
            raise _bad("another number of first frames than samples")
        found = []
        by_actions = profile.driven_by == "actions"
        for i, (prediction, (b, _)) in enumerate(zip(answer.predictions, places, strict=True)):
            if len(prediction.frames) + by_actions != request.horizon:
                raise _bad(f"{len(prediction.frames)} frames for sample {i}, wanted {request.horizon} with time 0")
            frames = [_decoded(image, profile) for image in prediction.frames]
            if by_actions:
                frames.insert(0, request.context_BVTHWC[b, 0, -1] if first is None else _decoded(first[i], profile))
            found.append(np.stack(frames))
        return found, answer.diagnostics.seconds if answer.diagnostics is not None else 0.0

    def _call(
        self, method: str, path: str, body: bytes | None, timeout_s: float, most_bytes: int = LIMITS.body_bytes
    ) -> Reply:
        """The answer of status 200; tried again where the contract says that this may help."""
        headers = {"content-type": "application/json"} if body is not None else {}
        if self._token:
            headers["authorization"] = f"Bearer {self._token}"
        wait_s = self.settings.backoff_s
        for attempt in range(1, self.settings.attempts + 1):
            last = attempt == self.settings.attempts
            try:
                reply = exchange(self._address, method, path, body, headers, timeout_s=timeout_s, most_bytes=most_bytes)
            except TooLargeError as error:
                raise _bad(str(error)) from error
            except NoReplyError as error:
                if last or error.timed_out:
                    raise ServiceError(f"no answer from the world model: {error}", code="NO_REPLY") from error
                time.sleep(wait_s)
            else:
                if reply.status == 200:
                    return reply
                if last or reply.status not in _RETRIED:
                    raise _error(reply)
                asked = reply.headers.get("retry-after", "")
                time.sleep(min(float(asked) if asked.isdecimal() else wait_s, self.settings.longest_wait_s))
            wait_s *= 2
        raise AssertionError("attempts are at least 1")


def trusted_spec(capabilities: Capabilities, frame_dt: float = DT) -> WorldModelSpec:
    """The spec of an untrusted server's manifest. ``ServiceError`` BAD_REPLY for one that is out of bounds or describes no world model,
    ``MissingCapabilityError`` for a sound one that core's requests cannot serve."""
    problems = manifest_problems(capabilities)
    if problems:
        raise _bad_manifest(problems)
    try:
        spec = spec_of(capabilities, frame_dt)
    except MissingCapabilityError:
        raise
    except UserError as error:  # the layout of its views
        raise _bad_manifest([str(error)[:300]]) from error
    problems = spec_problems(spec)
    if problems:
        raise _bad_manifest(problems)
    return spec


def spec_of(capabilities: Capabilities, frame_dt: float = DT) -> WorldModelSpec:
    """The spec that a manifest describes. A server that is not ours says less: its horizons are the range of its first profile driven
    by actions, its action limits are unknown (infinite), its frames ``frame_dt`` apart."""
    info, first = capabilities.world_model, capabilities.profiles[0]
    image, same = first.image, capabilities.determinism.same_seed_same_pixels
    common: dict[str, Any] = {
        "returns": frozenset({"frames"}),
        "max_batch": capabilities.limits.max_batch_size,
        "deterministic": same,
        "fingerprint": capabilities.model_version if info is None else info.fingerprint,
    }
    if info is not None:
        names, action = tuple(info.views), info.action
        tiles: Any = tuple(tuple(tile) for tile in info.tiles)
        return WorldModelSpec(
            name=info.name,
            views=ViewLayout(names=names, height=image.height, width=image.width, tiles=tiles),
            context_frames=info.context_frames,
            horizons=tuple(info.horizons),
            frame_dt=info.frame_dt,
            conditions=frozenset(info.conditions),
            proprioception_lags=tuple(info.proprioception_lags),
            action_spec=None
            if action is None
            else ActionSpec(names=tuple(action.names), low=tuple(action.low), high=tuple(action.high), dt=action.dt),
            **common,
        )
    if first.context_frames.min > 1:
        raise MissingCapabilityError(
            "context_frames",
            got=f"at least {first.context_frames.min} history frames with the actions between them",
            wanted="a server that predicts from one frame",
            fix="core's RolloutRequest carries no action history",
        )
    count = first.action.dimension or 0
    conditions = {"actions"} | ({"text"} if first.instruction.supported else set())
    conditions |= {"proprioception"} if first.state.required else set()
    return WorldModelSpec(
        name=capabilities.model_version,
        views=ViewLayout(height=image.height, width=image.width),
        context_frames=1,
        horizons=tuple(range(first.prediction_frames.min + 1, first.prediction_frames.max + 2)),
        frame_dt=frame_dt,
        conditions=frozenset(conditions),
        proprioception_lags=(0,) if first.state.required else (),
        action_spec=ActionSpec(
            names=tuple(f"action{i}" for i in range(count)),
            low=(-np.inf,) * count,
            high=(np.inf,) * count,
            dt=frame_dt,
        ),
        **common,
    )


def _sample(request: RolloutRequest, profile: Profile, b: int, s: int) -> dict[str, Any]:
    frames = request.context_BVTHWC[b, 0]
    image = profile.image.model_dump()
    context: dict[str, Any] = {
        "frames": [{**image, "data": encode_png(picture)} for picture in frames],
        "actions": [[0.0] * (profile.action.dimension or 0)] * (len(frames) - 1),
    }
    if profile.instruction.supported and request.instructions[b]:
        context["instruction"] = request.instructions[b]
    if profile.state.supported and request.proprioception_BKA is not None:
        context["states"] = [request.proprioception_BKA[b].ravel().tolist()] * len(frames)
    sample = {"sample_id": f"{b}-{s}", "seed": int(request.seeds_BS[b, s]), "context": context}
    if request.actions_BSPA is not None:
        rows = request.actions_BSPA[b, s]
        sample["actions"] = rows.reshape(request.horizon - 1, -1).astype(np.float64).tolist()
    else:
        sample["horizon"] = request.horizon
    return sample


def _decoded(image: Any, profile: Profile) -> NDArray[np.uint8]:
    height, width = profile.image.height, profile.image.width
    try:
        return decode_png(image.data, height, width)
    except ValueError as error:
        raise _bad(f"a frame that cannot be read: {error}") from error


def _read(model: type[Strict], reply: Reply) -> Any:
    try:
        return model.model_validate_json(reply.body)
    except ValueError as error:
        raise _bad(f"not a {model.__name__}: {str(error)[:300]}") from error


def _bad(what: str) -> ServiceError:
    return ServiceError(
        f"the world model's answer does not keep the contract: {what}", code="BAD_REPLY", retryable=False
    )


def _bad_manifest(problems: list[str]) -> ServiceError:
    return _bad(f"capabilities: {'; '.join(problems[:5])}")


def _error(reply: Reply) -> Exception:
    """What an answer other than 200 means to the caller."""
    try:
        found: ErrorDetails = ErrorBody.model_validate_json(reply.body).error
    except ValueError:
        return ServiceError(f"HTTP {reply.status} without a typed error", code="BAD_REPLY", status=reply.status)
    if found.needs is not None:
        fix = "ask the model for what its capabilities offer"
        return MissingCapabilityError(found.needs, got=found.message, wanted="a model that offers it", fix=fix)
    if reply.status < 500 and reply.status != 429:
        fix = _FIXES.get(found.code, "correct the request")
        return UserError("world model service", got=found.code, wanted=found.message, fix=fix)
    text = f"the world model answered {reply.status} {found.code}: {found.message}"
    return ServiceError(text, code=found.code, status=reply.status, retryable=found.retryable)
