"""What a comparison is made of: episodes that come in, rows of differences that go out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

#: Policies that run beside every comparison, and what each shows. They are compared with, never among each other.
CONTROLS = {
    "noop": "holds the first joint targets",
    "random": "a new random target every 16 steps",
    "retrieval": "replays the actions of the nearest training demonstration",
    "retrieval_video": "decodes the video of the nearest training demonstration",
    "frozen": "decodes the first picture repeated",
    "noise": "decodes noise",
    "other": "decodes another episode's real video",
    "objects_erased": "decodes the real future drawn without the task's objects",
    "oracle": "decodes the real future",
    "perfect": "plans with exact dynamics under the same planner",
}
#: Of these the report says how far each model stays behind (or leads).
GAPS = ("perfect", "retrieval", "retrieval_video", "frozen")
#: Scores whose differences are tested; for all of them lower is better. Other scores are shown as means.
#: Where a thing that is not shown has no error, the share of such things is tested beside the error.
TESTED_SCORES = (
    "object_px_0.96s", "object_lost_0.96s", "gripper_px_0.96s", "pose_mm", "pose_deg", "pose_missing", "onset_error_steps",
    "onset_missed", "contact_onset_error_steps", "contact_onset_missed", "object_melted",
)  # fmt: skip
ALL = "all tasks"
#: ``<score>_n`` in a row is what ``<score>`` was averaged over, not a score.
COUNT_SUFFIX = "_n"


@dataclass(slots=True, kw_only=True, frozen=True)
class EpisodeOutcome:
    """One episode of one model (or control). ``scores``: name -> value, None where it could not be measured. ``recipe``: what the
    checkpoint was trained with, ``training_seed``: with which seed; models without them stand for themselves."""

    task: str
    episode: str
    model: str
    status: str
    recipe: str = ""
    training_seed: int | None = None
    scores: Mapping[str, float | None] = field(default_factory=dict)
    error: str = ""


@dataclass(slots=True, kw_only=True)
class ComparisonSettings:
    """``min_training_seeds``: from so many seeds a recipe on, recipes are compared with the seed as unit (None: never). ``seed`` feeds the bootstrap
    and the permutations; each difference has its own stream, so that another model in the table does not change it.

    ``paired_seeds``: checkpoints of two recipes with one training seed belong together, because the seed fixes something that both share
    and that matters (the same initial weights and the same batches, say). Equal numbers alone are no pairs.
    """

    min_training_seeds: int | None = 5
    paired_seeds: bool = False
    resamples: int = 10_000
    tested_scores: tuple[str, ...] = TESTED_SCORES
    seed: int = 0


@dataclass(slots=True, kw_only=True)
class SuccessCell:
    """Episodes of one model on one task; 95 % Wilson interval. ``against``: Fisher's p against no-op and random, not adjusted."""

    task: str
    model: str
    recipe: str
    successes: int
    n: int
    errors: int
    rate: float | None
    low: float
    high: float
    against: dict[str, float | None] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class PairedSuccess:
    """A minus B on the episodes that both finished; ``dropped``: episodes where one of them crashed. ``p_holm`` None: not tested."""

    task: str
    a: str
    b: str
    n: int
    dropped: int
    only_a: int
    only_b: int
    difference: float | None
    low: float | None
    high: float | None
    p: float | None = None
    p_holm: float | None = None


@dataclass(slots=True, kw_only=True)
class ScoreMean:
    """Mean of one score over episodes with its bootstrap interval; ``missing``: finished episodes without it."""

    task: str
    model: str
    score: str
    n: int
    missing: int
    mean: float | None
    low: float | None
    high: float | None


@dataclass(slots=True, kw_only=True)
class ScoreDifference:
    """A minus B on the episodes where both have the score: paired bootstrap interval, sign-flip test."""

    task: str
    score: str
    a: str
    b: str
    n: int
    missing: int
    difference: float | None
    low: float | None
    high: float | None
    p: float | None = None
    p_holm: float | None = None


@dataclass(slots=True, kw_only=True)
class SeedDifference:
    """Recipe A minus recipe B; a training seed counts once, with its mean over episodes (over tasks, then equal weights).

    ``low``, ``high``: None where the seeds give no interval. ``p_smallest``: what p can be at best with so many seeds."""

    task: str
    measure: str
    a: str
    b: str
    seeds_a: int
    seeds_b: int
    mean_a: float
    mean_b: float
    difference: float
    low: float | None
    high: float | None
    p: float
    p_smallest: float
    method: str
    p_holm: float | None = None


@dataclass(slots=True, kw_only=True)
class Comparison:
    """What ``compare`` found. ``tests``: how many p-values Holm's adjustment covers, ``family``: which ones, and which it does not.
    ``errors``: crashed episodes, one sentence each."""

    title: str
    unit: str
    episodes: dict[str, int]
    success: list[SuccessCell]
    paired: list[PairedSuccess]
    gaps: list[PairedSuccess]
    scores: list[ScoreMean]
    score_differences: list[ScoreDifference]
    seeds: list[SeedDifference]
    tests: int
    family: str
    errors: list[str]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain values, None where nothing was measured."""
        return asdict(self)
