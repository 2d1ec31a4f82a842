"""Requests to a world model as data: merged, split again, and computed in parts (checked by ``core.requests``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
        parts.append(dataclasses.replace(answer, cost=cost, seeds_BS=request.seeds_BS, **arrays))
    return parts


def rollout_in_parts(world_model: WorldModel, request: RolloutRequest, max_batch: int) -> Rollout:
    """One rollout, or several of at most ``max_batch`` samples each, put together again: contexts are parted first, then candidates.
    The answer carries the request's seeds."""
    batch, samples = request.seeds_BS.shape
    if batch * samples <= max_batch:
        return dataclasses.replace(world_model.rollout(request), seeds_BS=request.seeds_BS)
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
    return dataclasses.replace(answers[0], cost=cost, seeds_BS=request.seeds_BS, **arrays)


def _contexts(request: RolloutRequest, rows: slice | NDArray[np.int64]) -> RolloutRequest:
    chosen = np.arange(len(request.seeds_BS))[rows]
    arrays: dict[str, Any] = {
        name: None if (array := getattr(request, name)) is None else array[rows]
        for name in (*_CONTEXT_FIELDS, "seeds_BS")
    }
    ids = None if request.ids is None else [request.ids[row] for row in chosen]
    instructions = [request.instructions[row] for row in chosen]
    return dataclasses.replace(request, instructions=instructions, ids=ids, **arrays)


def _candidates(request: RolloutRequest, columns: slice) -> RolloutRequest:
    actions = None if request.actions_BSPA is None else request.actions_BSPA[:, columns]
    return dataclasses.replace(request, seeds_BS=request.seeds_BS[:, columns], actions_BSPA=actions)


def singly(request: RolloutRequest) -> RolloutRequest:
    """The same samples [B,S] as B x S contexts with one candidate each."""
    batch, samples = request.seeds_BS.shape
    if samples == 1:
        return request
    arrays: dict[str, Any] = {
        name: None if (array := getattr(request, name)) is None else np.repeat(array, samples, axis=0)
        for name in _CONTEXT_FIELDS
        if name != "actions_BSPA"
    }
    actions = request.actions_BSPA
    if actions is not None:
        actions = actions.reshape(batch * samples, 1, *actions.shape[2:])
    return dataclasses.replace(
        request,
        instructions=[sentence for sentence in request.instructions for _ in range(samples)],
        ids=None if request.ids is None else [name for name in request.ids for _ in range(samples)],
        seeds_BS=request.seeds_BS.reshape(-1, 1),
        actions_BSPA=actions,
        **arrays,
    )


def as_asked(answer: Rollout, request: RolloutRequest) -> Rollout:
    """The answer to ``singly(request)`` -> the answer to ``request``."""
    arrays: dict[str, Any] = {
        name: None
        if (array := getattr(answer, name)) is None
        else array.reshape(*request.seeds_BS.shape, *array.shape[2:])
        for name in _ANSWER_FIELDS
    }
    return dataclasses.replace(answer, seeds_BS=request.seeds_BS, **arrays)


def rollout_in_equal_parts(world_model: WorldModel, request: RolloutRequest, size: int) -> Rollout:
    """One rollout of exactly ``size`` contexts, or several, for a request with one candidate a context: the last context is repeated
    until the number fits, and what that gave is dropped."""
    batch, samples = request.seeds_BS.shape
    assert samples == 1, "part it with singly() first"
    rows = np.minimum(np.arange(-(-batch // size) * size), batch - 1)
    answer = rollout_in_parts(world_model, _contexts(request, rows), size)
    arrays: dict[str, Any] = {
        name: None if (array := getattr(answer, name)) is None else array[:batch] for name in _ANSWER_FIELDS
    }
    return dataclasses.replace(answer, seeds_BS=request.seeds_BS, **arrays)
