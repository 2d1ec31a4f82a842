"""What a client believes of a server's manifest: bounds on every number that memory, time or an array's shape follows from."""

from __future__ import annotations

from dataclasses import dataclass

from .schema import Capabilities, Profile, WorldModelInfo


@dataclass(slots=True, kw_only=True, frozen=True)
class ManifestLimits:
    """The most that a manifest may say. ``video_bytes``: unpacked pixels of one sample. ``action_numbers``: of one frame.
    ``frame_s``: seconds between two frames. ``rows``: control steps a frame. ``timeout_ms``: a day."""

    body_bytes: int = 2**20
    profiles: int = 1024
    side: int = 8192
    frames: int = 4096
    context_frames: int = 64
    video_bytes: int = 2**31
    action_numbers: int = 4096
    state_numbers: int = 65536
    batch: int = 4096
    timeout_ms: int = 86_400_000
    views: int = 32
    lags: int = 64
    longest_lag: int = 10_000
    rows: int = 256
    frame_s: float = 60.0
    name_chars: int = 256


LIMITS = ManifestLimits()


def manifest_problems(capabilities: Capabilities, limits: ManifestLimits = LIMITS) -> list[str]:
    """What of a manifest nobody should compute with, in words; an empty list where there is nothing.

    A manifest that passes leads to no array above ``limits``, and to a ``WorldModelSpec`` that can be built.
    """
    found = []
    if len(capabilities.profiles) > limits.profiles:
        found.append(f"{len(capabilities.profiles)} profiles, at most {limits.profiles} are read")
    told = capabilities.limits
    found += _above("limits.max_batch_size", told.max_batch_size, limits.batch)
    found += _above("limits.recommended_timeout_ms", told.recommended_timeout_ms, limits.timeout_ms)
    found += _above("model_version: characters", len(capabilities.model_version), limits.name_chars)
    for i, profile in enumerate(capabilities.profiles[: limits.profiles]):
        found += [f"profiles[{i}].{problem}" for problem in _profile_problems(profile, limits)]
    if capabilities.world_model is not None:
        info, first = capabilities.world_model, capabilities.profiles[0]
        found += [f"world_model.{problem}" for problem in _info_problems(info, first, limits)]
    return found


def answer_bytes(profile: Profile, samples: int, frames: int) -> int:
    """The most bytes that an honest answer has: pixels that do not compress, as PNG and Base64, and room for the rest."""
    return 2**20 + samples * (frames + 1) * (2 * 3 * profile.image.height * profile.image.width + 4096)


def _above(name: str, got: float, most: float) -> list[str]:
    return [f"{name} {got} is above {most}"] if got > most else []


def _profile_problems(profile: Profile, limits: ManifestLimits) -> list[str]:
    found = []
    for name, bounds, most in (
        ("context_frames", profile.context_frames, limits.context_frames),
        ("prediction_frames", profile.prediction_frames, limits.frames),
    ):
        found += _above(f"{name}.max", bounds.max, most)
        found += _above(f"{name}.min", bounds.min, bounds.max)
    image = profile.image
    found += _above("image.height", image.height, limits.side) + _above("image.width", image.width, limits.side)
    pixels = 3 * image.height * image.width * (profile.prediction_frames.max + profile.context_frames.max)
    found += _above("bytes of one sample's pixels", pixels, limits.video_bytes)
    found += _above("action.dimension", profile.action.dimension or 0, limits.action_numbers)
    found += _above("action.rows_per_frame", profile.action.rows_per_frame, limits.rows)
    found += _above("state.dimension", profile.state.dimension or 0, limits.state_numbers)
    found += _above("profile_id: characters", len(profile.profile_id), limits.name_chars)
    if profile.driven_by == "actions" and profile.action.dimension is None:
        found.append("action.dimension is missing in a profile driven by actions")
    return found


def _info_problems(info: WorldModelInfo, first: Profile, limits: ManifestLimits) -> list[str]:
    found = []
    for name, text in (("name", info.name), ("fingerprint", info.fingerprint)):
        found += _above(f"{name}: characters", len(text), limits.name_chars)
    found += _above("views: number", len(info.views), limits.views)
    found += _above("horizons: number", len(info.horizons), limits.frames)
    if any(not 2 <= horizon <= limits.frames + 1 for horizon in info.horizons):
        found.append(f"horizons: a number of frames outside 2 to {limits.frames + 1}")
    if not 1 <= info.context_frames <= limits.context_frames:
        found.append(f"context_frames {info.context_frames} is outside 1 to {limits.context_frames}")
    if not 0 < info.frame_dt <= limits.frame_s:
        found.append(f"frame_dt {info.frame_dt} is outside 0 to {limits.frame_s:g} s")
    found += _above("proprioception_lags: number", len(info.proprioception_lags), limits.lags)
    if any(not 0 <= lag <= limits.longest_lag for lag in info.proprioception_lags):
        found.append(f"proprioception_lags: a lag outside 0 to {limits.longest_lag} control steps")
    found += _view_problems(info, first, limits) if len(info.views) <= limits.views else []
    return found + (_action_problems(info, limits) if info.action is not None else [])


def _view_problems(info: WorldModelInfo, first: Profile, limits: ManifestLimits) -> list[str]:
    found = ["views: no camera"] if not info.views else []
    for name in info.views:
        found += _above("views: characters of a name", len(name), limits.name_chars)
    if info.tiles and len(info.tiles) != len(info.views):
        found.append(f"tiles: {len(info.tiles)} for {len(info.views)} views")
    elif any(len(tile) != 4 for tile in info.tiles):
        found.append("tiles: a tile is four numbers (top, left, height, width)")
    elif any(abs(number) > limits.side for tile in info.tiles for number in tile):
        found.append(f"tiles: a number above {limits.side}")
    return found


def _action_problems(info: WorldModelInfo, limits: ManifestLimits) -> list[str]:
    action = info.action
    assert action is not None
    found = _above("action.names: number", len(action.names), limits.action_numbers)
    for name in action.names[: limits.action_numbers]:
        found += _above("action.names: characters of a name", len(name), limits.name_chars)
    if not 0 < action.dt <= limits.frame_s:
        return [*found, f"action.dt {action.dt} is outside 0 to {limits.frame_s:g} s"]
    rows = info.frame_dt / action.dt
    if not 1 - 1e-6 <= rows <= limits.rows or abs(rows - round(rows)) > 1e-6 * rows:
        found.append(f"frame_dt {info.frame_dt} is not 1 to {limits.rows} whole steps of action.dt {action.dt}")
    return found
