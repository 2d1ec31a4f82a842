"""What a world model offers over HTTP: profiles and the capability manifest, from its spec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.types import WorldModelSpec

from .limits import ServiceLimits
from .schema import (
    API_VERSION,
    ActionNames,
    ActionOffer,
    Capabilities,
    Determinism,
    ImageOffer,
    InstructionOffer,
    LimitsOffer,
    Profile,
    Range,
    StateOffer,
    WorldModelInfo,
)

_F32 = float(np.finfo(np.float32).max)


@dataclass(slots=True, kw_only=True, frozen=True)
class Offer:
    """One profile: a horizon, driven by actions or by text.

    ``frames``: pictures in an answer. Driven by actions: one an action vector, without the picture of time 0; driven by text:
    ``horizon``, with it. ``action_dim``: ``rows_per_frame`` control steps of the model's actions. ``state_dim``: the joint targets
    at all lags.
    """

    driven_by: Literal["actions", "text"]
    horizon: int
    frames: int
    rows_per_frame: int = 1
    action_dim: int = 0
    state_dim: int = 0

    @property
    def profile_id(self) -> str:
        return f"{self.driven_by}-{self.frames}"


def model_version(spec: WorldModelSpec) -> str:
    """Immutable name of weights and settings."""
    return f"{spec.name}-{spec.fingerprint}" if spec.fingerprint else spec.name


def offers_of(spec: WorldModelSpec, joints: int) -> dict[str, Offer]:
    """Profiles by id. ``joints``: numbers in a row of proprioception, where no action spec says it.

    Raises ``MissingCapabilityError`` for a model that the contract cannot carry: several separate pictures a frame, or no frames.
    """
    if (len(spec.views.names) != 1 and not spec.views.tiles) or "frames" not in spec.returns:
        raise MissingCapabilityError(
            "world_model",
            got=f"views {spec.views.names}, returns {sorted(spec.returns)}",
            wanted="one picture a frame (the v1 contract has no more), returned as frames",
            fix="put several cameras on one canvas: ViewLayout(tiles=...)",
        )
    rows = spec.action_spec.dim if spec.action_spec is not None else joints
    state_dim = rows * len(spec.proprioception_lags) if "proprioception" in spec.conditions else 0
    found = []
    for horizon in spec.horizons:
        if "actions" in spec.conditions:  # such a model needs them in every request
            steps = _rows_per_frame(spec)
            dim = steps * rows
            shape = {"rows_per_frame": steps, "action_dim": dim, "state_dim": state_dim}
            found.append(Offer(driven_by="actions", horizon=horizon, frames=horizon - 1, **shape))
        else:
            found.append(Offer(driven_by="text", horizon=horizon, frames=horizon, state_dim=state_dim))
    return {offer.profile_id: offer for offer in found if offer.frames > 0}


def _rows_per_frame(spec: WorldModelSpec) -> int:
    if spec.action_spec is None:
        raise UserError(
            "world_model.spec.action_spec", got=None, wanted="an ActionSpec", fix="say what an action means"
        )
    ratio = spec.frame_dt / spec.action_spec.dt
    if round(ratio) < 1 or abs(ratio - round(ratio)) > 1e-6:
        raise UserError(
            "world_model.spec.frame_dt",
            got=f"{spec.frame_dt:g} s a frame, {spec.action_spec.dt:g} s an action",
            wanted="a whole number of actions a frame",
            fix="resample before serving",
        )
    return round(ratio)


def capabilities_of(spec: WorldModelSpec, offers: dict[str, Offer], limits: ServiceLimits) -> Capabilities:
    """The manifest."""
    return Capabilities(
        api_version=API_VERSION,
        model_version=model_version(spec),
        profiles=[_profile(spec, offer, limits) for offer in offers.values()],
        limits=LimitsOffer(
            max_batch_size=limits.max_batch_size,
            max_request_bytes=limits.max_request_bytes,
            max_concurrency=limits.max_concurrency,
            recommended_timeout_ms=round(1000 * limits.deadline_s),
        ),
        determinism=Determinism(seed_supported=True, same_seed_same_pixels=spec.deterministic),
        world_model=_info(spec),
    )


def _profile(spec: WorldModelSpec, offer: Offer, limits: ServiceLimits) -> Profile:
    by_text = offer.driven_by == "text"
    return Profile(
        profile_id=offer.profile_id,
        image=ImageOffer(
            encoding="png_base64", color_space="RGB", height=spec.views.height, width=spec.views.width, channels=3
        ),
        context_frames=Range(min=spec.context_frames, max=spec.context_frames),
        prediction_frames=Range(min=offer.frames, max=offer.frames),
        action=ActionOffer(
            dtype="float32",
            dimension=offer.action_dim or None,
            representation="none" if by_text else "absolute_joint_targets",
            supported=not by_text,
            rows_per_frame=offer.rows_per_frame,
        ),
        state=StateOffer(
            supported=offer.state_dim > 0,
            dimension=offer.state_dim or None,
            required=offer.state_dim > 0,
            lags=list(spec.proprioception_lags) if offer.state_dim else None,
        ),
        instruction=InstructionOffer(
            supported="text" in spec.conditions,
            required=by_text and "text" in spec.conditions,
            max_length=limits.instruction_chars,
        ),
        driven_by=offer.driven_by,
    )


def _info(spec: WorldModelSpec) -> WorldModelInfo:
    action = None
    if spec.action_spec is not None and "actions" in spec.conditions:
        low, high = ([max(-_F32, min(_F32, v)) for v in side] for side in (spec.action_spec.low, spec.action_spec.high))
        action = ActionNames(names=list(spec.action_spec.names), low=low, high=high, dt=spec.action_spec.dt)
    return WorldModelInfo(
        name=spec.name,
        fingerprint=spec.fingerprint,
        views=list(spec.views.names),
        tiles=[list(tile) for tile in spec.views.tiles],
        frame_dt=spec.frame_dt,
        horizons=list(spec.horizons),
        context_frames=spec.context_frames,
        conditions=sorted(spec.conditions - {"goal"}),
        proprioception_lags=list(spec.proprioception_lags),
        action=action,
    )
