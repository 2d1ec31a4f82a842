"""Requests to a world model as data: checked against its spec, merged, split again, and computed in parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.protocols import WorldModel
from physisforcing.core.types import Rollout, RolloutRequest, WorldModelSpec

#: Fields of a request, and of a rollout, whose first axis are the contexts.
_CONTEXT_FIELDS = ("context_BVTHWC", "proprioception_BKA", "actions_BSPA", "goal_BVHWC")
_ANSWER_FIELDS = ("frames_BSVTHWC", "latents_BSCFhw", "features_BSKFhwD")


def kind_of(request: RolloutRequest) -> tuple[Any, ...]:
    """What two requests must have in common to be merged."""
    arrays = [getattr(request, name) for name in _CONTEXT_FIELDS]
    shapes = tuple(None if array is None else (array.dtype.str, array.shape[1:]) for array in arrays)
    return request.horizon, request.returns, request.features, request.seeds_BS.shape[1], shapes


def merge(requests: Sequence[RolloutRequest]) -> RolloutRequest:
    """Requests of one kind as one, along B."""
    if len(requests) == 1:
        return requests[0]
    joined: dict[str, Any] = {
        name: None
        if getattr(requests[0], name) is None
        else np.concatenate([getattr(request, name) for request in requests])
        for name in (*_CONTEXT_FIELDS, "seeds_BS")
    }
    instructions = [sentence for request in requests for sentence in request.instructions]
    return dataclasses.replace(requests[0], instructions=instructions, **joined)


def split(answer: Rollout, requests: Sequence[RolloutRequest]) -> list[Rollout]:
    """The answer to ``merge(requests)`` -> the answer of each. Arrays are copied, so that nobody holds on to the others'."""
    total = sum(int(request.seeds_BS.size) for request in requests)
    ends = np.cumsum([len(request.seeds_BS) for request in requests])
    for name in _ANSWER_FIELDS:
        array = getattr(answer, name)
        assert array is None or array.shape[:2] == (ends[-1], requests[0].seeds_BS.shape[1]), f"{name} {array.shape}"
    parts = []
    for request, end in zip(requests, ends, strict=True):
        rows, share = slice(end - len(request.seeds_BS), end), request.seeds_BS.size / total
        arrays: dict[str, Any] = {
            name: None if (array := getattr(answer, name)) is None else (array[rows].copy() if share < 1 else array)
            for name in _ANSWER_FIELDS
        }
        cost = {name: value * share for name, value in answer.cost.items()} | {"batched": float(total)}
        parts.append(dataclasses.replace(answer, cost=cost, **arrays))
    return parts


def rollout_in_parts(world_model: WorldModel, request: RolloutRequest, max_batch: int) -> Rollout:
    """One rollout, or several of at most ``max_batch`` samples each, put together again: contexts are parted first, then candidates."""
    batch, samples = request.seeds_BS.shape
    if batch * samples <= max_batch:
        return world_model.rollout(request)
    if batch > 1:
        size = max(1, max_batch // samples)
        parts = [_contexts(request, slice(i, i + size)) for i in range(0, batch, size)]
    else:
        parts = [_candidates(request, slice(i, i + max_batch)) for i in range(0, samples, max_batch)]
    answers = [rollout_in_parts(world_model, part, max_batch) for part in parts]
    axis = 0 if batch > 1 else 1
    arrays: dict[str, Any] = {
        name: None
        if getattr(answers[0], name) is None
        else np.concatenate([getattr(answer, name) for answer in answers], axis)
        for name in _ANSWER_FIELDS
    }
    cost = {name: sum(answer.cost.get(name, 0.0) for answer in answers) for name in answers[0].cost}
    return dataclasses.replace(answers[0], cost=cost, **arrays)


def _contexts(request: RolloutRequest, rows: slice) -> RolloutRequest:
    arrays: dict[str, Any] = {
        name: None if (array := getattr(request, name)) is None else array[rows]
        for name in (*_CONTEXT_FIELDS, "seeds_BS")
    }
    return dataclasses.replace(request, instructions=request.instructions[rows], **arrays)


def _candidates(request: RolloutRequest, columns: slice) -> RolloutRequest:
    actions = None if request.actions_BSPA is None else request.actions_BSPA[:, columns]
    return dataclasses.replace(request, seeds_BS=request.seeds_BS[:, columns], actions_BSPA=actions)


def check_request(request: RolloutRequest, spec: WorldModelSpec) -> None:
    """What can be said about a request from the model's spec alone.

    Raises ``MissingCapabilityError`` for what the model does not offer, ``UserError`` for arrays that do not belong together.
    """
    offered = {
        "horizon": (request.horizon in spec.horizons, request.horizon, f"one of {spec.horizons}"),
        "returns": (request.returns <= spec.returns, sorted(request.returns), f"a subset of {sorted(spec.returns)}"),
    }
    for name, condition in (("actions_BSPA", "actions"), ("goal_BVHWC", "goal")):
        given = getattr(request, name) is not None
        wanted = f"nothing: the model's conditions are {sorted(spec.conditions)}"
        offered[condition] = (not given or condition in spec.conditions, condition, wanted)
    for name, (fine, got, wanted) in offered.items():
        if not fine:
            raise MissingCapabilityError(name, got=got, wanted=wanted, fix=f"ask {spec.name} for what its spec offers")
    if request.seeds_BS.ndim != 2 or 0 in request.seeds_BS.shape or request.seeds_BS.dtype.kind != "i":
        got = f"{request.seeds_BS.dtype} {request.seeds_BS.shape}"
        raise UserError("seeds_BS", got=got, wanted="integers [B,S]", fix="one seed a candidate of each context")
    batch, samples = request.seeds_BS.shape
    views = 1 if spec.views.tiles else len(spec.views.names)
    picture = (spec.views.height, spec.views.width, 3)
    _check_array(request, "context_BVTHWC", "u", (batch, views, spec.context_frames, *picture))
    _check_array(request, "goal_BVHWC", "u", (batch, views, *picture))
    _check_array(request, "proprioception_BKA", "f", (batch, len(spec.proprioception_lags), None))
    _check_array(request, "actions_BSPA", "f", (batch, samples, None, None))
    if len(request.instructions) != batch:
        got = len(request.instructions)
        raise UserError("instructions", got=got, wanted=f"{batch} sentences", fix="one instruction a context")
    if spec.proprioception_lags and request.proprioception_BKA is None:
        fix = f"joint targets at lags {spec.proprioception_lags}"
        raise UserError("proprioception_BKA", got=None, wanted="joint targets", fix=fix)


def _check_array(request: RolloutRequest, name: str, kind: str, shape: tuple[int | None, ...]) -> None:
    """An array that is given has this kind of numbers and this shape (None: any length), and its floats are finite."""
    array = getattr(request, name)
    if array is None:
        return
    fits = array.ndim == len(shape) and all(w in (None, n) for n, w in zip(array.shape, shape, strict=True))
    fits = fits and (array.dtype == np.uint8 if kind == "u" else array.dtype.kind == "f")
    if not fits or (kind == "f" and not np.isfinite(array).all()):
        got = f"{array.dtype} {array.shape}" if not fits else "numbers that are not finite"
        numbers = "uint8" if kind == "u" else "finite floats"
        wanted = f"{numbers} [{', '.join('any' if n is None else str(n) for n in shape)}]"
        raise UserError(name, got=got, wanted=wanted, fix="see core.types.RolloutRequest")
