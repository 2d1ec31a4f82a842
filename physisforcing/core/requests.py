"""Requests to a world model: what the spec alone says about one (a model calls it first), and one computed in parts the model can take."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import MissingCapabilityError, UserError
from .protocols import WorldModel
from .types import Rollout, RolloutRequest, WorldModelSpec

#: Fields of a request, and of a rollout, whose first axis are the contexts.
CONTEXT_FIELDS = ("context_BVTHWC", "proprioception_BKA", "actions_BSPA", "goal_BVHWC")
CONTEXT_LISTS = ("ids", "plan_steps")
ANSWER_FIELDS = ("frames_BSVTHWC", "latents_BSCFhw", "features_BSKFhwD")


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
    _check_array(request, "actions_BSPA", "f", (batch, samples, *_action_shape(request, spec)))
    if len(request.instructions) != batch:
        got = len(request.instructions)
        raise UserError("instructions", got=got, wanted=f"{batch} sentences", fix="one instruction a context")
    if spec.proprioception_lags and request.proprioception_BKA is None:
        fix = f"joint targets at lags {spec.proprioception_lags}"
        raise UserError("proprioception_BKA", got=None, wanted="joint targets", fix=fix)
    if "actions" in spec.conditions and request.actions_BSPA is None:
        fix = "give the drive targets of the next control steps for every sample"
        raise MissingCapabilityError("actions", got=None, wanted=f"actions, which {spec.name} needs", fix=fix)
    if request.ids is not None and len(request.ids) != batch:
        raise UserError("ids", got=len(request.ids), wanted=f"{batch}, one a context", fix="(task, seed, plan) of each")
    steps = request.plan_steps
    if steps is not None and (len(steps) != batch or min(steps) < 0):
        fix = "control steps from the start of the plan to each context"
        raise UserError("plan_steps", got=steps, wanted=f"{batch} numbers of 0 or more", fix=fix)


def plan_steps(request: RolloutRequest) -> list[int]:
    """Control steps from the start of its plan to each context."""
    return [0] * len(request.instructions) if request.plan_steps is None else request.plan_steps


def _action_shape(request: RolloutRequest, spec: WorldModelSpec) -> tuple[int | None, int | None]:
    """Rows and numbers of the actions that last as long as the rollout; (None, None) where the spec does not say."""
    if spec.action_spec is None:
        return (None, None)
    return (round((request.horizon - 1) * spec.frame_dt / spec.action_spec.dt), spec.action_spec.dim)


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


def rollout_in_parts(world_model: WorldModel, request: RolloutRequest, max_batch: int) -> Rollout:
    """One rollout, or several of at most ``max_batch`` samples each, put together again: contexts are parted first, then candidates.
    The answer carries the request's seeds."""
    batch, samples = request.seeds_BS.shape
    if batch * samples <= max_batch:
        return dataclasses.replace(world_model.rollout(request), seeds_BS=request.seeds_BS)
    if batch > 1:
        size = max(1, max_batch // samples)
        parts = [contexts_of(request, slice(i, i + size)) for i in range(0, batch, size)]
    else:
        parts = [_candidates(request, slice(i, i + max_batch)) for i in range(0, samples, max_batch)]
    answers = [rollout_in_parts(world_model, part, max_batch) for part in parts]
    axis = 0 if batch > 1 else 1
    arrays: dict[str, Any] = {
        name: None
        if getattr(answers[0], name) is None
        else np.concatenate([getattr(answer, name) for answer in answers], axis)
        for name in ANSWER_FIELDS
    }
    cost = {name: sum(answer.cost.get(name, 0.0) for answer in answers) for name in answers[0].cost}
    return dataclasses.replace(answers[0], cost=cost, seeds_BS=request.seeds_BS, **arrays)


def contexts_of(request: RolloutRequest, rows: slice | NDArray[np.int64]) -> RolloutRequest:
    """The part of a request that asks for these contexts."""
    chosen = np.arange(len(request.seeds_BS))[rows]
    arrays: dict[str, Any] = {
        name: None if (array := getattr(request, name)) is None else array[rows]
        for name in (*CONTEXT_FIELDS, "seeds_BS")
    }
    lists: dict[str, Any] = {
        name: None if (given := getattr(request, name)) is None else [given[row] for row in chosen]
        for name in ("instructions", *CONTEXT_LISTS)
    }
    return dataclasses.replace(request, **lists, **arrays)


def _candidates(request: RolloutRequest, columns: slice) -> RolloutRequest:
    actions = None if request.actions_BSPA is None else request.actions_BSPA[:, columns]
    return dataclasses.replace(request, seeds_BS=request.seeds_BS[:, columns], actions_BSPA=actions)
