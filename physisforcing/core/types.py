"""Typed values that cross rooms.

Shape suffixes, one legend for the whole project: B batch, S samples (candidates), T pixel frames, F latent frames,
C channels, H W pixels, h w token grid, L tokens, D width, N points, P chunk length, A action dimension, V views,
K history entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UserError

#: Physics steps of 1/250 s that one action lasts, and its duration in seconds (one dataset frame).
PHYSICS_HZ = 250
PHYSICS_STEPS_PER_ACTION = 15
DT = PHYSICS_STEPS_PER_ACTION / PHYSICS_HZ
#: LeRobot frame rate of every dataset recorded here.
FPS = PHYSICS_HZ / PHYSICS_STEPS_PER_ACTION
#: Rates that differ by a smaller share are one: datasets round theirs.
RATE_TOLERANCE = 0.01


@dataclass(slots=True, kw_only=True, frozen=True)
class ActionSpec:
    """What an action means. ``low`` and ``high`` are per element: radians for joints, 0 closed .. 1 open for grippers."""

    names: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    dt: float = DT

    @property
    def dim(self) -> int:
        return len(self.names)


@dataclass(slots=True, kw_only=True, frozen=True)
class CameraSpec:
    """A pinhole camera. ``intrinsics_33`` in pixels with integers at pixel centres, OpenCV axes."""

    name: str
    height: int
    width: int
    intrinsics_33: NDArray[np.float64]
    world_to_camera_44: NDArray[np.float64]


@dataclass(slots=True, kw_only=True, frozen=True)
class ViewLayout:
    """Which cameras make up the V axis, in order, or where they stand on one canvas.

    Without ``tiles``: separate streams of ``height`` x ``width``. With them: a collage, one canvas of ``height`` x ``width`` on which
    camera i fills tile i, (top, left, height, width) in pixels; tiles do not overlap. Raises ``UserError`` for anything else.
    """

    names: tuple[str, ...] = ("head",)
    height: int = 120
    width: int = 160
    tiles: tuple[tuple[int, int, int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.tiles:
            return
        if len(self.tiles) != len(self.names):
            got, wanted = f"{len(self.tiles)} tiles", f"one for each of {', '.join(self.names)}"
            raise UserError("views.tiles", got=got, wanted=wanted, fix="give one tile a camera, or none")
        if len(set(self.names)) < len(self.names):
            raise UserError("views.names", got=self.names, wanted="different names", fix="give each camera its own")
        taken = np.zeros((self.height, self.width), dtype=bool)
        for name, (top, left, height, width) in zip(self.names, self.tiles, strict=True):
            inside = min(top, left) >= 0 and min(height, width) >= 1
            inside = inside and top + height <= self.height and left + width <= self.width
            if not inside or taken[top : top + height, left : left + width].any():
                wanted = f"a part of the {self.height}x{self.width} canvas that no other camera fills"
                raise UserError(f"views.tiles[{name}]", got=(top, left, height, width), wanted=wanted, fix="move it")
            taken[top : top + height, left : left + width] = True

    def compose(self, pictures: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Pictures of each camera [...,h,w,3], of its tile's size -> the canvas [...,H,W,3], black where no camera is."""
        assert self.tiles, "separate streams have no canvas"
        lead = next(iter(pictures.values())).shape[:-3]
        canvas = np.zeros((*lead, self.height, self.width, 3), np.uint8)
        for name, (top, left, height, width) in zip(self.names, self.tiles, strict=True):
            picture = pictures.get(name)
            if picture is None or picture.shape != (*lead, height, width, 3) or picture.dtype != np.uint8:
                got = "none" if picture is None else f"{picture.dtype} {list(picture.shape)}"
                fix = "resize each camera's picture to its tile"
                raise UserError(f"pictures[{name}]", got=got, wanted=f"uint8 {[*lead, height, width, 3]}", fix=fix)
            canvas[..., top : top + height, left : left + width, :] = picture
        return canvas

    def split(self, canvas: Any) -> dict[str, Any]:
        """A canvas [...,H,W,C] (array or tensor) -> the part of each camera, by name, without a copy."""
        assert self.tiles, "separate streams have no canvas"
        if tuple(canvas.shape[-3:-1]) != (self.height, self.width):
            got, wanted = f"{canvas.shape[-3]}x{canvas.shape[-2]}", f"{self.height}x{self.width}"
            raise UserError("canvas", got=got, wanted=wanted, fix="compose it with the same layout")
        return {
            name: canvas[..., top : top + height, left : left + width, :]
            for name, (top, left, height, width) in zip(self.names, self.tiles, strict=True)
        }


@dataclass(slots=True, kw_only=True)
class Observation:
    """What a planner or policy sees at one control step.

    ``images``: camera name -> uint8 [H,W,3]. ``state_A``: drive targets (RoboTwin's proprioception), ``measured_A``: measured
    joints, both radians / gripper 0..1. ``step`` counts calls of ``env.step`` since reset; time is ``step * DT`` seconds.
    """

    images: dict[str, NDArray[np.uint8]]
    state_A: NDArray[np.float32]
    measured_A: NDArray[np.float32]
    instruction: str
    step: int


