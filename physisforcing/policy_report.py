"""What ``physis eval policy`` found: the table, policies paired by scene, recipes over training seeds, and lines of measurements."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.planner.comparison import ALL, ComparisonSettings, EpisodeOutcome, compare
from physisforcing.planner.comparison_output import tables
from physisforcing.planner.comparison_rows import CONTROLS, Comparison, SeedDifference
from physisforcing.planner.comparison_table import EpisodeTable, named_generator
from physisforcing.planner.measurements import from_summary, measurement
from physisforcing.planner.summary import means_table, table_lines

from .policies import ActingPolicy

#: From so many training seeds a recipe on, recipes are compared.
MIN_TRAINING_SEEDS = 2
RESAMPLES = 10_000
#: Titles of ``comparison_output.tables``, and what the second one is called here.
PAIRED, GAPS, SEEDS = "Paired success", "Gap to the perfect model and to baselines", "Recipes over training seeds"
#: What a measurement of a difference says beside it, where its row has it.
DIFFERENCE = (
    "method", "only_a", "only_b", "p", "p_holm", "p_smallest", "dropped", "seeds_a", "seeds_b", "mean_a", "mean_b",
)  # fmt: skip
GAP = "Retrieval against the policies"
GAP_TEXT = "How far a policy stays behind the replayed nearest demonstration (or leads): first minus second on the same episodes. Not tested."
CROSSED = (
    "Interval over scenes and training seeds: percentile bootstrap that draws scenes (the same for both) and seeds of each recipe anew. With "
    "few training seeds it is too narrow: two seeds say little about a third."
)


def outcomes(rows: Sequence[Mapping[str, Any]], policies: Mapping[str, ActingPolicy]) -> list[EpisodeOutcome]:
    """Episodes of the policies and of the baselines that stand in a comparison (the expert does not), in the order of the policies."""
    found, order = [], list(policies)
    for row in sorted(rows, key=lambda row: order.index(row["policy"]) if row["policy"] in policies else len(order)):
        name = str(row["policy"])
        if name not in policies and name not in CONTROLS:
            continue
        about = policies.get(name, ActingPolicy())
        lines = str(row.get("error") or "").strip().splitlines()
        found.append(
            EpisodeOutcome(
                task=str(row["task"]),
                episode=str(row["seed"]),
                model=name,
                status=str(row["status"]),
                recipe=about.recipe,
                training_seed=about.training_seed,
                error=lines[-1] if lines else "",
            )
        )
    return found


@dataclasses.dataclass(slots=True, kw_only=True)
class RecipeDifference:
    """Mean success of recipe A minus that of B over scenes and training seeds; ``n``: scenes that every policy of both finished."""

    task: str
    a: str
    b: str
    seeds_a: int
    seeds_b: int
    n: int
    dropped: int
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float


def crossed_interval(
    won_a_SN: NDArray[np.bool_],
    won_b_SN: NDArray[np.bool_],
    generator: np.random.Generator,
    *,
    paired_seeds: bool = False,
    resamples: int = RESAMPLES,
) -> tuple[float, float, float]:
    """Difference of mean success (A minus B) and its 95 % percentile bootstrap interval over scenes and training seeds.

    ``won_a_SN``, ``won_b_SN``: success [training seeds, scenes] on the same N scenes. Each resample draws N scenes, the same for both, and
    the seeds of each; ``paired_seeds``: one draw of seeds for both, which then have equally many.
    """
    a, b = won_a_SN.astype(np.float64), won_b_SN.astype(np.float64)
    assert a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1] > 0
    scenes = generator.multinomial(a.shape[1], np.full(a.shape[1], 1 / a.shape[1]), resamples) / a.shape[1]
    seeds_a = generator.multinomial(len(a), np.full(len(a), 1 / len(a)), resamples) / len(a)
    seeds_b = seeds_a
    if not paired_seeds:
        seeds_b = generator.multinomial(len(b), np.full(len(b), 1 / len(b)), resamples) / len(b)
    means = np.einsum("rs,sn,rn->r", seeds_a, a, scenes, optimize=True)
    means -= np.einsum("rs,sn,rn->r", seeds_b, b, scenes, optimize=True)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(a.mean() - b.mean()), float(low), float(high)


def recipe_differences(
    table: EpisodeTable, recipes: Mapping[str, Mapping[int, str]], *, paired_seeds: bool = False
) -> list[RecipeDifference]:
    """Every pair of ``recipes`` (name -> training seed -> policy), task by task."""
    found = []
    for (a, seeds_a), (b, seeds_b) in itertools.combinations(recipes.items(), 2):
        paired = paired_seeds and seeds_a.keys() == seeds_b.keys()
        for task in table.tasks:
            cells = [table.cells(seeds[k], task) for seeds in (seeds_a, seeds_b) for k in sorted(seeds)]
            shared = sorted(set.intersection(*(set(cell) for cell in cells)))
            if not shared:
                continue
            won_SN = np.array([[cell[place].status == "success" for place in shared] for cell in cells], dtype=np.bool_)
            of_a, of_b = won_SN[: len(seeds_a)], won_SN[len(seeds_a) :]
            generator = named_generator(0, "recipes", task, a, b)
            difference, low, high = crossed_interval(of_a, of_b, generator, paired_seeds=paired)
            found.append(
                RecipeDifference(
                    task=task, a=a, b=b, seeds_a=len(of_a), seeds_b=len(of_b), n=len(shared),
                    dropped=len(table.episodes[task]) - len(shared), mean_a=float(of_a.mean()),
                    mean_b=float(of_b.mean()), difference=difference, low=low, high=high,
                )
            )  # fmt: skip
    return found


@dataclasses.dataclass(slots=True, kw_only=True)
class PolicyComparison:
    """``checkpoints``: every two policies, paired by scene. ``recipes``: the same episodes with the training seed as unit, where two recipes
    have enough seeds. ``crossed``: intervals over scenes and seeds. ``members``: those recipes, name -> training seed -> policy."""

    checkpoints: Comparison
    recipes: Comparison | None
    crossed: list[RecipeDifference]
    members: dict[str, dict[int, str]]

    def to_json(self) -> dict[str, Any]:
        plain = self.checkpoints.to_json()
        kept = {name: plain[name] for name in ("paired", "gaps", "family", "notes")}
        seeds = [] if self.recipes is None else self.recipes.to_json()["seeds"]
        return kept | {"seeds": seeds, "recipes": [dataclasses.asdict(row) for row in self.crossed]}


def compare_policies(
    rows: Sequence[Mapping[str, Any]], policies: Mapping[str, ActingPolicy], *, paired_seeds: bool = False
) -> PolicyComparison:
    """Exact McNemar tests and paired intervals of every two policies on the same scenes, and of recipes over their training seeds."""
    cells = outcomes(rows, policies)
    settings = ComparisonSettings(min_training_seeds=None, paired_seeds=False, tested_scores=())
    checkpoints = compare(cells, settings)
    table = EpisodeTable(cells)
    members = table.recipes(MIN_TRAINING_SEEDS)
    crossed, recipes = recipe_differences(table, members, paired_seeds=paired_seeds), None
    if members:
        settings = dataclasses.replace(settings, min_training_seeds=MIN_TRAINING_SEEDS, paired_seeds=paired_seeds)
        recipes = compare(cells, settings)
    return PolicyComparison(checkpoints=checkpoints, recipes=recipes, crossed=crossed, members=members)


# ---------------------------------------------------------------------------------------------------------------- words


def comparison_markdown(found: PolicyComparison) -> str:
    """Tables of the comparison; nothing where a single policy acts beside no baseline that it is compared with."""
    shown = [table for table in tables(found.checkpoints) if table.title == PAIRED]
    shown += [dataclasses.replace(t, title=GAP, text=GAP_TEXT) for t in tables(found.checkpoints) if t.title == GAPS]
    shown += [] if found.recipes is None else [table for table in tables(found.recipes) if table.title == SEEDS]
    lines: list[str] = []
    for table in shown:
        lines += [f"## {table.title}", "", table.text, "", *table_lines(table.head, table.rows), ""]
    if found.crossed:
        head = ["task", "A", "B", "seeds", "scenes", "dropped", "mean A", "mean B", "difference", "95 % interval"]
        cells = [
            [
                row.task, row.a, row.b, f"{row.seeds_a} and {row.seeds_b}", str(row.n), str(row.dropped), f"{100 * row.mean_a:.1f} %",
                f"{100 * row.mean_b:.1f} %", f"{100 * row.difference:+.1f}", f"{100 * row.low:+.1f} to {100 * row.high:+.1f}",
            ]
            for row in found.crossed
        ]  # fmt: skip
        lines += ["## Recipes over scenes and training seeds", "", CROSSED, "", *table_lines(head, cells), ""]
    if lines:
        comparisons = [one for one in (found.checkpoints, found.recipes) if one is not None]
        lines += [f"- {text}" for one in comparisons for text in (one.family, *one.notes)]
    return "\n".join(lines).rstrip() + "\n" if lines else ""


def means_markdown(means: Mapping[str, Mapping[str, Any]]) -> str:
    """The mean over tasks as a table."""
    text = "Each task has the same weight; the interval joins the tasks' Wilson intervals."
    return "\n".join(["## Mean over tasks", "", text, "", *means_table(means)]) + "\n"


# --------------------------------------------------------------------------------------------------------------- claims


def cell_of(name: str, claims: str) -> str:
    """The ``<cell>`` of a claim: the row's name, and before it the protocol, control or scenes where they are not the usual ones."""
    return name if claims == "interpolated" else f"{claims}-{name}"


