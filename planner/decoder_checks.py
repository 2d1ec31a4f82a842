"""What every decoder refuses: rollouts without what it reads, of another rate or length, and joints that do not fit."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.types import DecoderNeeds, Rollout, WorldModelSpec

T = TypeVar("T")


def present(value: T | None, what: str) -> T:
    """``value``, which a rollout must hold; ``MissingCapabilityError`` where it does not."""
    if value is None:
        fix = "ask the world model for what needs names"
        raise MissingCapabilityError("rollout", got=f"no {what}", wanted=what, fix=fix)
    return value


def source_of(spec: WorldModelSpec, what: str) -> str:
    """Fingerprint of a model's ``latents`` or ``features``: what a decoder of them was trained on, or what it would read."""
    return str(getattr(spec, f"{what}_fingerprint")) or spec.fingerprint


def check_source(spec: WorldModelSpec, needs: DecoderNeeds) -> None:
    """``MissingCapabilityError`` where a decoder was trained on other latents or features than this model makes: their numbers have the
    same shape and another meaning."""
    for what, fix in (
        (
            "latents",
            "plan with a world model of the codec that it was trained on, or train one: physis train idm decoder=latent; or "
            "planner.decoder=shipped, which reads pictures",
        ),
        (
            "features",
            "plan with the world model that it was trained on, or train one: physis train idm decoder=feature; or "
            "planner.decoder=shipped, which reads pictures",
        ),
    ):
        trained, found = getattr(needs, f"{what}_fingerprint"), source_of(spec, what)
        if what in needs.returns and trained and trained != found:
            got, wanted = (
                f"{spec.name} with {what} {found or 'unknown'}",
                f"{what} {trained}, which the decoder was trained on",
            )
            raise MissingCapabilityError("world_model", got=got, wanted=wanted, fix=fix)


def check_trained(statistics_A: Tensor, kind: str) -> None:
    """``UserError`` for a decoder whose normalisation was never set."""
    if not bool(torch.isfinite(statistics_A).all()):
        fix = f"train it: physis train idm decoder={kind}"
        raise UserError("decoder", got="no normalisation statistics", wanted="a trained decoder", fix=fix)


def check_times(rollout: Rollout, needs: DecoderNeeds) -> None:
    """``MissingCapabilityError`` unless the rollout has the decoder's number of frames at its rate."""
    assert needs.frame_dt is not None and len(needs.horizons) == 1
    expected = np.arange(needs.horizons[0]) * needs.frame_dt
    times = np.asarray(rollout.times_T)
    if len(times) != len(expected) or np.abs(times - expected).max() > 1e-3:
        raise MissingCapabilityError(
            "times_T",
            got=f"{len(times)} times, {np.round(times, 3).tolist()[:4]}",
            wanted=f"{len(expected)} multiples of {needs.frame_dt:.2f} s",
            fix="use a world model whose frame_dt and horizon the decoder was trained for",
        )


def check_state(state_BA: NDArray, batch: int, action_dim: int) -> None:
    """``UserError`` unless there are finite drive targets for every context."""
    if state_BA.shape != (batch, action_dim) or not np.isfinite(state_BA).all():
        raise UserError(
            "state_BA",
            got=f"{state_BA.shape}, finite: {bool(np.isfinite(state_BA).all())}",
            wanted=f"finite [{batch}, {action_dim}]",
            fix="pass the drive targets of the observation",
        )
