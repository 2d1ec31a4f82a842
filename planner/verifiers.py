"""Which of several imagined futures to execute: verifiers score candidates, higher is better."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import MissingCapabilityError, UserError, unknown_name
from physisforcing.core.results import config_hash
from physisforcing.core.types import ActionSpec

if TYPE_CHECKING:
    from .success_classifier import SuccessClassifier

#: Names that ``make_verifier`` knows.
VERIFIERS = ("spread", "smoothness", "track_consistency", "success", "combined", "random")
#: What ``combined`` stands for: every verifier that needs no training, equally weighed.
COMBINED = "spread+smoothness+track_consistency"


@dataclass(slots=True, kw_only=True)
class VerifierInput:
    """S candidates for one plan.

    ``frames_STHWC``: uint8, the first view's imagined pictures, frame 0 is the picture now (None where the rollout has none).
    ``actions_SPA``: targets that would be executed, within the limits; ``decoded_SPA``: as the decoder gave them.
    ``spread_SP``: the decoder's spread in radians or None. ``state_A``: drive targets now. ``execute``: rows that are executed
    before the next plan. ``seeds_S``: noise seeds of the candidates.
    """

    actions_SPA: NDArray[np.float32]
    decoded_SPA: NDArray[np.float32]
    state_A: NDArray[np.float32]
    execute: int
    seeds_S: NDArray[np.int64]
    task: str = ""
    instruction: str = ""
    frames_STHWC: NDArray[np.uint8] | None = None
    spread_SP: NDArray[np.float32] | None = None
    action_spec: ActionSpec | None = None


@runtime_checkable
class Verifier(Protocol):
    """Scores candidates."""

    @property
    def needs(self) -> frozenset[str]:
        """What it reads besides actions: ``frames``, ``spread``, ``action_spec``."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identifies it and its settings in results."""
        ...

    def score(self, given: VerifierInput) -> NDArray[np.float64]:
        """One finite number a candidate [S], higher is better. ``MissingCapabilityError`` without what ``needs`` names."""
        ...


@dataclass(slots=True, kw_only=True, frozen=True)
class Spread:
    """Minus the decoder's mean spread over the rows that are executed, in radians: pictures it can read."""

    needs: frozenset[str] = frozenset({"spread"})
    fingerprint: str = "spread"

    def score(self, given: VerifierInput) -> NDArray[np.float64]:
        if given.spread_SP is None:
            fix = "use a decoder that reports a spread, or another verifier"
            raise MissingCapabilityError("planner.verifier", got="no spread", wanted="the decoder's spread", fix=fix)
        return -given.spread_SP[:, : given.execute].mean(axis=1, dtype=np.float64)


@dataclass(slots=True, kw_only=True, frozen=True)
class Smoothness:
    """Minus jerk and violations of joint and speed limits, each in units of what is still usual, so without a unit.

    Jerk: RMS over arm joints of the third difference of the targets (the drive targets now come first), in units of ``jerk``
    rad/s^3. Joint limits: RMS over rows of how far the decoded targets leave the ``ActionSpec``, summed over joints, in units of
    ``excess`` radians (gripper: opening). Speed: RMS over rows and joints of what exceeds ``speed`` rad/s, in units of
    ``speed_excess``. RoboTwin's experts have a jerk of 12 to 16 and stay below 2 rad/s. Grippers count for limits only: they jump.
    """

    jerk: float = 15.0
    excess: float = 0.05
    speed: float = 2.0
    speed_excess: float = 0.5
    needs: frozenset[str] = frozenset({"action_spec"})

    @property
    def fingerprint(self) -> str:
        return f"smoothness-{self.jerk:g}-{self.excess:g}-{self.speed:g}-{self.speed_excess:g}"

    def score(self, given: VerifierInput) -> NDArray[np.float64]:
        spec = given.action_spec
        if spec is None:
            fix = "give the planner the environment's action_spec, or use another verifier"
            raise MissingCapabilityError("planner.verifier", got="no limits", wanted="an ActionSpec", fix=fix)
        arms = [i for i, name in enumerate(spec.names) if "gripper" not in name]
        now_S1A = np.broadcast_to(given.state_A, (len(given.actions_SPA), 1, spec.dim))
        path = np.concatenate([now_S1A, given.actions_SPA], axis=1).astype(np.float64)[..., arms]
        decoded = given.decoded_SPA.astype(np.float64)
        outside = np.maximum(decoded - np.array(spec.high), 0) + np.maximum(np.array(spec.low) - decoded, 0)
        speed = np.abs(np.diff(path, axis=1)) / spec.dt
        terms = (
            _rms(np.diff(path, n=3, axis=1) / spec.dt**3) / self.jerk,
            _rms(outside.sum(-1, keepdims=True)) / self.excess,
            _rms(np.maximum(speed - self.speed, 0)) / self.speed_excess,
        )
        return -np.sum(terms, axis=0)


