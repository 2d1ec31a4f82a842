"""Several models on the same episodes: success with intervals, paired differences, or recipes over their training seeds."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from physisforcing.core.paired_stats import (
    paired_t,
    permutation_p_of_two,
    sign_flip_p,
    smallest_permutation_p,
    smallest_sign_flip_p,
    welch_t,
)
from physisforcing.core.stats import holm

from .comparison_rows import (
    ALL,
    CONTROLS,
    GAPS,
    TESTED_SCORES,
    Comparison,
    ComparisonSettings,
    EpisodeOutcome,
    PairedSuccess,
    ScoreDifference,
    ScoreMean,
    SeedDifference,
    SuccessCell,
)
from .comparison_table import EpisodeTable, named_generator

__all__ = [
    "ALL", "CONTROLS", "GAPS", "TESTED_SCORES", "Comparison", "ComparisonSettings", "EpisodeOutcome", "PairedSuccess",
    "ScoreDifference", "ScoreMean", "SeedDifference", "SuccessCell", "compare",
]  # fmt: skip


def compare(outcomes: Iterable[EpisodeOutcome], settings: ComparisonSettings | None = None) -> Comparison:
    """Success, paired differences and scores of several models on one set of episodes.

    Raises ``IncompleteCoverageError`` listing the episodes that some model lacks, and ``UserError`` for an episode given twice, an
    unknown status and two models with one recipe and seed. A crashed episode counts as covered and stands in no denominator.
    """
    settings = settings or ComparisonSettings()
    table = EpisodeTable(list(outcomes))
    recipes = table.recipes(settings.min_training_seeds)
    checkpoints = [m for m in table.models if not any(m in members.values() for members in recipes.values())]
    pairs = list(itertools.combinations(checkpoints, 2))
    paired = [table.paired(task, a, b, test=True) for task in table.scopes for a, b in pairs]
    differences = [
        table.score_difference(task, score, a, b, settings)
        for task in table.scopes
        for a, b in pairs
        for score in settings.tested_scores
        if table.has(score, a, b)
    ]
    seeds = _seed_differences(table, recipes, settings)
    tests = _adjust([*paired, *differences, *seeds])
    gaps = [
        table.paired(task, control, m, test=False)
        for control in GAPS
        if control in table.controls
        for task in table.scopes
        for m in table.models
    ]
    if {"oracle", "objects_erased"} <= set(table.controls):
        gaps += [table.paired(task, "oracle", "objects_erased", test=False) for task in table.scopes]
    unit, title, notes = _unit(recipes, checkpoints, settings)
    notes += _out_of_reach(seeds, tests)
    every = bool(seeds) and all(row.method.startswith("paired") for row in seeds)
    if settings.paired_seeds and settings.min_training_seeds is not None and not every:
        notes.append(
            f"Pairs of training seeds were declared, but not every difference has them: that takes two recipes with the same "
            f"{settings.min_training_seeds} seeds or more."
        )
    return Comparison(
        title=title,
        unit=unit,
        episodes={task: len(table.episodes[task]) for task in table.tasks},
        success=[c for task in table.tasks for c in table.success(task)] + table.success_over_tasks(),
        paired=paired,
        gaps=gaps,
        scores=table.score_means(settings),
        score_differences=differences,
        seeds=seeds,
        tests=tests,
        family=_family(paired, differences, seeds),
        errors=table.errors(),
        notes=notes,
    )


def _unit(
    recipes: Mapping[str, Mapping[int, str]], checkpoints: Sequence[str], settings: ComparisonSettings
) -> tuple[str, str, list[str]]:
    few = "Differences between checkpoints hold for these checkpoints alone: another training seed of the same recipe may turn them round."
    if settings.min_training_seeds is not None:
        few += f" From {settings.min_training_seeds} seeds a recipe on, recipes are compared with the training seed as unit."
    if not recipes:
        return "checkpoint", "Checkpoint comparison", [few]
    counts = ", ".join(f"{name}: {len(members)}" for name, members in recipes.items())
    notes = [f"The unit of every difference between recipes is the training seed ({counts})."]
    if not checkpoints:
        return "training seed", "Comparison of recipes over training seeds", notes
    rest = f"{', '.join(checkpoints)}: fewer than {settings.min_training_seeds} training seeds, compared as checkpoints only."
    return "training seed", "Comparison of recipes over training seeds, and checkpoint comparison", [*notes, rest, few]


def _adjust(rows: Sequence[PairedSuccess | ScoreDifference | SeedDifference]) -> int:
    """Write Holm's adjusted p-value into every row that was tested; returns how many were."""
    tested = [(row, row.p) for row in rows if row.p is not None]
    for (row, _), value in zip(tested, holm([p for _, p in tested]), strict=True):
        row.p_holm = value
    return len(tested)


