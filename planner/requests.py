"""Requests to a world model as data: merged, split again, and computed in equal parts (checked and parted by ``core.requests``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from physisforcing.core.protocols import WorldModel
from physisforcing.core.requests import ANSWER_FIELDS, CONTEXT_FIELDS, CONTEXT_LISTS, contexts_of
from physisforcing.core.requests import check_request as check_request
from physisforcing.core.requests import rollout_in_parts as rollout_in_parts
from physisforcing.core.types import Rollout, RolloutRequest


def kind_of(request: RolloutRequest) -> tuple[Any, ...]:
    """What two requests must have in common to be merged."""
    arrays = [getattr(request, name) for name in CONTEXT_FIELDS]
    shapes = tuple(None if array is None else (array.dtype.str, array.shape[1:]) for array in arrays)
    named = request.ids is not None, request.plan_steps is not None
    return request.horizon, request.returns, request.features, request.seeds_BS.shape[1], shapes, named


def merge(requests: Sequence[RolloutRequest]) -> RolloutRequest:
    """Requests of one kind as one, along B."""
    if len(requests) == 1:
        return requests[0]
    joined: dict[str, Any] = {
        name: None
        if getattr(requests[0], name) is None
        else np.concatenate([getattr(request, name) for request in requests])
        for name in (*CONTEXT_FIELDS, "seeds_BS")
    }
    instructions = [sentence for request in requests for sentence in request.instructions]
    lists = {
        name: None
        if getattr(requests[0], name) is None
        else [x for request in requests for x in getattr(request, name)]
        for name in CONTEXT_LISTS
    }
    return dataclasses.replace(requests[0], instructions=instructions, **lists, **joined)


def split(answer: Rollout, requests: Sequence[RolloutRequest]) -> list[Rollout]:
    """The answer to ``merge(requests)`` -> the answer of each. Arrays are copied, so that nobody holds on to the others'."""
    total = sum(int(request.seeds_BS.size) for request in requests)
    ends = np.cumsum([len(request.seeds_BS) for request in requests])
    for name in ANSWER_FIELDS:
        array = getattr(answer, name)
        assert array is None or array.shape[:2] == (ends[-1], requests[0].seeds_BS.shape[1]), f"{name} {array.shape}"
    parts = []
    for request, end in zip(requests, ends, strict=True):
        rows, share = slice(end - len(request.seeds_BS), end), request.seeds_BS.size / total
        arrays: dict[str, Any] = {
            name: None if (array := getattr(answer, name)) is None else (array[rows].copy() if share < 1 else array)
            for name in ANSWER_FIELDS
        }
        cost = {name: value * share for name, value in answer.cost.items()} | {"batched": float(total)}
        parts.append(dataclasses.replace(answer, cost=cost, seeds_BS=request.seeds_BS, **arrays))
    return parts


def singly(request: RolloutRequest) -> RolloutRequest:
    """The same samples [B,S] as B x S contexts with one candidate each."""
    batch, samples = request.seeds_BS.shape
    if samples == 1:
        return request
    arrays: dict[str, Any] = {
        name: None if (array := getattr(request, name)) is None else np.repeat(array, samples, axis=0)
        for name in CONTEXT_FIELDS
        if name != "actions_BSPA"
    }
    actions = request.actions_BSPA
    if actions is not None:
        actions = actions.reshape(batch * samples, 1, *actions.shape[2:])
    return dataclasses.replace(
        request,
        instructions=[sentence for sentence in request.instructions for _ in range(samples)],
        **{
            name: None if (given := getattr(request, name)) is None else [x for x in given for _ in range(samples)]
            for name in CONTEXT_LISTS
        },
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
        for name in ANSWER_FIELDS
    }
    return dataclasses.replace(answer, seeds_BS=request.seeds_BS, **arrays)


def rollout_in_equal_parts(world_model: WorldModel, request: RolloutRequest, size: int) -> Rollout:
    """One rollout of exactly ``size`` contexts, or several, for a request with one candidate a context: the last context is repeated
    until the number fits, and what that gave is dropped."""
    batch, samples = request.seeds_BS.shape
    assert samples == 1, "part it with singly() first"
    rows = np.minimum(np.arange(-(-batch // size) * size), batch - 1)
    answer = rollout_in_parts(world_model, contexts_of(request, rows), size)
    arrays: dict[str, Any] = {
        name: None if (array := getattr(answer, name)) is None else array[:batch] for name in ANSWER_FIELDS
    }
    return dataclasses.replace(answer, seeds_BS=request.seeds_BS, **arrays)
