"""What can be said about a request to a world model from the model's spec alone. A model calls it first and is spared these checks."""

from __future__ import annotations

import numpy as np

from .errors import MissingCapabilityError, UserError
from .types import RolloutRequest, WorldModelSpec


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
