"""Which teachers make the targets: point tracks, depth and features, each from the simulator or from pictures.

Names are those of ``registry``, and besides

``ground_truth``  tracker or depth: the simulator's exact geometry, stored with the dataset
``degraded``      tracker: exact tracks with the errors of a learned tracker (``degraded.py``)
``none``          depth (points are not weighted by it) or encoder (no relations of features)
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field, replace

from physisforcing.core.errors import UserError, unknown_name

from ..physics.config import PhysicsConfig
from . import ground_truth
from .degraded import TrackErrors
from .frame_encoder import INFO as FRAME_ENCODER
from .protocols import DepthEstimator, PointTracker, TeacherInfo, VideoEncoder
from .registry import DEPTHS, ENCODERS, TRACKERS, TeacherConfig, make_depth, make_encoder, make_tracker

GROUND_TRUTH = TeacherInfo(name="ground_truth", version=str(ground_truth.VERSION), licence="MIT")
NONE = TeacherInfo(name="none", version="1", licence="MIT")
#: Names beside those of the registry.
BUILT_IN = {"tracker": ("ground_truth", "degraded"), "depth": ("ground_truth", "none"), "encoder": ("none",)}
#: Teachers whose identity is known without weights of the user's.
_KNOWN = {"ground_truth": GROUND_TRUTH, "none": NONE, "efficientnet_lite0": FRAME_ENCODER}
_REGISTERED = {"tracker": TRACKERS, "depth": DEPTHS, "encoder": ENCODERS}


@dataclass(slots=True, kw_only=True)
class TeachersConfig:
    """``permissive_only``: refuse weights that may not be used for everything, before they are read.

    ``relations``: 0 keeps the encoder's features; a number K keeps the cosines of up to K tokens of each window instead, which is
    far smaller where features belong to one window alone (V-JEPA 2: 0.13 MB for K = 512 in place of 3 MB). ``common``: whether
    the mean token is taken out of these relations (as ``physics.common``, which must agree). ``errors``: those of the degraded tracker.
    """

    tracker: TeacherConfig = field(default_factory=lambda: TeacherConfig(name="ground_truth"))
    depth: TeacherConfig = field(default_factory=lambda: TeacherConfig(name="ground_truth"))
    encoder: TeacherConfig = field(default_factory=lambda: TeacherConfig(name="efficientnet_lite0"))
    permissive_only: bool = False
    relations: int = 0
    common: str = "keep"
    errors: TrackErrors = field(default_factory=TrackErrors)

    def __post_init__(self) -> None:
        for kind, built_in in BUILT_IN.items():
            name = getattr(self, kind).name
            if name not in built_in and name not in _REGISTERED[kind]:
                raise unknown_name(
                    f"teacher.{kind}.name", name, [*built_in, *_REGISTERED[kind]], see="physis data targets --help"
                )
        if self.relations < 0 or self.relations == 1:
            raise UserError("teacher.relations", got=self.relations, wanted="0, or 2 tokens or more", fix="use 512")
        if self.common not in ("keep", "remove"):
            raise UserError("teacher.common", got=self.common, wanted="keep or remove", fix="teacher.common=keep")
        if self.relations and self.encoder.name == "none":
            fix = "teacher.relations=0, or name an encoder"
            raise UserError("teacher.relations", got=self.relations, wanted="0 without an encoder", fix=fix)

    @property
    def names(self) -> str:
        return "/".join(getattr(self, kind).name for kind in BUILT_IN)


def check_served(tracker: str, encoder: str, physics: PhysicsConfig) -> None:
    """``UserError`` where teachers of these names have not what the losses ask for: a loss of exactly 0 would look like success."""
    if physics.relations == "rigid" and tracker not in BUILT_IN["tracker"]:
        fix = "physics.relations=features, or teacher=simulator with data.targets=cache"
        raise UserError("physics.relations", got="rigid", wanted=f"features: {tracker} knows no bodies", fix=fix)
    if physics.relations == "features" and physics.lambda_sem > 0 and encoder == "none":
        fix = "physics.lambda_sem=0, physics.relations=rigid, or name an encoder (teacher.encoder.name=...)"
        raise UserError("teacher.encoder.name", got="none", wanted="an encoder for the relation loss", fix=fix)


class Teachers:
    """The teachers of a config, each loaded when it is first asked for, on ``device`` unless its settings name one. None: there is
    nothing to load."""

    def __init__(self, config: TeachersConfig, device: str = "cpu") -> None:
        self.config, self.device = config, device

    def _settings(self, kind: str) -> TeacherConfig:
        settings: TeacherConfig = getattr(self.config, kind)
        return replace(settings, device=settings.device or self.device)

    @functools.cached_property
    def tracker(self) -> PointTracker | None:
        if self.config.tracker.name in BUILT_IN["tracker"]:
            return None
        return make_tracker(self._settings("tracker"), permissive_only=self.config.permissive_only)

    @functools.cached_property
    def depth(self) -> DepthEstimator | None:
        if self.config.depth.name in BUILT_IN["depth"]:
            return None
        return make_depth(self._settings("depth"), permissive_only=self.config.permissive_only)

    @functools.cached_property
    def encoder(self) -> VideoEncoder | None:
        if self.config.encoder.name == "none":
            return None
        return make_encoder(self._settings("encoder"), permissive_only=self.config.permissive_only)

    def load(self) -> None:
        """Load all of them, without a trace in torch's random state."""
        import torch

        with torch.random.fork_rng(devices=()):
            _ = self.tracker, self.depth, self.encoder

    def info(self, kind: str) -> TeacherInfo:
        """Identity of the ``tracker``, ``depth`` or ``encoder``. Loads it where its weights decide."""
        name = getattr(self.config, kind).name
        if name == "degraded":
            errors = asdict(self.config.errors)
            version = "-".join([GROUND_TRUTH.version, *(f"{key}{value:g}" for key, value in errors.items())])
            return TeacherInfo(name=name, version=version, licence=GROUND_TRUTH.licence)
        return _KNOWN[name] if name in _KNOWN else getattr(self, kind).info

    @property
    def unidentified(self) -> list[str]:
        """The kinds whose teacher needs weights that the config names no path of: their identity cannot be told here."""
        weightless = {*_KNOWN, "degraded", "classical"}
        settings = {kind: getattr(self.config, kind) for kind in BUILT_IN}
        return [kind for kind, one in settings.items() if one.name not in weightless and one.path is None]
