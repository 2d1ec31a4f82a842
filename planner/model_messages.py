"""World-model requests and answers as ``core.wire`` messages; what arrives is checked before anything is made of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from physisforcing.core.types import ActionSpec, FeatureRequest, Rollout, RolloutRequest, ViewLayout, WorldModelSpec
from physisforcing.core.wire import Limits, WireError

SERVICE = "physis model"
#: A request holds pictures of now, an answer videos.
REQUEST_LIMITS = Limits(message_bytes=128 * 2**20, array_bytes=128 * 2**20)
ANSWER_LIMITS = Limits(message_bytes=1024 * 2**20, array_bytes=1024 * 2**20)
#: Samples (B x S) of one request.
MOST_SAMPLES = 1024
_REQUEST_ARRAYS = ("context_BVTHWC", "seeds_BS", "proprioception_BKA", "actions_BSPA", "goal_BVHWC")
_ANSWER_ARRAYS = ("times_T", "frames_BSVTHWC", "latents_BSCFhw", "features_BSKFhwD")


def pack_request(request: RolloutRequest) -> dict[str, Any]:
    """A request as plain values and arrays."""
    features = None if request.features is None else dataclasses.asdict(request.features)
    return {name: getattr(request, name) for name in _REQUEST_ARRAYS} | {
        "instructions": list(request.instructions),
        "horizon": request.horizon,
        "returns": sorted(request.returns),
        "features": features,
        "ids": None if request.ids is None else [list(entry) for entry in request.ids],
        "plan_steps": None if request.plan_steps is None else list(request.plan_steps),
    }


def unpack_request(message: Any) -> RolloutRequest:
    """``WireError`` for anything that ``pack_request`` does not make; whether the model can do it is not checked here."""
    names = {field.name for field in dataclasses.fields(RolloutRequest)}
    _check(isinstance(message, dict) and set(message) == names, "request", message, f"a map of {sorted(names)}")
    for name in _REQUEST_ARRAYS:
        optional = name not in ("context_BVTHWC", "seeds_BS")
        fine = isinstance(message[name], np.ndarray) or (optional and message[name] is None)
        _check(fine, name, message[name], "an array")
    seeds = message["seeds_BS"]
    fine = seeds.ndim == 2 and seeds.dtype.kind == "i" and seeds.size <= MOST_SAMPLES
    _check(fine, "seeds_BS", f"{seeds.dtype} {seeds.shape}", f"integers [B,S], at most {MOST_SAMPLES} of them")
    _check(type(message["horizon"]) is int, "horizon", message["horizon"], "a whole number")
    for name in ("instructions", "returns"):
        fine = isinstance(message[name], list) and all(type(text) is str for text in message[name])
        _check(fine, name, message[name], "a list of texts")
    ids = message["ids"]
    if ids is not None:
        fine = isinstance(ids, list) and all(_is_id(entry) for entry in ids)
        _check(fine, "ids", ids, "a list of [task, episode seed, number of the plan]")
        ids = [(task, seed, plan) for task, seed, plan in ids]
    steps = message["plan_steps"]
    fine = steps is None or (isinstance(steps, list) and all(type(step) is int for step in steps))
    _check(fine, "plan_steps", steps, "a list of whole numbers")
    return RolloutRequest(
        **{name: message[name] for name in (*_REQUEST_ARRAYS, "instructions", "horizon")},
        returns=frozenset(message["returns"]),
        features=_features(message["features"]),
        ids=ids,
        plan_steps=steps,
    )


def pack_rollout(rollout: Rollout) -> dict[str, Any]:
    """An answer as plain values and arrays."""
    return {name: getattr(rollout, name) for name in _ANSWER_ARRAYS} | {"cost": dict(rollout.cost)}


def unpack_rollout(message: Any) -> Rollout:
    """``WireError`` for anything that ``pack_rollout`` does not make."""
    names = {*_ANSWER_ARRAYS, "cost"}
    _check(isinstance(message, dict) and set(message) == names, "rollout", message, f"a map of {sorted(names)}")
    for name in _ANSWER_ARRAYS:
        fine = isinstance(message[name], np.ndarray) or (name != "times_T" and message[name] is None)
        _check(fine, name, message[name], "an array")
    cost = message["cost"]
    fine = isinstance(cost, dict) and all(type(value) in (int, float) for value in cost.values())
    _check(fine, "cost", cost, "numbers by name")
    return Rollout(**{name: message[name] for name in _ANSWER_ARRAYS}, cost={k: float(v) for k, v in cost.items()})


def pack_spec(spec: WorldModelSpec) -> dict[str, Any]:
    """A spec as plain values; sets become sorted lists."""
    message = dataclasses.asdict(spec)
    return message | {name: sorted(message[name]) for name in ("conditions", "returns")}


def unpack_spec(message: Any) -> WorldModelSpec:
    """``WireError`` for anything that ``pack_spec`` does not make."""
    try:
        values = dict(message)
        values |= {name: frozenset(values[name]) for name in ("conditions", "returns")}
        values["views"] = ViewLayout(**values["views"])
        if values["action_spec"] is not None:
            values["action_spec"] = ActionSpec(**values["action_spec"])
        return WorldModelSpec(**values)
    except (TypeError, ValueError, KeyError) as error:
        raise _refused("spec", str(error)[:200], "a world model's spec") from error


def _features(message: Any) -> FeatureRequest | None:
    if message is None:
        return None
    names = {"taps", "sigma", "first_frame_mask"}
    fine = isinstance(message, dict) and set(message) == names
    fine = fine and isinstance(message["taps"], list | tuple) and all(type(tap) is int for tap in message["taps"])
    fine = fine and type(message["sigma"]) in (int, float) and type(message["first_frame_mask"]) is str
    _check(fine, "features", message, f"a map of {sorted(names)}")
    return FeatureRequest(
        taps=tuple(message["taps"]),
        sigma=float(message["sigma"]),
        first_frame_mask=message["first_frame_mask"],
    )


def _is_id(entry: Any) -> bool:
    return isinstance(entry, list | tuple) and [type(part) for part in entry] == [str, int, int]


def _check(fine: bool, field: str, got: Any, wanted: str) -> None:
    if not fine:
        shown = got if isinstance(got, str) else f"{type(got).__name__} {str(got)[:100]}"
        raise _refused(field, shown, wanted)


def _refused(field: str, got: str, wanted: str) -> WireError:
    return WireError(field, got=got, wanted=wanted, fix="use the same version of physisforcing on both sides")
