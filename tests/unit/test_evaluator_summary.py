"""What success in a world model says about success elsewhere: rates, correlations, and what cannot be said."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import scipy.stats

from physisforcing.core.stats import pearson_interval, wilson
from physisforcing.planner.evaluator_summary import markdown, measurements, published_markdown, summarise


def rows(policy: str, success: int, failure: int, error: int = 0) -> list[dict[str, Any]]:
    kinds = ["success"] * success + ["failure"] * failure + ["error"] * error
    return [{"policy": policy, "status": kind, "seed": 100_000 + k} for k, kind in enumerate(kinds)]


FIVE = [*rows("a", 1, 9), *rows("b", 3, 7), *rows("c", 4, 6), *rows("d", 8, 2), *rows("e", 9, 1)]
REAL = {"a": (2, 20), "b": (5, 20), "c": (11, 20), "d": (12, 20), "e": (19, 20)}


def test_the_correlation_is_scipys() -> None:
    found = summarise(FIVE, REAL)
    part = found["correlation"]["valid_only"]
    x, y = [0.1, 0.3, 0.4, 0.8, 0.9], [0.1, 0.25, 0.55, 0.6, 0.95]
    assert part["pearson_r"] == pytest.approx(scipy.stats.pearsonr(x, y).statistic)
    assert part["fisher"] == pytest.approx(tuple(scipy.stats.pearsonr(x, y).confidence_interval(0.95)))
    assert part["kendall_tau"] == pytest.approx(scipy.stats.kendalltau(x, y).statistic) == 1.0
    assert part["kendall_p"] == pytest.approx(scipy.stats.kendalltau(x, y, method="exact").pvalue)
    every = [abs(scipy.stats.pearsonr(x, order).statistic) for order in itertools.permutations(y)]
    as_far = sum(value >= part["pearson_r"] - 1e-9 for value in every)
    assert part["permutation_p"] == as_far / 120 and part["mean_bias"] == pytest.approx(0.01)
    assert part["bootstrap_policies"][0] <= part["pearson_r"] <= part["bootstrap_policies"][1]
    assert part["bootstrap_episodes"][0] < part["pearson_r"] < part["bootstrap_episodes"][1]
    assert summarise(FIVE, REAL) == found and summarise(FIVE, REAL, seed=1) != found, "the seed decides"
    assert part["n"] == 5 and "n=5 policies" in found["warnings"][0]
    b = found["policies"]["b"]
    assert (b["valid_only"]["low"], b["valid_only"]["high"]) == wilson(3, 10) and b["bias"] == pytest.approx(0.05)


def test_errors_are_counted_in_two_ways_and_never_dropped() -> None:
    found = summarise([*FIVE[10:], *rows("a", 1, 4, 5), *rows("f", 0, 0, 3)], REAL | {"f": (1, 2)})
    a = found["policies"]["a"]
    assert a["valid_only"]["rate"] == 0.2 and a["errors_as_failures"]["rate"] == 0.1 and a["errors"] == 5
    assert found["correlation"]["valid_only"]["n"] == 5, "f has no verdict at all"
    assert found["correlation"]["errors_as_failures"]["n"] == 6
    assert any("8 of 53 verdicts are errors" in text for text in found["warnings"])
    assert found["policies"]["f"]["valid_only"]["rate"] is None
    assert "| f | - | - | 3 | 1/2 = 50 %" in markdown(found, title="t")


def test_what_cannot_be_said_is_skipped() -> None:
    two = summarise(FIVE[:20], REAL)["correlation"]["valid_only"]
    assert two == {"skipped": "needs 3 policies with verdicts and simulator results, has 2"}
    none = summarise(FIVE, {})
    assert "has 0" in none["correlation"]["valid_only"]["skipped"] and none["policies"]["a"]["real"] is None
    assert any("no simulator results of a, b" in text for text in none["warnings"])
    same = summarise([*rows("a", 0, 9), *rows("b", 0, 9), *rows("c", 0, 9)], REAL)["correlation"]["valid_only"]
    assert same["skipped"] == "needs policies that differ: all have rate 0.00 in the world model"
    assert "skipped: needs policies that differ" in markdown(
        summarise(FIVE[:1] * 3, {}) | {"correlation": {"valid_only": same}}, title="t"
    )


def test_the_judge_against_the_truth() -> None:
    told = [("success", True)] * 3 + [("failure", True), ("failure", False), ("success", False), ("error", False)]
    found = summarise([{"policy": "a", "status": s, "truth": {"success": t}} for s, t in told], {})
    assert found["judge"]["successes_seen"]["rate"] == 0.75 and found["judge"]["failures_seen"]["rate"] == 0.5
    assert found["judge"]["balanced_accuracy"] == 0.625 and (found["judge"]["n"], found["judge"]["errors"]) == (6, 1)
    assert "failures called failure: 1/2 = 50 % (95 % 9-91 %)" in markdown(found, title="t")
    assert summarise(FIVE, REAL)["judge"] is None
    assert (
        summarise([{"policy": "a", "status": "success", "truth": {"success": True}}], {})["judge"]["balanced_accuracy"]
        is None
    )


def test_lines_and_tables() -> None:
    found = summarise(FIVE, REAL)
    provenance = {"commit": "c", "hardware": "h", "versions": {}, "date": "d"}
    lines = {x["claim"]: x for x in measurements(found, model="meter", command="x", provenance=provenance)}
    r = lines["planner/evaluator/meter/valid_only/pearson_r"]
    assert (
        (r["low"], r["high"]) == pearson_interval(r["value"], 5) and r["n"] == 5 and r["against"]["kendall_tau"] == 1.0
    )
    assert {line["seeds"] for line in lines.values()} == {"100000-100009"}
    assert lines["planner/evaluator/meter/b/success"]["against"] == {"errors": 0, "simulator": 0.25}
    text = markdown(found, title="Policies", notes=["a note"])
    assert "| b | 3/10 = 30 % | 11-60 % | 0 | 5/20 = 25 % | 11-47 % | +5 |" in text and "- a note" in text
    published = published_markdown()
    assert "| Ctrl-World | 0.986 | 0.80 to 1.00 |" in published and "(not measured here)" in published
