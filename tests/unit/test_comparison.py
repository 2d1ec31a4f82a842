"""Comparisons of models on the same episodes: counts, tests and words against references computed another way."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re

import numpy as np
import pytest
import scipy.stats

from physisforcing.core.errors import IncompleteCoverageError, UserError
from physisforcing.core.report import ReportData, write_report
from physisforcing.core.stats import wilson
from physisforcing.planner.comparison import Comparison, ComparisonSettings, EpisodeOutcome, compare
from physisforcing.planner.comparison_controls import SensitivityPair, control_verdicts, summarise_sensitivity
from physisforcing.planner.comparison_output import success_rows, tables
from physisforcing.planner.imagined_success import score_imagined_success

SETTINGS = ComparisonSettings(resamples=2000)


def outcome(model: str, episode: int, won: bool | None, task: str = "click_bell", **more) -> EpisodeOutcome:
    status = "error" if won is None else "success" if won else "failure"
    return EpisodeOutcome(task=task, episode=f"{100000 + episode}", model=model, status=status, **more)


def outcomes(model: str, wins: str, task: str = "click_bell", **more) -> list[EpisodeOutcome]:
    """``wins``: one letter an episode, 1 success, 0 failure, e crash."""
    return [outcome(model, k, {"1": True, "0": False, "e": None}[w], task, **more) for k, w in enumerate(wins)]


def one(rows: list, **wanted):
    found = [row for row in rows if all(getattr(row, k) == v for k, v in wanted.items())]
    assert len(found) == 1, (wanted, len(found))
    return found[0]


def test_success_and_paired_counts() -> None:
    found = compare(
        [*outcomes("a", "1111111100"), *outcomes("b", "1100000011"), *outcomes("noop", "0000000000")], SETTINGS
    )
    assert (
        found.title == "Checkpoint comparison" and found.unit == "checkpoint" and found.episodes == {"click_bell": 10}
    )
    cell = one(found.success, model="a")
    assert (cell.successes, cell.n, cell.rate) == (8, 10, 0.8) and (cell.low, cell.high) == wilson(8, 10)
    assert cell.against["noop"] == pytest.approx(scipy.stats.fisher_exact([[8, 2], [0, 10]])[1])
    pair = one(found.paired, task="click_bell")
    assert (pair.a, pair.b, pair.only_a, pair.only_b, pair.n, pair.dropped) == ("a", "b", 6, 2, 10, 0)
    assert pair.p == pytest.approx(scipy.stats.binomtest(2, 8).pvalue) and pair.p_holm == pair.p  # one test only
    assert pair.difference == pytest.approx(0.4) and pair.low < 0 < pair.difference < pair.high
    assert found.tests == 1 and "another training seed" in found.notes[0]


def test_crashed_episodes_stand_in_no_denominator_and_are_shown() -> None:
    rows = [*outcomes("a", "11e1"), *outcomes("b", "0e10")]
    rows[2] = outcome("a", 2, None, error="the simulator died")
    found = compare(rows, SETTINGS)
    cell = one(found.success, model="a")
    assert (cell.successes, cell.n, cell.errors) == (3, 3, 1)
    pair = found.paired[0]
    assert (pair.n, pair.dropped, pair.only_a, pair.only_b) == (2, 2, 2, 0)
    assert found.errors == ["a on click_bell/100002: the simulator died", "b on click_bell/100001: crashed"]
    nothing = compare([*outcomes("a", "ee"), *outcomes("b", "11")], SETTINGS)
    assert one(nothing.success, model="a").rate is None and nothing.paired[0].p is None and nothing.tests == 0


def test_unequal_episode_sets_are_refused_and_listed() -> None:
    rows = [*outcomes("a", "1111"), *outcomes("b", "11"), *outcomes("noop", "0000")]
    with pytest.raises(
        IncompleteCoverageError, match="2 results are missing: b: click_bell/100002; b: click_bell/100003"
    ) as seen:
        compare(rows, SETTINGS)
    assert seen.value.exit_code == 3
    with pytest.raises(IncompleteCoverageError, match="noop: place_empty_cup/100000"):
        compare([*outcomes("a", "1"), *outcomes("a", "1", "place_empty_cup"), *outcomes("noop", "0")], SETTINGS)


def test_what_cannot_be_one_evaluation_is_refused() -> None:
    with pytest.raises(UserError, match="twice"):
        compare([*outcomes("a", "1"), *outcomes("a", "0")], SETTINGS)
    with pytest.raises(UserError, match="at least one model"):
        compare([], SETTINGS)
    with pytest.raises(UserError, match="status"):
        compare([EpisodeOutcome(task="t", episode="1", model="a", status="won")], SETTINGS)
    two = [outcome("a", 0, True, recipe="x", training_seed=0), outcome("b", 0, True, recipe="x", training_seed=0)]
    with pytest.raises(UserError, match="both x with seed 0"):
        compare(two, SETTINGS)
    with pytest.raises(UserError, match="two recipes"):
        compare([outcome("a", 0, True, recipe="x"), outcome("a", 1, True, recipe="y")], SETTINGS)


def scored(model: str, values: list[float | None], name: str = "pose_mm", **more) -> list[EpisodeOutcome]:
    return [outcome(model, k, True, scores={name: v, f"{name}_n": 3}, **more) for k, v in enumerate(values)]


def test_scores_are_paired_where_both_have_them() -> None:
    generator = np.random.default_rng(0)
    base = generator.normal(20, 8, 40)
    a = [*(base + generator.normal(0, 1, 40) - 2), None, 5.0]
    b = [*base, 3.0, None]
    found = compare([*scored("a", a), *scored("b", b)], SETTINGS)
    row = one(found.score_differences, score="pose_mm")
    differences = np.array(a[:40]) - np.array(b[:40])
    assert (row.n, row.missing) == (40, 2) and row.difference == pytest.approx(differences.mean())
    half = scipy.stats.sem(differences) * 1.96
    assert (row.low, row.high) == pytest.approx((row.difference - half, row.difference + half), abs=0.12)
    assert row.high < 0 and row.p < 0.01  # paired: far narrower than the spread of the episodes
    mean = one(found.scores, model="a", score="pose_mm")
    assert (mean.n, mean.missing) == (41, 1)
    assert not [s for s in found.scores if s.score.endswith("_n")]  # counts are not scores
    assert found.tests == 2  # McNemar of success, and this


def test_holm_covers_every_test_of_the_report() -> None:
    rows = [*outcomes("a", "1" * 12), *outcomes("b", "1" * 6 + "0" * 6), *outcomes("c", "0" * 12)]
    rows += [*outcomes("a", "1" * 9, "lift"), *outcomes("b", "0" * 9, "lift"), *outcomes("c", "0" * 9, "lift")]
    found = compare(rows, SETTINGS)
    assert found.tests == len(found.paired) == 9  # three pairs, two tasks and all tasks
    p = np.array([row.p for row in found.paired])
    order = np.argsort(p, kind="stable")
    expected = np.empty(9)
    expected[order] = np.minimum(1, np.maximum.accumulate(p[order] * (9 - np.arange(9))))
    assert [row.p_holm for row in found.paired] == pytest.approx(expected.tolist())
    pooled = one(found.paired, task="all tasks", a="a", b="b")
    assert (pooled.only_a, pooled.only_b, pooled.n) == (15, 0, 21)
    mean = one(found.success, task="all tasks", model="b")
    assert mean.rate == pytest.approx((0.5 + 0) / 2) and (mean.successes, mean.n) == (6, 21)


def test_a_further_model_does_not_change_a_difference() -> None:
    values = np.random.default_rng(1).normal(10, 3, (3, 15)).tolist()
    two = compare([*scored("a", values[0]), *scored("b", values[1])], SETTINGS)
    three = compare([*scored("c", values[2]), *scored("a", values[0]), *scored("b", values[1])], SETTINGS)
    mine = one(two.score_differences, a="a", b="b")
    other = one(three.score_differences, a="a", b="b")
    assert (mine.low, mine.high, mine.p) == (other.low, other.high, other.p)
    assert other.p_holm >= mine.p_holm


def recipe_rows(rates: dict[str, list[float]], episodes: int = 20, first_seed: dict[str, int] | None = None) -> list:
    rows = []
    for recipe, values in rates.items():
        for seed, rate in enumerate(values, start=(first_seed or {}).get(recipe, 0)):
            won = round(rate * episodes)
            wins = "1" * won + "0" * (episodes - won)
            rows += outcomes(f"{recipe} seed {seed}", wins, recipe=recipe, training_seed=seed)
    return rows


def test_from_five_seeds_on_the_seed_is_the_unit() -> None:
    rates = {"flow": [0.2, 0.4, 0.3, 0.5, 0.35], "physis": [0.45, 0.55, 0.5, 0.6, 0.55]}
    found = compare(recipe_rows(rates), SETTINGS)
    assert found.title == "Comparison of recipes over training seeds" and found.unit == "training seed"
    assert found.paired == [] and len(found.seeds) == 1  # no checkpoint is compared with another one
    row = found.seeds[0]
    a, b = np.array(rates["flow"]), np.array(rates["physis"])
    wanted = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert row.difference == pytest.approx((a - b).mean()) and (row.low, row.high) == pytest.approx(
        (wanted.low, wanted.high)
    )
    pooled = np.concatenate([a, b])
    apart = [pooled[list(c)].mean() - np.delete(pooled, c).mean() for c in itertools.combinations(range(10), 5)]
    assert row.p == pytest.approx(np.mean(np.abs(apart) >= abs((a - b).mean()) - 1e-9))
    assert "not paired" in row.method and (row.seeds_a, row.seeds_b) == (5, 5) and row.p_smallest == 2 / 252
    assert (row.mean_a, row.mean_b) == pytest.approx((a.mean(), b.mean()))
    assert "training seed" in found.notes[0] and "flow: 5" in found.notes[0]


def test_seeds_are_paired_only_where_that_is_declared() -> None:
    """Five seeds of which every one is better: equal numbers are no pairs, and pairs could not go below 1/16."""
    rates = {"flow": [0.2, 0.3, 0.25, 0.3, 0.2], "physis": [0.6, 0.7, 0.65, 0.7, 0.6]}
    row = compare(recipe_rows(rates), SETTINGS).seeds[0]
    assert row.p == row.p_smallest == pytest.approx(0.00794, abs=1e-5)
    paired = dataclasses.replace(SETTINGS, paired_seeds=True)
    declared = compare(recipe_rows(rates), paired)
    row = declared.seeds[0]
    assert "as declared" in row.method and row.p == row.p_smallest == 2 / 32
    assert (row.low, row.high) == (None, None)  # five equal differences are no certainty
    assert any("can be below 0.062" in note for note in declared.notes)
    assert next(t for t in tables(declared) if "smallest p" in t.head).rows[0][10] == "0.062"
    assert "not paired" in compare(recipe_rows(rates, first_seed={"physis": 3}), paired).seeds[0].method


def test_the_family_is_told() -> None:
    found = compare([*scored("a", [1.0, 2, 3, 5]), *scored("b", [2.0, 2, 4, 4]), *outcomes("noop", "0000")], SETTINGS)
    assert "covers 2 p-values" in found.family and "1 McNemar" in found.family and "1 sign-flip" in found.family
    assert "Fisher's tests against no-op and random" in found.family and found.tests == 2


def test_one_episode_has_no_interval() -> None:
    found = compare([*scored("a", [4.0]), *scored("b", [5.0])], SETTINGS)
    row, mean = found.score_differences[0], one(found.scores, model="a")
    assert (row.difference, row.low, row.high) == (-1, None, None) and (mean.mean, mean.low) == (4, None)
    cells = [cell for t in tables(found) for r in t.rows for cell in r]
    assert "4 (no interval) n=1" in cells


def test_other_seeds_are_not_paired_and_four_are_too_few() -> None:
    rates = {"flow": [0.2, 0.4, 0.3, 0.5, 0.35], "physis": [0.45, 0.55, 0.5, 0.6, 0.55, 0.7]}
    row = compare(recipe_rows(rates, first_seed={"physis": 3}), SETTINGS).seeds[0]
    assert "Welch" in row.method and (row.seeds_a, row.seeds_b) == (5, 6)
    wanted = scipy.stats.ttest_ind(rates["flow"], rates["physis"], equal_var=False).confidence_interval()
    assert (row.low, row.high) == pytest.approx((wanted.low, wanted.high))
    few = compare(recipe_rows({name: values[:4] for name, values in rates.items()}), SETTINGS)
    assert few.title == "Checkpoint comparison" and few.seeds == [] and len(few.paired) == math.comb(8, 2)


def test_recipes_beside_a_single_checkpoint() -> None:
    rates = {"flow": [0.2, 0.4, 0.3, 0.5, 0.35], "physis": [0.45, 0.55, 0.5, 0.6, 0.55]}
    rows = [*recipe_rows(rates), *outcomes("wan", "1" * 5 + "0" * 15), *outcomes("wow", "0" * 20)]
    found = compare(rows, SETTINGS)
    assert "and checkpoint comparison" in found.title and len(found.seeds) == 1
    assert [(p.a, p.b) for p in found.paired] == [("wan", "wow")]
    assert any("wan, wow" in note for note in found.notes)


def test_gap_to_the_perfect_model() -> None:
    rows = [*outcomes("a", "1100000000"), *outcomes("perfect", "1111111100"), *outcomes("retrieval", "1000000000")]
    found = compare(rows, SETTINGS)
    gap = one(found.gaps, a="perfect", b="a")
    assert gap.difference == pytest.approx(0.6) and gap.low > 0 and gap.p is None and gap.p_holm is None
    assert one(found.gaps, a="retrieval", b="a").difference == pytest.approx(-0.1)
    assert found.paired == [] and found.tests == 0  # controls are not tested against one model


def verdict(rows: list[EpisodeOutcome], control: str):
    return one(control_verdicts(rows), control=control)


def test_the_robot_must_follow_another_episodes_video() -> None:
    def other(to_own: float, to_other: float) -> list[EpisodeOutcome]:
        errors = {"joint_deg": to_own, "joint_deg_to_other": to_other}
        return [*outcomes("a", "11"), *outcomes("other", "00", scores=errors)]

    good = verdict(other(20.0, 4.9), "other")
    assert good.holds and "4.90 degrees" in good.text and "n=2" in good.text
    bad = verdict(other(20.0, 5.0), "other")
    assert bad.holds is False and "does not follow" in bad.text
    unknown = verdict([*outcomes("a", "11"), *outcomes("other", "00")], "other")
    assert unknown.holds is None


def test_erased_objects_decide_what_a_task_can_show() -> None:
    def erased(oracle: str, without: str):
        return verdict([*outcomes("oracle", oracle), *outcomes("objects_erased", without)], "objects_erased")

    same = erased("1" * 180 + "0" * 20, "1" * 179 + "0" * 21)
    assert same.holds is False and "cannot show object physics" in same.text and "n=200" in same.text
    loose = [*outcomes("oracle", "1" * 18 + "00"), *outcomes("objects_erased", "1" * 18 + "00")]
    assert [control_verdicts(loose, margin=m)[0].holds for m in (0.1, 0.3)] == [None, False]
    matters = erased("1" * 18 + "00", "1" * 4 + "0" * 16)
    assert matters.holds is True and "matters" in matters.text
    for oracle, without in (("1" * 10, "1" * 7 + "000"), ("1", "0"), ("11", "10"), ("1" * 10, "1" * 10)):
        few = erased(oracle, without)
        assert few.holds is None and "n too small to say" in few.text and "equal within 10 points" in few.text
    unneeded = erased("1" * 4 + "0" * 16, "1" * 18 + "00")
    assert unneeded.holds is False and "without the objects" in unneeded.text
    never = erased("0" * 10, "0" * 10)
    assert never.holds is None and "says nothing" in never.text


def test_noise_must_not_succeed_and_models_must_beat_a_frozen_picture() -> None:
    def noise(wins: int, still: int, n: int):
        rows = [*outcomes("noise", "1" * wins + "0" * (n - wins)), *outcomes("noop", "1" * still + "0" * (n - still))]
        return verdict(rows, "noise")

    assert noise(1, 0, 100).holds and "at most 10 points better" in noise(1, 0, 100).text
    lucky = noise(15, 0, 20)
    assert lucky.holds is False and "not owed to the imagination" in lucky.text
    assert noise(5, 0, 10).holds is False  # the interval of half of ten against none lies above 0
    for wins in (1, 2):
        assert noise(wins, 0, 10).holds is None and "n too small to say" in noise(wins, 0, 10).text
    assert verdict(outcomes("noise", "00"), "noise").holds is None

    def frozen(wins: int, n: int):
        return verdict([*outcomes("frozen", "0" * n), *outcomes("a", "1" * wins + "0" * (n - wins))], "frozen")

    assert frozen(15, 20).holds and "more often" in frozen(15, 20).text
    assert frozen(1, 20).holds is None and "n too small to say" in frozen(1, 20).text
    weak = frozen(1, 200)
    assert weak.holds is False and "at most 10 points more often" in weak.text and "unadjusted" in weak.text


def test_sensitivity_counts_ties_as_not_nearer() -> None:
    values = [(2.0, 9.0), (3.0, 8.0), (5.0, 5.0), (6.0, 4.0), (None, 3.0)]
    pairs = [
        SensitivityPair(model="a", kind="action", task="click_bell", episode=str(k), own=own, other=other)
        for k, (own, other) in enumerate(values)
    ]
    found = one(summarise_sensitivity(pairs), kind="action")
    assert (found.n, found.missing, found.nearer_own, found.share) == (4, 1, 2, 0.5)
    assert (found.low, found.high) == wilson(2, 4) and found.margin == pytest.approx((7 + 5 + 0 - 2) / 4)
    nothing = summarise_sensitivity([pairs[-1]])[0]
    assert nothing.share is None and nothing.margin is None and nothing.n == 0


def test_imagined_success_against_a_reference() -> None:
    generator = np.random.default_rng(2)
    truth = generator.uniform(size=200) < 0.3
    p = np.clip(0.25 + 0.4 * truth + generator.normal(0, 0.2, 200), 0, 1)
    found = score_imagined_success([*p, None], [*truth, True])
    assert (found.n, found.missing, found.successes) == (200, 1, int(truth.sum()))
    called = p >= 0.5
    sensitivity, specificity = called[truth].mean(), (~called[~truth]).mean()
    assert (found.sensitivity, found.specificity) == pytest.approx((sensitivity, specificity))
    assert found.balanced_accuracy == pytest.approx((sensitivity + specificity) / 2)
    draws = [
        (called[generator.choice(np.flatnonzero(truth), truth.sum())].mean()
         + (~called)[generator.choice(np.flatnonzero(~truth), (~truth).sum())].mean()) / 2
        for _ in range(2000)
    ]  # fmt: skip
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=0.02)
    assert found.brier == pytest.approx(np.mean((p - truth) ** 2))
    assert found.brier_base == pytest.approx(truth.mean() * (1 - truth.mean()))
    edges = np.clip((p * 10).astype(int), 0, 9)
    ece = sum((edges == k).mean() * abs(p[edges == k].mean() - truth[edges == k].mean()) for k in set(edges))
    assert found.ece == pytest.approx(ece) and sum(b.n for b in found.bins) == 200


def test_imagined_success_of_one_class_is_said_to_be_undefined() -> None:
    found = score_imagined_success([0.1, 0.7, 1.0], [False, False, False])
    assert found.balanced_accuracy is None and found.low is None and found.sensitivity is None
    assert found.specificity == pytest.approx(1 / 3) and found.brier == pytest.approx((0.01 + 0.49 + 1) / 3)
    assert "All 3 episodes failed" in found.note and found.bins[-1].high == 1.0
    empty = score_imagined_success([None], [True])
    assert empty.n == 0 and empty.ece is None and empty.missing == 1 and "No episode" in empty.note
    perfect = score_imagined_success([0.0, 1.0] * 5, [False, True] * 5)
    assert perfect.balanced_accuracy == 1 and perfect.low < 0.9  # ten episodes prove little
    for wrong in ([1.5], [0.5, 0.5]):
        with pytest.raises(UserError, match="probabilities"):
            score_imagined_success(wrong, [True])


def test_chunks_of_one_episode_are_not_independent() -> None:
    """Forty episodes whose five chunks are all judged alike: the interval is as wide as forty independent cases make it."""
    generator = np.random.default_rng(5)
    right = generator.uniform(size=40) < 0.7
    outcomes, episodes = np.tile([True, False, False, True, False], 40), np.repeat(np.arange(40), 5)
    p = np.where(np.repeat(right, 5) == outcomes, 0.9, 0.1)
    found = score_imagined_success(p.tolist(), outcomes.tolist(), episodes=episodes.tolist())
    alone = score_imagined_success(p.tolist(), outcomes.tolist())
    half = 1.96 * math.sqrt(right.mean() * (1 - right.mean()) / 40)
    assert found.balanced_accuracy == alone.balanced_accuracy == pytest.approx(right.mean())
    assert (found.low, found.high) == pytest.approx((right.mean() - half, right.mean() + half), abs=0.03)
    assert found.high - found.low > 1.5 * (alone.high - alone.low)
    assert found.bins[0].success_low is None and alone.bins[0].success_low is not None
    few = score_imagined_success([0.9, 0.1, 0.2], [True, False, False], episodes=[0, 0, 1])
    assert few.balanced_accuracy == 1 and few.low is None


def full_comparison() -> tuple[Comparison, list[EpisodeOutcome]]:
    rows: list[EpisodeOutcome] = []
    generator = np.random.default_rng(3)
    for task, (model, rate) in itertools.product(
        ("click_bell", "adjust_bottle"),
        {
            "fm": 0.3,
            "physis": 0.5,
            "noop": 0.0,
            "perfect": 0.9,
            "other": 0.1,
            "objects_erased": 0.8,
            "noise": 0.0,
        }.items(),
    ):
        for k in range(10):
            scores = {
                "pose_mm": float(generator.gamma(2, 10)) if k else None,
                "joint_deg": 9.0,
                "joint_deg_to_other": 2.0,
            }
            rows.append(outcome(model, k, bool(generator.uniform() < rate), task, scores=scores))
    return compare(rows, SETTINGS), rows


def test_output_is_strict_json_markdown_and_a_report(tmp_path) -> None:
    found, rows = full_comparison()
    json.dumps(found.to_json(), allow_nan=False)
    verdicts = control_verdicts(rows)
    imagined = {
        "fm": score_imagined_success([0.2, 0.6], [False, True]),
        "physis": score_imagined_success([0.2], [False]),
    }
    report = ReportData(
        title=found.title, summary="s", created="now", success=success_rows(found), tables=tables(found, imagined=imagined),
        verdicts=[v.text for v in verdicts],
    )  # fmt: skip
    assert {row.policy for row in report.success if row.baseline} == {
        "noop",
        "perfect",
        "other",
        "objects_erased",
        "noise",
    }
    page = write_report(report, tmp_path).read_text(encoding="utf-8")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# Checkpoint comparison") and not re.search(r"\bnan\b", text)
    assert "1 missing" in text and "All 1 episodes failed" in text and "against noop, unadjusted" in text
    assert "Paired success" in page and "Scores, click_bell" in page and "<script" not in page
    assert found == full_comparison()[0]  # the same rows give the same numbers