def measurement_lines(
    summary: Mapping[str, Any],
    *,
    claims: str,
    manifests: Mapping[str, str],
    policies: Mapping[str, ActingPolicy],
    found: PolicyComparison,
    deviations: Callable[[Sequence[str]], str] | None = None,
) -> list[dict[str, Any]]:
    """``policy/<cell>/<task>/success`` of every row, ``policy/<cell>/mean/success`` over several tasks; ``.../success_difference`` of two policies
    (``all_tasks``: of all episodes), and under ``policy/recipe`` of two recipes, with the training seed as unit and over scenes and seeds. What was
    executed, on which scenes and after how many training seeds stands in ``against``, and what ``deviations`` says of the rows that a line is of."""

    def differing(*names: str) -> dict[str, Any]:
        return {} if deviations is None else {"deviations": deviations(names)}

    lines = []
    for line in from_summary(summary, protocol=claims, manifests=manifests):
        _, _, name, *rest = line["claim"].split("/")
        lines.append(
            line
            | {
                "claim": "/".join(["policy", cell_of(name, claims), *rest]),
                "against": {**line["against"], **_about(name, policies), **differing(name)},
            }
        )
    shared: dict[str, Any] = {"unit": "share", "command": summary["command"], "provenance": summary["provenance"]}
    for name, mean in summary["means"].items():
        if len(summary["tasks"]) > 1 and "rate" in mean:
            values = {key: mean[key] for key in ("low", "high", "n", "seeds")}
            claim = f"policy/{cell_of(name, claims)}/mean/success"
            about = _about(name, policies) | differing(name)
            lines.append(measurement(claim, mean["rate"], against=about, **values, **shared))
    sides = {name: [name] for name in policies}
    kinds: list[tuple[Sequence[Any], str, str]] = [(found.checkpoints.paired, "policy", "success_difference")]
    if found.recipes is not None:
        kinds.append((found.recipes.seeds, "policy/recipe", "success_difference"))
    kinds.append((found.crossed, "policy/recipe", "success_difference_over_scenes_and_seeds"))
    for rows, path, what in kinds:
        members = sides if path == "policy" else {name: list(seeds.values()) for name, seeds in found.members.items()}
        for row in rows:
            if row.difference is None:
                continue
            of = [name for side in (row.a, row.b) for name in members[side]]
            claim = f"{path}/{cell_of(f'{row.a}-minus-{row.b}', claims)}/{_task(row)}/{what}"
            about = {name: value for name in DIFFERENCE if (value := getattr(row, name, None)) is not None}
            about |= {"interval": CROSSED} if isinstance(row, RecipeDifference) else {}
            about |= {"scenes": manifests[row.task]} if row.task in manifests else {}
            n = row.n if hasattr(row, "n") else _episodes(summary, row.task, of)
            about |= differing(*of)
            lines.append(measurement(claim, row.difference, low=row.low, high=row.high, n=n, against=about, **shared))
    return lines


