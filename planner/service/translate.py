"""From a v1 request to a ``RolloutRequest``, and from a ``Rollout`` to a v1 answer. Everything is checked before anything is computed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.types import Rollout, RolloutRequest, WorldModelSpec

from .faults import ServiceFault, invalid
from .limits import ServiceLimits, check_json_size
from .offers import Offer, model_version
from .pictures import decode_png, encode_png
from .schema import API_VERSION, PredictRequest, Sample, SentImage, request_id_of, validated


@dataclass(slots=True, kw_only=True)
class Prepared:
    """A request that is valid throughout. ``digest``: of its JSON value, whatever the order of keys and the white space."""

    request_id: str
    digest: bytes
    sample_ids: list[str]
    offer: Offer
    rollout: RolloutRequest


def prepare(body: bytes, spec: WorldModelSpec, offers: dict[str, Offer], limits: ServiceLimits) -> Prepared:
    """Read and check one request. ``ServiceFault`` INVALID_ARGUMENT, UNSUPPORTED_VERSION or MISSING_CAPABILITY, with the request's id
    where it can be read."""
    value = _parsed(body, limits)
    try:
        _check_version(value)
        request: PredictRequest = validated(PredictRequest, value)
        offer = _offer_of(request, spec, offers)
        _check_samples(request, limits)
        rollout = _rollout_request(request.samples, offer, spec, limits)
        digest = _digest(value)
    except ServiceFault as fault:
        fault.request_id = request_id_of(value)
        raise
    return Prepared(
        request_id=request.request_id,
        digest=digest,
        sample_ids=[sample.sample_id for sample in request.samples],
        offer=offer,
        rollout=rollout,
    )


def answer(prepared: Prepared, rollout: Rollout, spec: WorldModelSpec) -> bytes:
    """The JSON document of a successful answer. A model that returns other frames than it promised is a ``RuntimeError``."""
    frames = rollout.frames_BSVTHWC
    count, offer = len(prepared.sample_ids), prepared.offer
    wanted = (count, 1, 1, offer.horizon, spec.views.height, spec.views.width, 3)
    if frames is None or frames.shape != wanted or frames.dtype != np.uint8:
        got = None if frames is None else f"{frames.dtype} {frames.shape}"
        raise RuntimeError(f"the world model returned frames {got}, its spec promised uint8 {wanted}")
    skipped = offer.horizon - offer.frames
    predictions = [
        {"sample_id": name, "frames": [_image(picture) for picture in frames[i, 0, 0, skipped:]]}
        for i, name in enumerate(prepared.sample_ids)
    ]
    diagnostics: dict[str, Any] = {"seconds": float(rollout.cost.get("seconds", 0.0))}
    if skipped:
        diagnostics["first_frames"] = [_image(picture) for picture in frames[:, 0, 0, 0]]
    document = {
        "api_version": API_VERSION,
        "request_id": prepared.request_id,
        "model_version": model_version(spec),
        "predictions": predictions,
        "diagnostics": diagnostics,
    }
    return json.dumps(document).encode()


def _parsed(body: bytes, limits: ServiceLimits) -> Any:
    from pydantic_core import from_json

    check_json_size(body, limits)
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError:
        raise invalid("request: not JSON (UTF-8, finite numbers, at most 200 levels)") from None
    if not isinstance(value, dict):
        raise invalid("request: not a JSON object")
    return value


def _digest(value: Any) -> bytes:
    try:
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
    except ValueError:  # a whole number of thousands of digits, in a field that nobody reads
        raise invalid("request: a number is too long") from None


def _check_version(value: dict[str, Any]) -> None:
    found = value.get("api_version")
    if isinstance(found, str) and found != API_VERSION:
        raise ServiceFault("UNSUPPORTED_VERSION", f"api_version: this service speaks {API_VERSION}")


def _offer_of(request: PredictRequest, spec: WorldModelSpec, offers: dict[str, Offer]) -> Offer:
    if "actions" not in spec.conditions and any(sample.actions for sample in request.samples):
        message = "samples[].actions: this model is driven by text and cannot follow actions"
        raise ServiceFault("MISSING_CAPABILITY", message, needs="actions")
    if request.model_version != model_version(spec):
        raise ServiceFault("UNSUPPORTED_VERSION", f"model_version: this service runs {model_version(spec)}")
    offer = offers.get(request.profile_id)
    if offer is None:
        raise ServiceFault("UNSUPPORTED_VERSION", f"profile_id: this service offers {', '.join(offers)}")
    return offer


def _check_samples(request: PredictRequest, limits: ServiceLimits) -> None:
    if len(request.samples) > limits.max_batch_size:
        raise invalid(f"samples: {len(request.samples)}, at most {limits.max_batch_size} in one request")
    if len({sample.sample_id for sample in request.samples}) < len(request.samples):
        raise invalid("samples: each sample_id once")


def _rollout_request(
    samples: list[Sample], offer: Offer, spec: WorldModelSpec, limits: ServiceLimits
) -> RolloutRequest:
    contexts, states, actions, instructions = [], [], [], []
    for i, sample in enumerate(samples):
        at = f"samples[{i}]"
        _check_length(sample, offer, at)
        contexts.append(_frames(sample.context.frames, spec, f"{at}.context.frames"))
        width = offer.action_dim or None
        _matrix(sample.context.actions, spec.context_frames - 1, width, f"{at}.context.actions")
        states.append(_states(sample, offer, spec, f"{at}.context.states"))
        instructions.append(_instruction(sample, offer, spec, limits, f"{at}.context.instruction"))
        if offer.action_dim:
            rows = _matrix(sample.actions or [], offer.frames, offer.action_dim, f"{at}.actions")
            actions.append(rows.reshape(offer.frames * offer.rows_per_frame, -1))
    return RolloutRequest(
        context_BVTHWC=np.stack(contexts)[:, None],
        instructions=instructions,
        seeds_BS=np.array([[sample.seed] for sample in samples], np.int64),
        horizon=offer.horizon,
        proprioception_BKA=np.stack(states) if offer.state_dim else None,
        actions_BSPA=np.stack(actions)[:, None] if actions else None,
    )


def _check_length(sample: Sample, offer: Offer, at: str) -> None:
    if offer.driven_by == "actions" and sample.actions is None:
        raise invalid(f"{at}.actions: missing, the profile {offer.profile_id} is driven by actions")
    if sample.horizon not in (None, offer.horizon):
        raise invalid(f"{at}.horizon: {offer.horizon} in the profile {offer.profile_id}")


def _frames(images: list[SentImage], spec: WorldModelSpec, at: str) -> NDArray[np.uint8]:
    """-> uint8 [T,H,W,3]. The announced size is compared before a picture is looked at."""
    if len(images) != spec.context_frames:
        raise invalid(f"{at}: {len(images)} frames, wanted {spec.context_frames}")
    height, width = spec.views.height, spec.views.width
    pictures = []
    for j, image in enumerate(images):
        if (image.height, image.width) != (height, width):
            raise invalid(f"{at}[{j}]: {image.height}x{image.width}, wanted {height}x{width}")
        try:
            pictures.append(decode_png(image.data, height, width))
        except ValueError as error:
            raise invalid(f"{at}[{j}].data: {error}") from None
    return np.stack(pictures)


def _states(sample: Sample, offer: Offer, spec: WorldModelSpec, at: str) -> NDArray[np.float32]:
    """-> joint targets at the lags [K,A], of the last row; [0] for a model without proprioception."""
    rows = sample.context.states
    if not offer.state_dim:
        if rows is not None:
            _matrix(rows, spec.context_frames, None, at)
        return np.zeros(0, np.float32)
    if rows is None:
        raise invalid(f"{at}: missing, the profile {offer.profile_id} needs {offer.state_dim} numbers")
    found = _matrix(rows, spec.context_frames, offer.state_dim, at)
    return found[-1].reshape(len(spec.proprioception_lags), -1)


def _instruction(sample: Sample, offer: Offer, spec: WorldModelSpec, limits: ServiceLimits, at: str) -> str:
    text = sample.context.instruction or ""
    if len(text) > limits.instruction_chars:
        raise invalid(f"{at}: {len(text)} characters, at most {limits.instruction_chars}")
    if not text.strip() and offer.driven_by == "text" and "text" in spec.conditions:
        raise invalid(f"{at}: missing, the profile {offer.profile_id} is driven by it")
    return text


def _matrix(rows: list[list[float]], count: int, width: int | None, at: str) -> NDArray[np.float32]:
    """Rows of numbers -> float32 [count, width] (None: any one width)."""
    if len(rows) != count:
        raise invalid(f"{at}: {len(rows)} rows, wanted {count}")
    wanted = width if width is not None else len(rows[0]) if rows else 0
    for j, row in enumerate(rows):
        if len(row) != wanted:
            raise invalid(f"{at}[{j}]: {len(row)} numbers, wanted {wanted}")
    return np.array(rows, np.float32).reshape(count, wanted)


def _image(picture_HWC: NDArray[np.uint8]) -> dict[str, Any]:
    height, width = picture_HWC.shape[:2]
    return {
        "encoding": "png_base64",
        "color_space": "RGB",
        "height": height,
        "width": width,
        "channels": 3,
        "data": encode_png(picture_HWC),
    }