#: Chance of a false finding below which a difference is called one.
LEVEL = 0.05
FAMILY = (
    "Holm's adjustment covers {total} p-values as one family: {members}. Not in it, and unadjusted: Fisher's tests against no-op and "
    "random, every interval, and the sentences on controls, which rest on intervals."
)


def _family(
    paired: Sequence[PairedSuccess], differences: Sequence[ScoreDifference], seeds: Sequence[SeedDifference]
) -> str:
    """Which p-values ``_adjust`` adjusted, in a sentence."""
    kinds = {
        "McNemar tests of success between checkpoints": paired,
        "sign-flip tests of scores between checkpoints": differences,
        "tests between recipes": seeds,
    }
    counts = {name: sum(row.p is not None for row in rows) for name, rows in kinds.items()}
    members = ", ".join(f"{count} {name}" for name, count in counts.items())
    return FAMILY.format(total=sum(counts.values()), members=members)


def _out_of_reach(seeds: Sequence[SeedDifference], tests: int) -> list[str]:
    """Says where no difference between recipes could have come out, however large."""
    smallest = min((row.p_smallest for row in seeds), default=0.0)
    if smallest * tests <= LEVEL:
        return []
    return [
        f"With these numbers of training seeds no p-value between recipes can be below {smallest:.2g}, which {tests} tests take to "
        f"{min(1.0, smallest * tests):.2g}: no difference can come out at {LEVEL:g}, whatever its size."
    ]


def _seed_differences(
    table: EpisodeTable, recipes: Mapping[str, Mapping[int, str]], settings: ComparisonSettings
) -> list[SeedDifference]:
    found = []
    for (name_a, members_a), (name_b, members_b) in itertools.combinations(recipes.items(), 2):
        for task in table.scopes:
            for measure in ("success", *settings.tested_scores):
                values_a, values_b = (table.seed_values(m, task, measure) for m in (members_a, members_b))
                if min(len(values_a), len(values_b)) >= 2:
                    found.append(_seed_difference(task, measure, name_a, name_b, values_a, values_b, settings))
    return found


def _seed_difference(
    task: str,
    measure: str,
    name_a: str,
    name_b: str,
    values_a: Mapping[int, float],
    values_b: Mapping[int, float],
    settings: ComparisonSettings,
) -> SeedDifference:
    generator = named_generator(settings.seed, "seeds", task, measure, name_a, name_b)
    a, b = list(values_a.values()), list(values_b.values())
    if settings.paired_seeds and values_a.keys() == values_b.keys():
        differences = [values_a[seed] - values_b[seed] for seed in sorted(values_a)]
        difference, low, high = paired_t(differences)
        p, exact = sign_flip_p(differences, generator)
        smallest = smallest_sign_flip_p(len(differences))
        method = f"paired by seed, as declared: t interval, sign flips ({'all' if exact else 'drawn'})"
    else:
        difference, low, high = welch_t(a, b)
        p, exact = permutation_p_of_two(a, b, generator)
        smallest = smallest_permutation_p(len(a), len(b))
        method = f"seeds not paired: Welch's interval, permutation ({'all' if exact else 'drawn'})"
    return SeedDifference(
        task=task, measure=measure, a=name_a, b=name_b, seeds_a=len(a), seeds_b=len(b), mean_a=float(np.mean(a)),
        mean_b=float(np.mean(b)), difference=difference, low=low, high=high, p=p, p_smallest=smallest, method=method,
    )  # fmt: skip
