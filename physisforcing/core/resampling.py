"""The one way from one clock to another: pictures, states and actions at the times of a simulator, a model or a decoder.

Pictures are chosen (``nearest``), numbers may also be interpolated (``linear``). What lies past the first or the last time is an
error unless the caller says ``outside="hold"``. Times are seconds from now, as in ``Rollout.times_T``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UserError

METHODS = ("nearest", "linear")
OUTSIDE = ("error", "hold")
#: Seconds by which two times may differ and still be the same: floating point, not physics.
SAME_TIME = 1e-6


def resample(
    values_TX: NDArray[Any],
    times_T: NDArray[np.floating[Any]],
    wanted_R: NDArray[np.floating[Any]],
    *,
    method: str,
    outside: str = "error",
) -> NDArray[Any]:
    """Values [T,...] known at ``times_T`` -> values [R,...] at ``wanted_R`` (seconds, any order), of the same dtype.

    ``nearest`` takes the value at the nearest time, the earlier one of two that are equally near; ``linear`` interpolates and needs
    floating-point values. ``outside="hold"`` repeats the first or last value past the ends. Raises ``UserError`` for times that are not
    finite and increasing, for a time outside, for integers with ``linear``, and for unknown policies.
    """
    times, wanted = _times(times_T, "times_T"), np.asarray(wanted_R, np.float64)
    values = np.asarray(values_TX)
    if len(values) != len(times):
        fix = "give one time for each value"
        raise UserError("times_T", got=f"{len(times)} times", wanted=f"{len(values)}, as many as values", fix=fix)
    if method not in METHODS:
        raise UserError("method", got=method, wanted=" or ".join(METHODS), fix="nearest for pictures")
    wanted = _inside(wanted, times, outside)
    if method == "nearest":
        return values[_nearest(times, wanted)]
    if not np.issubdtype(values.dtype, np.floating):
        fix = "method='nearest', or convert to float32 first"
        raise UserError("method", got=f"linear for {values.dtype}", wanted="floating-point values", fix=fix)
    return _linear(values, times, wanted)


def nearest_rows(
    times_T: NDArray[np.floating[Any]], wanted_R: NDArray[np.floating[Any]], *, outside: str = "error"
) -> NDArray[np.int64]:
    """Which rows ``resample(method="nearest")`` takes: int64 [R]. For videos that are read row by row."""
    times = _times(times_T, "times_T")
    return _nearest(times, _inside(np.asarray(wanted_R, np.float64), times, outside))


def resample_actions(
    actions_PA: NDArray[np.floating[Any]], dt: float, wanted_dt: float, *, state_A: NDArray[np.floating[Any]]
) -> NDArray[np.float32]:
    """Targets one every ``dt`` seconds -> targets one every ``wanted_dt`` seconds: float32 [Q,A].

    Row i is the target reached at ``(i + 1) * dt``, approached along a straight line from the row before it, the first one from
    ``state_A``, which is how the simulator's drives are led; so linear interpolation between them is exact. Q is the number of whole
    ``wanted_dt`` that fit into the chunk. Raises ``UserError`` where none fits, or for steps that are not positive.
    """
    actions, state = np.asarray(actions_PA, np.float32), np.asarray(state_A, np.float32)
    for name, step in (("dt", dt), ("wanted_dt", wanted_dt)):
        if not (math.isfinite(step) and step > 0):
            raise UserError(name, got=step, wanted="a positive number of seconds", fix="seconds between two actions")
    if actions.ndim != 2 or state.shape != actions.shape[1:]:
        got, wanted = f"state {list(state.shape)}, actions {list(actions.shape)}", "state [A], actions [P,A]"
        raise UserError("state_A, actions_PA", got=got, wanted=wanted, fix="give the joint targets now")
    count = math.floor((len(actions) * dt + SAME_TIME) / wanted_dt)
    if count < 1:
        got = f"{len(actions)} rows of {dt:g} s"
        raise UserError("actions_PA", got=got, wanted=f"at least {wanted_dt:g} s", fix="a longer chunk")
    knots = np.concatenate([state[None], actions])
    times = np.arange(len(knots)) * dt
    return resample(knots, times, np.arange(1, count + 1) * wanted_dt, method="linear", outside="error")


def _times(values: NDArray[np.floating[Any]], field: str) -> NDArray[np.float64]:
    times = np.asarray(values, np.float64)
    if times.ndim != 1 or not len(times) or not np.isfinite(times).all() or (np.diff(times) <= SAME_TIME).any():
        got = f"shape {list(times.shape)}" if times.ndim != 1 or not len(times) else "times that do not increase"
        raise UserError(field, got=got, wanted="finite, increasing seconds [T]", fix="sort them and drop repeats")
    return times


def _inside(wanted: NDArray[np.float64], times: NDArray[np.float64], outside: str) -> NDArray[np.float64]:
    """The wanted times, those past the ends moved there where that is allowed (or where it is only rounding)."""
    if outside not in OUTSIDE:
        raise UserError("outside", got=outside, wanted=" or ".join(OUTSIDE), fix="outside='error'")
    if wanted.ndim != 1 or not np.isfinite(wanted).all():
        raise UserError("wanted_R", got=f"shape {list(wanted.shape)}", wanted="finite seconds [R]", fix="one axis")
    far = (wanted < times[0] - SAME_TIME) | (wanted > times[-1] + SAME_TIME)
    if outside == "error" and far.any():
        got, known = f"{wanted[far][0]:.6g} s", f"{times[0]:.6g} to {times[-1]:.6g} s"
        fix = "a longer rollout, or outside='hold' to repeat the last value"
        raise UserError("wanted_R", got=got, wanted=f"times from {known}", fix=fix)
    return np.clip(wanted, times[0], times[-1])


def _nearest(times: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.int64]:
    after = np.searchsorted(times, wanted).clip(max=len(times) - 1)
    before = np.maximum(after - 1, 0)
    # a tie goes to the earlier one, also where rounding makes it look nearly one
    later = times[after] - wanted < wanted - times[before] - SAME_TIME
    exact = np.abs(times[after] - wanted) <= SAME_TIME
    return np.where(later | exact, after, before).astype(np.int64)


def _linear(values: NDArray[Any], times: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[Any]:
    after = np.searchsorted(times, wanted).clip(max=len(times) - 1)
    before = np.maximum(after - 1, 0)
    gap = np.where(after > before, times[after] - times[before], 1.0)
    share = ((wanted - times[before]) / gap).clip(0.0, 1.0).reshape(-1, *[1] * (values.ndim - 1))
    low, high = values[before].astype(np.float64), values[after].astype(np.float64)
    # written so that both ends come back exactly
    return np.where(share < 0.5, low + share * (high - low), high - (1 - share) * (high - low)).astype(values.dtype)