@dataclass(slots=True, kw_only=True)
class PointTracks:
    """Tracks of N points over T frames of one view.

    ``points_TN2``: (x, y) pixels of a ``size``=(H, W) picture, integers at pixel centres, float32; also defined where the point
    is hidden or outside. ``visible_TN``: bool. ``body_N``: id of the rigid body the point is on (-1 unknown).
    ``depth_N``: metric depth at the query frame in metres (0 where unknown). Query frame is frame 0.
    """

    points_TN2: NDArray[np.float32]
    visible_TN: NDArray[np.bool_]
    size: tuple[int, int]
    body_N: NDArray[np.int32]
    depth_N: NDArray[np.float32]
    teacher: str = "ground_truth"


@dataclass(slots=True, kw_only=True)
class WorldModelSpec:
    """What a world model can do (the contract's ``spec``).

    ``latents_fingerprint``, ``features_fingerprint``: identify what its latents (the codec) and its features (the weights) are, where
    that is less than everything that ``fingerprint`` covers; empty: ``fingerprint`` does.
    """

    name: str
    views: ViewLayout
    context_frames: int
    horizons: tuple[int, ...]
    frame_dt: float
    conditions: frozenset[str]
    returns: frozenset[str]
    proprioception_lags: tuple[int, ...] = ()
    action_spec: ActionSpec | None = None
    max_batch: int = 64
    deterministic: bool = True
    fingerprint: str = ""
    blocks: int = 0
    latents_fingerprint: str = ""
    features_fingerprint: str = ""


@dataclass(slots=True, kw_only=True, frozen=True)
class FeatureRequest:
    """Which features of the denoiser a decoder reads: the outputs of blocks ``taps`` (counted from 1) in one partial forward pass.

    ``sigma``: noise level in [0,1]. ``first_frame_mask``: ``correct`` (the first latent frame is the clean picture, with timestep 0) or
    ``worldarena_compat`` (WorldArena's released code: the mask falls on channel 0 of all frames instead, and every token has timestep 0).
    """

    taps: tuple[int, ...]
    sigma: float = 1.0
    first_frame_mask: str = "correct"


@dataclass(slots=True, kw_only=True)
class RolloutRequest:
    """B contexts, S candidates each.

    ``context_BVTHWC`` uint8, the last context frame is time 0. ``instructions``: B sentences. ``proprioception_BKA``: drive
    targets at ``spec.proprioception_lags`` (in control steps before now), float32. ``horizon``: frames to return, the context
    frame included. ``seeds_BS``: one noise seed a sample; equal seeds give equal rollouts wherever they stand in the batch.
    ``actions_BSPA``: drive targets of the next P control steps, one row a step of ``spec.action_spec.dt``, P = (horizon - 1) *
    ``spec.frame_dt / DT``; only for models whose conditions hold ``actions``. ``goal_BVHWC``: a picture of the end, only for models
    whose conditions hold ``goal``. ``features``: needed where ``returns`` holds ``features``; without frames or latents among
    ``returns`` nothing is denoised. ``ids``: (task, episode seed, number of the plan) of each context, for models that look their
    answer up; nothing is computed from them. ``plan_steps``: how many control steps after the start of its plan each context lies,
    for them too: 0 (None: all 0) where the context is what a camera sees, more where a longer plan goes on from imagined pictures.
    """

    context_BVTHWC: NDArray[np.uint8]
    instructions: list[str]
    seeds_BS: NDArray[np.int64]
    horizon: int
    proprioception_BKA: NDArray[np.float32] | None = None
    actions_BSPA: NDArray[np.float32] | None = None
    goal_BVHWC: NDArray[np.uint8] | None = None
    returns: frozenset[str] = frozenset({"frames"})
    features: FeatureRequest | None = None
    ids: list[tuple[str, int, int]] | None = None
    plan_steps: list[int] | None = None


@dataclass(slots=True, kw_only=True)
class Rollout:
    """An answer to a ``RolloutRequest``. ``times_T`` seconds from the context frame; ``cost``: e.g. seconds, denoiser calls.

    ``features_BSKFhwD``: K taps, F latent frames, token grid h x w; float16 or float32. ``seeds_BS``: noise seeds of the request, for
    decoders that draw noise of their own; whoever asked the model fills them in, None where nobody did.
    """

    times_T: NDArray[np.float64]
    frames_BSVTHWC: NDArray[np.uint8] | None = None
    latents_BSCFhw: NDArray[np.float32] | None = None
    features_BSKFhwD: NDArray[np.floating[Any]] | None = None
    cost: dict[str, float] = field(default_factory=dict)
    seeds_BS: NDArray[np.int64] | None = None


@dataclass(slots=True, kw_only=True, frozen=True)
class DecoderNeeds:
    """What a decoder reads of a rollout: ``returns`` as in ``RolloutRequest``, and which ``features``. ``horizons``: numbers of frames it
    takes (empty: any); ``frame_dt``: seconds between two of them (None: any). ``latents_fingerprint``, ``features_fingerprint``: of the
    latents or features it was trained on (empty: any), as in ``WorldModelSpec``."""

    returns: frozenset[str] = frozenset({"frames"})
    features: FeatureRequest | None = None
    horizons: tuple[int, ...] = ()
    frame_dt: float | None = None
    latents_fingerprint: str = ""
    features_fingerprint: str = ""


@dataclass(slots=True, kw_only=True)
class ActionChunk:
    """P joint targets, one a control step (``DT``): ``actions_PA[i]`` is approached during step i from now.

    ``spread_P``: the decoder's own uncertainty in radians (RMS over joints), or None.
    """

    actions_PA: NDArray[np.float32]
    spread_P: NDArray[np.float32] | None = None
