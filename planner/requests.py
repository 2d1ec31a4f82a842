"""Requests to a world model as data: merged, split again, and computed in parts (checked by ``core.requests``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from physisforcing.core.protocols import WorldModel
from physisforcing.core.requests import check_request as check_request
from physisforcing.core.types import Rollout, RolloutRequest

#: Fields of a request, and of a rollout, whose first axis are the contexts.
_CONTEXT_FIELDS = ("context_BVTHWC", "proprioception_BKA", "actions_BSPA", "goal_BVHWC")
_ANSWER_FIELDS = ("frames_BSVTHWC", "latents_BSCFhw", "features_BSKFhwD")


def kind_of(request: RolloutRequest) -> tuple[Any, ...]:
    """What two requests must have in common to be merged."""
    arrays = [getattr(request, name) for name in _CONTEXT_FIELDS]
    shapes = tuple(None if array is None else (array.dtype.str, array.shape[1:]) for array in arrays)
    named = request.ids is not None
    return request.horizon, request.returns, request.features, request.seeds_BS.shape[1], shapes, named


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
    ids = None if requests[0].ids is None else [name for request in requests for name in request.ids or ()]
    return dataclasses.replace(requests[0], instructions=instructions, ids=ids, **joined)


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
    ids = None if request.ids is None else request.ids[rows]
    return dataclasses.replace(request, instructions=request.instructions[rows], ids=ids, **arrays)


def _candidates(request: RolloutRequest, columns: slice) -> RolloutRequest:
    actions = None if request.actions_BSPA is None else request.actions_BSPA[:, columns]
    return dataclasses.replace(request, seeds_BS=request.seeds_BS[:, columns], actions_BSPA=actions)
