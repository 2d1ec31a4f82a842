"""Outcomes of several models by task and episode, complete on one set of episodes, and what is counted over them."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from physisforcing.core.errors import IncompleteCoverageError, UserError
from physisforcing.core.paired_stats import paired_proportions, sign_flip_p
from physisforcing.core.results import STATUSES, count
from physisforcing.core.stats import bootstrap_mean, fisher_exact, mcnemar, mean_of_proportions, wilson

from .comparison_rows import (
    ALL,
    CONTROLS,
    COUNT_SUFFIX,
    ComparisonSettings,
    EpisodeOutcome,
    PairedSuccess,
    ScoreDifference,
    ScoreMean,
    SuccessCell,
)
from .summary import GATE_BASELINES


class EpisodeTable:
    """Outcomes by model, task and episode; complete, or it is not built."""

    def __init__(self, outcomes: Sequence[EpisodeOutcome]) -> None:
        self.of: dict[str, dict[tuple[str, str], EpisodeOutcome]] = {}
        self.about: dict[str, EpisodeOutcome] = {}
        for outcome in outcomes:
            self._add(outcome)
        if not self.of:
            fix = "run `physis compare` with at least one model"
            raise UserError("outcomes", got="none", wanted="episodes of at least one model", fix=fix)
        self.models = [name for name in self.of if name not in CONTROLS]
        self.controls = [name for name in self.of if name in CONTROLS]
        self.tasks = sorted({task for cells in self.of.values() for task, _ in cells})
        self.scopes = [*self.tasks, ALL] if len(self.tasks) > 1 else self.tasks
        self.episodes = {t: sorted({e for c in self.of.values() for task, e in c if task == t}) for t in self.tasks}
        self._check_coverage()

    def _add(self, outcome: EpisodeOutcome) -> None:
        cells, place = self.of.setdefault(outcome.model, {}), (outcome.task, outcome.episode)
        if outcome.status not in STATUSES:
            fix = "give rows of a results file"
            raise UserError("status", got=outcome.status, wanted=f"one of {', '.join(STATUSES)}", fix=fix)
        if place in cells:
            got = f"{outcome.model} twice on {outcome.task}/{outcome.episode}"
            raise UserError("outcomes", got=got, wanted="one result an episode", fix="give the rows of one evaluation")
        first = self.about.setdefault(outcome.model, outcome)
        if (first.recipe, first.training_seed) != (outcome.recipe, outcome.training_seed):
            got = f"{outcome.model} with two recipes or training seeds"
            raise UserError("outcomes", got=got, wanted="one checkpoint a model name", fix="name the checkpoints apart")
        cells[place] = outcome

    def _check_coverage(self) -> None:
        wanted = {(task, episode) for task, episodes in self.episodes.items() for episode in episodes}
        missing = [(m, *place) for m, cells in self.of.items() for place in sorted(wanted - cells.keys())]
        if missing:
            shown = "; ".join(f"{model}: {task}/{episode}" for model, task, episode in missing[:20])
            more = f"; and {len(missing) - 20} more" if len(missing) > 20 else ""
            raise IncompleteCoverageError(
                f"models were not run on the same episodes, {len(missing)} results are missing: {shown}{more}. "
                f"Run the same command again to finish them"
            )

    def recipes(self, min_seeds: int | None) -> dict[str, dict[int, str]]:
        """Recipes with enough training seeds (None: none has): name -> seed -> model. Empty unless two of them can be compared."""
        found: dict[str, dict[int, str]] = {}
        for name in self.models:
            about = self.about[name]
            if about.recipe and about.training_seed is not None:
                taken = found.setdefault(about.recipe, {}).setdefault(int(about.training_seed), name)
                if taken != name:
                    got = f"{taken} and {name}, both {about.recipe} with seed {about.training_seed}"
                    raise UserError("outcomes", got=got, wanted="one checkpoint a recipe and seed", fix="leave one out")
        if min_seeds is None:
            return {}
        enough = {name: members for name, members in found.items() if len(members) >= min_seeds}
        return enough if len(enough) > 1 else {}

    def cells(self, model: str, task: str) -> dict[tuple[str, str], EpisodeOutcome]:
        """Finished episodes of a model on a task, or on all."""
        return {p: o for p, o in self.of[model].items() if task in (p[0], ALL) and o.status != "error"}

    def success(self, task: str) -> list[SuccessCell]:
        found = []
        for model, cells in self.of.items():
            counts = count({"status": o.status} for (t, _), o in cells.items() if t == task)
            low, high = wilson(counts["success"], counts["n"])
            rate = counts["success"] / counts["n"] if counts["n"] else None
            found.append(
                SuccessCell(
                    task=task, model=model, recipe=self.about[model].recipe, successes=counts["success"],
                    n=counts["n"], errors=counts["error"], rate=rate, low=low, high=high,
                )
            )  # fmt: skip
        by_name = {cell.model: cell for cell in found}
        for cell in found:
            rivals = [b for b in GATE_BASELINES if b in by_name and b != cell.model]
            cell.against = {b: _fisher(cell, by_name[b]) for b in rivals}
        return found

    def success_over_tasks(self) -> list[SuccessCell]:
        """Mean of the tasks' rates; None where a task has no finished episode."""
        if len(self.tasks) < 2:
            return []
        per_task = [self.success(task) for task in self.tasks]
        found = []
        for parts in zip(*per_task, strict=True):
            rate, low, high = mean_of_proportions([(c.successes, c.n) for c in parts])
            sums = {name: sum(getattr(c, name) for c in parts) for name in ("successes", "n", "errors")}
            about = {"task": ALL, "model": parts[0].model, "recipe": parts[0].recipe}
            found.append(SuccessCell(**about, **sums, rate=rate, low=low, high=high))
        return found

    def paired(self, task: str, a: str, b: str, *, test: bool) -> PairedSuccess:
        first, second = self.cells(a, task), self.cells(b, task)
        places = first.keys() & second.keys()
        dropped = sum(len(e) for t, e in self.episodes.items() if task in (t, ALL)) - len(places)
        won = [(first[p].status == "success", second[p].status == "success") for p in places]
        only_a, only_b = won.count((True, False)), won.count((False, True))
        row = PairedSuccess(
            task=task, a=a, b=b, n=len(won), dropped=dropped, only_a=only_a, only_b=only_b, difference=None, low=None,
            high=None,
        )  # fmt: skip
        if won:
            both = won.count((True, True))
            row.difference, row.low, row.high = paired_proportions(both, only_a, only_b, won.count((False, False)))
            row.p = mcnemar(only_a, only_b) if test else None
        return row

    def has(self, score: str, *models: str) -> bool:
        """Whether every one of these models has the score in some episode."""
        return all(any(o.scores.get(score) is not None for o in self.of[m].values()) for m in models)

    def score_difference(self, task: str, score: str, a: str, b: str, settings: ComparisonSettings) -> ScoreDifference:
        first, second = self.cells(a, task), self.cells(b, task)
        places = sorted(first.keys() & second.keys())
        pairs = [(first[p].scores.get(score), second[p].scores.get(score)) for p in places]
        values = [float(x) - float(y) for x, y in pairs if x is not None and y is not None]
        row = ScoreDifference(
            task=task, score=score, a=a, b=b, n=len(values), missing=len(pairs) - len(values), difference=None,
            low=None, high=None,
        )  # fmt: skip
        if values:
            generator = named_generator(settings.seed, "score", task, score, a, b)
            row.difference, row.low, row.high = bootstrap_mean(values, generator, resamples=settings.resamples)
            row.p, _ = sign_flip_p(values, generator)
        return row

    def score_means(self, settings: ComparisonSettings) -> list[ScoreMean]:
        found = []
        for task, model in itertools.product(self.scopes, self.of):
            cells = list(self.cells(model, task).values())
            for score in dict.fromkeys(n for o in cells for n in o.scores if not n.endswith(COUNT_SUFFIX)):
                values = [float(v) for o in cells if (v := o.scores.get(score)) is not None]
                mean, low, high = (None, None, None)
                if values:
                    generator = named_generator(settings.seed, "mean", task, model, score)
                    mean, low, high = bootstrap_mean(values, generator, resamples=min(settings.resamples, 2000))
                missing = len(cells) - len(values)
                found.append(
                    ScoreMean(
                        task=task, model=model, score=score, n=len(values), missing=missing, mean=mean, low=low, high=high
                    )
                )  # fmt: skip
        return found

    def seed_values(self, members: Mapping[int, str], task: str, measure: str) -> dict[int, float]:
        """Training seed -> mean over tasks of the mean over episodes; a seed without a value in every task is left out."""
        tasks = self.tasks if task == ALL else [task]
        found = {}
        for seed, model in members.items():
            means = []
            for each in tasks:
                outcomes = self.cells(model, each).values()
                if measure == "success":
                    values = [float(o.status == "success") for o in outcomes]
                else:
                    values = [float(v) for o in outcomes if (v := o.scores.get(measure)) is not None]
                means += [float(np.mean(values))] if values else []
            if len(means) == len(tasks):
                found[seed] = float(np.mean(means))
        return found

    def errors(self) -> list[str]:
        return [
            f"{model} on {task}/{episode}: {outcome.error or 'crashed'}"
            for model, cells in self.of.items()
            for (task, episode), outcome in sorted(cells.items())
            if outcome.status == "error"
        ]


def _fisher(cell: SuccessCell, rival: SuccessCell) -> float | None:
    if not cell.n or not rival.n:
        return None
    return fisher_exact(cell.successes, cell.n - cell.successes, rival.successes, rival.n - rival.successes)


def named_generator(seed: int, *names: str) -> np.random.Generator:
    """A stream of its own for every named difference."""
    return np.random.default_rng([seed, zlib.crc32("\0".join(names).encode())])
