"""Messages of the v1 contract as pydantic models: strict types, finite numbers, unknown fields ignored.

The fields are those of WorldArena 2.0's "Candidate World Model Service API" v1. What we add is optional, as v1 asks, and marked
``ours``: it lets a text-driven model and one with several control steps a frame speak the same contract.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .faults import invalid

API_VERSION: Literal["1.0"] = "1.0"
UUID_PATTERN = r"^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$"
#: Numbers that stay finite as float32.
_F32 = 3.4028234663852886e38
Number = Annotated[float, Field(ge=-_F32, le=_F32)]
Rows = list[list[Number]]


class Strict(BaseModel):
    """No conversion between types; fields that a later 1.x may add are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class Image(Strict):
    """One RGB picture. ``data``: standard Base64 of a PNG file, without a ``data:`` prefix or line breaks."""

    encoding: Literal["png_base64"] = "png_base64"
    color_space: Literal["RGB"] = "RGB"
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    channels: Literal[3] = 3
    data: str = Field(min_length=1)


class SentImage(Image):
    """As a client has to send it: every field is there."""

    encoding: Literal["png_base64"]
    color_space: Literal["RGB"]
    channels: Literal[3]


class Context(Strict):
    """``frames``: F history frames, oldest first. ``actions``: F - 1 rows. ``states``: F rows of numbers, or null."""

    frames: list[SentImage] = Field(min_length=1)
    actions: Rows
    states: Rows | None = None
    instruction: str | None = None


class Sample(Strict):
    """``actions``: P rows, one a frame to predict; null or absent where the profile is driven by text (ours). ``horizon`` (ours): frames
    to return in a text profile, the picture at time 0 included."""

    sample_id: str = Field(min_length=1, max_length=256)
    seed: int = Field(ge=0, le=2**63 - 1)
    context: Context
    actions: Rows | None = None
    horizon: int | None = None


class PredictRequest(Strict):
    """``POST /v1/predict``."""

    api_version: str
    request_id: str = Field(pattern=UUID_PATTERN)
    model_version: str
    profile_id: str
    samples: list[Sample] = Field(min_length=1)


class Prediction(Strict):
    sample_id: str
    frames: list[SentImage]


class Diagnostics(Strict):
    """Ours; evaluators ignore it. ``first_frames``: the model's own picture of time 0 of each sample, in profiles driven by actions."""

    seconds: float = 0.0
    first_frames: list[Image] | None = None


class PredictResponse(Strict):
    """Answer to ``PredictRequest``: predictions in the order of the samples."""

    api_version: Literal["1.0"]
    request_id: str
    model_version: str
    predictions: list[Prediction]
    diagnostics: Diagnostics | None = None


class Health(Strict):
    status: Literal["ready", "starting", "degraded"]
    api_version: Literal["1.0"]
    model_version: str | None = None


class Range(Strict):
    min: int = Field(ge=1)
    max: int = Field(ge=1)


class ImageOffer(Strict):
    encoding: Literal["png_base64"]
    color_space: Literal["RGB"]
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    channels: Literal[3]


class ActionOffer(Strict):
    """``dimension``: numbers a frame, null where ``supported`` (ours) is false. ``rows_per_frame`` (ours): control steps a frame; their
    rows stand one after the other in the vector of a frame."""

    dtype: str
    dimension: int | None = Field(ge=1)
    representation: str
    supported: bool = True
    rows_per_frame: int = Field(default=1, ge=1)


class StateOffer(Strict):
    """``required``, ``lags`` (ours): the last row is read; it holds the drive targets at these control steps before now."""

    supported: bool
    dimension: int | None = Field(ge=1)
    required: bool = False
    lags: list[int] | None = None


class InstructionOffer(Strict):
    supported: bool
    required: bool = False
    max_length: int | None = None


class Profile(Strict):
    """``driven_by`` (ours): what a sample's length comes from."""

    profile_id: str = Field(min_length=1)
    image: ImageOffer
    context_frames: Range
    prediction_frames: Range
    action: ActionOffer
    state: StateOffer
    instruction: InstructionOffer
    driven_by: Literal["actions", "text"] = "actions"


class LimitsOffer(Strict):
    max_batch_size: int = Field(ge=1)
    max_request_bytes: int = Field(ge=1)
    max_concurrency: int = Field(ge=1)
    recommended_timeout_ms: int = Field(ge=1)


class Determinism(Strict):
    seed_supported: bool
    same_seed_same_pixels: bool


class ActionNames(Strict):
    names: list[str]
    low: list[float]
    high: list[float]
    dt: float


class WorldModelInfo(Strict):
    """Ours: what a ``core.types.WorldModelSpec`` says that the v1 profile does not."""

    name: str
    fingerprint: str
    views: list[str]
    tiles: list[list[int]] = Field(default_factory=list)
    frame_dt: float
    horizons: list[int]
    context_frames: int
    conditions: list[str]
    proprioception_lags: list[int] = Field(default_factory=list)
    action: ActionNames | None = None


class Capabilities(Strict):
    """``GET /v1/capabilities``."""

    api_version: Literal["1.0"]
    model_version: str = Field(min_length=1)
    profiles: list[Profile] = Field(min_length=1)
    limits: LimitsOffer
    determinism: Determinism
    world_model: WorldModelInfo | None = None


class ErrorDetails(Strict):
    code: str
    message: str
    request_id: str | None = None
    retryable: bool
    needs: str | None = None


class ErrorBody(Strict):
    """Body of every answer that is not 2xx."""

    error: ErrorDetails


def validated(model: type[Strict], value: Any) -> Any:
    """An instance of ``model``; ``ServiceFault`` INVALID_ARGUMENT names the first field that is wrong, never its value."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise invalid(f"{_path(first['loc'])}: {first['msg']}") from None


def _path(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "request"


def request_id_of(value: Any) -> str | None:
    """The request's id where it can be read, for error bodies."""
    found = value.get("request_id") if isinstance(value, dict) else None
    return found if isinstance(found, str) and re.match(UUID_PATTERN, found) else None