def _task(row: Any) -> str:
    """What a claim calls the row over all tasks: differences of two policies pool the episodes, those of recipes weight tasks equally."""
    return row.task if row.task != ALL else "mean" if isinstance(row, SeedDifference) else "all_tasks"


def _episodes(summary: Mapping[str, Any], task: str, names: Sequence[str]) -> int:
    """Finished episodes of these rows."""
    return sum(
        rows[name]["n"]
        for each, rows in summary["tasks"].items()
        if task in (each, ALL)
        for name in names
        if name in rows
    )


def _about(name: str, policies: Mapping[str, ActingPolicy]) -> dict[str, Any]:
    if name not in policies:
        return {}
    policy = policies[name]
    found: dict[str, Any] = {}
    if policy.recipe:
        found["recipe"] = policy.recipe
    if policy.training_seed is not None:
        found["training_seed"] = policy.training_seed
    if not policy.is_planner:
        names = ("execute", "steps", "mode", "execution")
        found |= {key: value for key in names if (value := getattr(policy.settings, key)) != ""}
        found |= {"seed": policy.settings.seed} if policy.settings.seed else {}
    return found


__all__ = [
    "PolicyComparison",
    "cell_of",
    "compare_policies",
    "comparison_markdown",
    "crossed_interval",
    "means_markdown",
    "measurement_lines",
]