def _rms(values_SPA: NDArray[np.float64]) -> NDArray[np.float64]:
    """[S]; nil where a chunk is too short to have any."""
    if values_SPA.shape[1] == 0:
        return np.zeros(len(values_SPA))
    return np.sqrt((values_SPA**2).mean(axis=(1, 2)))


@dataclass(slots=True, kw_only=True, frozen=True)
class Random:
    """A number from the candidate's noise seed and nothing else: the control that best-of-N has to beat."""

    needs: frozenset[str] = frozenset()
    fingerprint: str = "random"

    def score(self, given: VerifierInput) -> NDArray[np.float64]:
        return np.array([np.random.default_rng([7, int(seed)]).random() for seed in given.seeds_S])


class Success:
    """Probability that the task is done at the end of the imagination, by a trained classifier (0..1)."""

    needs = frozenset({"frames"})

    def __init__(self, classifier: SuccessClassifier) -> None:
        self.classifier = classifier

    @property
    def fingerprint(self) -> str:
        return f"success-{self.classifier.fingerprint}"

    def score(self, given: VerifierInput) -> NDArray[np.float64]:
        frames = wanted_frames(given)
        return self.classifier.probability(frames, [given.task] * len(frames)).astype(np.float64)


class Combined:
    """Weighted sum of the parts' z-scores over the candidates of a plan; a part that finds them equal has no say."""

    def __init__(self, parts: Sequence[tuple[float, Verifier]]) -> None:
        self.parts = list(parts)
        self.needs = frozenset().union(*(verifier.needs for _, verifier in self.parts))
        listed = [[weight, verifier.fingerprint] for weight, verifier in self.parts]
        self.fingerprint = f"combined-{config_hash({'parts': listed})[:12]}"

    def score(self, given: VerifierInput) -> NDArray[np.float64]:
        total = np.zeros(len(given.actions_SPA))
        for weight, verifier in self.parts:
            scores = verifier.score(given)
            deviation = scores.std()
            if deviation > 1e-12 * max(1.0, float(np.abs(scores).max())):
                total += weight * (scores - scores.mean()) / deviation
        return total


def wanted_frames(given: VerifierInput) -> NDArray[np.uint8]:
    """The pictures [S,T,H,W,3]; ``MissingCapabilityError`` where the rollout has none."""
    if given.frames_STHWC is None:
        fix = "use a verifier that reads actions: spread, smoothness"
        raise MissingCapabilityError("planner.verifier", got="no frames", wanted="imagined pictures", fix=fix)
    return given.frames_STHWC


def make_verifier(name: str, *, classifier: SuccessClassifier | None = None) -> Verifier:
    """A verifier by name, or several with weights: ``spread``, ``smoothness+success``, ``2*spread+0.5*smoothness``, ``combined``.

    ``classifier``: what ``success`` needs. ``UserError`` for an unknown name, a weight that is no number above 0, or ``success``
    without a classifier.
    """
    terms = (COMBINED if name.strip() == "combined" else name).split("+")
    parts = [_weighed(term.strip(), classifier) for term in terms]
    return parts[0][1] if len(parts) == 1 else Combined(parts)


def _weighed(term: str, classifier: SuccessClassifier | None) -> tuple[float, Verifier]:
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)\s*\*\s*)?(\w+)", term)
    if match is None or (match[1] is not None and float(match[1]) == 0):
        fix = "for instance planner.verifier=spread or planner.verifier=2*spread+smoothness"
        raise UserError("planner.verifier", got=term, wanted="NAME or WEIGHT*NAME, the weight above 0", fix=fix)
    return float(match[1] or 1), _single(match[2], classifier)


def _single(name: str, classifier: SuccessClassifier | None) -> Verifier:
    if name == "spread":
        return Spread()
    if name == "smoothness":
        return Smoothness()
    if name == "random":
        return Random()
    if name == "track_consistency":
        from .track_consistency import TrackConsistency

        return TrackConsistency()
    if name != "success":
        raise unknown_name("planner.verifier", name, VERIFIERS, see="physis eval plan --help")
    if classifier is None:
        fix = "physis train success data=[FOLDER] output=runs/success, then planner.success=runs/success/model"
        raise UserError("planner.success", got="", wanted="a trained success classifier", fix=fix)
    return Success(classifier)
