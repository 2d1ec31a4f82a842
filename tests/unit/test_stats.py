"""Intervals and tests against scipy, and their edges."""

import math

import numpy as np
import pytest
import scipy.stats

from physisforcing.core.stats import (
    bootstrap_correlation,
    bootstrap_mean,
    correlation,
    fisher_exact,
    mcnemar,
    mean_of_proportions,
    pearson_interval,
    permutation_p,
    wilson,
)


@pytest.mark.parametrize(("k", "n"), [(0, 20), (1, 20), (18, 20), (20, 20), (32, 36), (250, 1000), (1, 1)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_equals_scipy(k, n, confidence):
    expected = scipy.stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert wilson(k, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_edges():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 7)[0] == 0.0 and wilson(7, 7)[1] == 1.0
    with pytest.raises(ValueError, match="3 of 2"):
        wilson(3, 2)


def test_fisher_equals_scipy():
    rng = np.random.default_rng(0)
    tables = [tuple(int(x) for x in rng.integers(0, 60, 4)) for _ in range(200)]
    tables += [
        (0, 0, 0, 0),
        (0, 20, 0, 20),
        (20, 0, 20, 0),
        (50, 0, 0, 50),
        (30, 20, 20, 30),
        (1, 0, 0, 1),
        (500, 100, 480, 120),
    ]
    for a, b, c, d in tables:
        expected = scipy.stats.fisher_exact([[a, b], [c, d]])[1]
        assert fisher_exact(a, b, c, d) == pytest.approx(expected, rel=1e-6), (a, b, c, d)


def test_fisher_is_symmetric_and_gates_at_one_percent():
    assert fisher_exact(30, 20, 5, 45) == pytest.approx(fisher_exact(5, 45, 30, 20), rel=1e-12)
    assert fisher_exact(30, 20, 5, 45) < 0.01 < fisher_exact(30, 20, 25, 25)
    with pytest.raises(ValueError):
        fisher_exact(-1, 2, 3, 4)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 5), (1, 9), (7, 7), (12, 3), (40, 80), (600, 600), (700, 500)])
def test_mcnemar_is_the_exact_binomial_test(b, c):
    expected = scipy.stats.binomtest(min(b, c), b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9)


def test_bootstrap_mean():
    values = np.random.default_rng(1).normal(2.0, 1.0, 200)
    mean, low, high = bootstrap_mean(values, np.random.default_rng(2))
    expected = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=3)
    assert mean == values.mean()
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval), abs=0.01)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(200), rel=0.05)
    assert bootstrap_mean(values, np.random.default_rng(2)) == (mean, low, high), "the generator decides"
    for few in ([3.0], [3.0, 5.0], [3.0] * 9):
        assert bootstrap_mean(few, np.random.default_rng(0)) == (np.mean(few), None, None), "no width is not certainty"
    for bad in ([], [1.0, math.nan]):
        with pytest.raises(ValueError):
            bootstrap_mean(bad, np.random.default_rng(0))


def test_mean_of_two_proportions_covers_what_it_says():
    """Exact coverage: every outcome of two tasks of 100 episodes, weighted by its probability, for a grid of true rates."""
    n = 100
    limits = np.array([[mean_of_proportions([(a, n), (b, n)])[1:] for b in range(n + 1)] for a in range(n + 1)])
    low, high = limits[..., 0] - 1e-12, limits[..., 1] + 1e-12
    rates = np.linspace(0.01, 0.99, 25)
    chance = scipy.stats.binom.pmf(np.arange(n + 1)[:, None], n, rates[None])
    coverage = np.array(
        [
            chance[:, i] @ ((low <= (p + q) / 2) & ((p + q) / 2 <= high)) @ chance[:, j]
            for i, p in enumerate(rates)
            for j, q in enumerate(rates)
        ]
    )
    assert coverage.min() > 0.93 and 0.945 < coverage.mean() < 0.957


def test_mean_of_proportions_in_simulation():
    rng = np.random.default_rng(0)
    true = np.array([0.22, 0.6, 0.9])
    draws = rng.binomial(30, true, (4000, 3))
    inside = 0
    for row in draws:
        mean, low, high = mean_of_proportions([(int(k), 30) for k in row])
        assert low <= mean <= high
        inside += low <= true.mean() <= high
    assert inside / len(draws) == pytest.approx(0.95, abs=0.012)


def test_mean_of_proportions_edges():
    assert mean_of_proportions([(7, 20)]) == pytest.approx((0.35, *wilson(7, 20)))
    mean, low, high = mean_of_proportions([(12, 100), (20, 100)])
    assert mean == 0.16 and low < 0.12 < 0.2 < high + 0.02
    assert wilson(32, 200) == pytest.approx((low, high), abs=0.004), (
        "equal sizes, similar rates: near the pooled interval"
    )
    none, low, high = mean_of_proportions([(0, 100), (0, 100)])
    assert none == 0.0 == low and 0.01 < high < 0.04
    assert mean_of_proportions([(3, 10), (0, 0)]) == (None, 0.0, 1.0), "a task without episodes gives no mean"
    with pytest.raises(ValueError, match="at least one"):
        mean_of_proportions([])


@pytest.mark.parametrize("n", [3, 5, 12])
def test_correlations_equal_scipy(n):
    rng = np.random.default_rng(n)
    for _ in range(50):
        x, y = rng.integers(0, 6, n).astype(float), rng.integers(0, 6, n) / 7
        if np.ptp(x) == 0 or np.ptp(y) == 0:
            continue
        assert correlation(x, y) == pytest.approx(scipy.stats.pearsonr(x, y).statistic, abs=1e-12)
        assert correlation(x, y, "kendall") == pytest.approx(scipy.stats.kendalltau(x, y).statistic, abs=1e-12)


def test_correlation_refuses_what_has_none():
    for x, y in (
        ([1, 1, 1], [1, 2, 3]),
        ([0.1, 0.1, 0.1], [1, 2, 3]),
        ([1, 2], [3]),
        ([1.0, math.nan], [1, 2]),
        ([1], [2]),
    ):
        for kind in ("pearson", "kendall"):
            with pytest.raises(ValueError):
                correlation(x, y, kind)
    with pytest.raises(ValueError, match="kind"):
        correlation([1, 2], [1, 2], "spearman")


@pytest.mark.parametrize("n", [3, 4, 5, 40])
def test_fisher_z_equals_scipy(n):
    rng = np.random.default_rng(0)
    x = rng.normal(size=n)
    y = x + rng.normal(size=n)
    expected = scipy.stats.pearsonr(x, y)
    for confidence in (0.9, 0.95):
        interval = expected.confidence_interval(confidence)
        assert pearson_interval(float(expected.statistic), n, confidence) == pytest.approx(tuple(interval), abs=1e-12)


def test_five_policies_say_little():
    """r = .986 of five points, as WorldArena reports it for its best evaluator."""
    low, high = pearson_interval(0.986, 5)
    assert low == pytest.approx(0.797, abs=0.003) and high == pytest.approx(0.999, abs=0.001)
    assert pearson_interval(1.0, 5) == (1.0, 1.0) and pearson_interval(0.5, 3) == (-1.0, 1.0)
    low, high = pearson_interval(0.483, 5)
    assert low < -0.69 and high > 0.95
    with pytest.raises(ValueError):
        pearson_interval(1.2, 9)


def test_permutation_p_is_exact_for_few_points():
    generator = np.random.default_rng(0)
    rising = [1.0, 2.0, 3.5, 4.0, 9.0]
    assert permutation_p(rising, rising, generator) == pytest.approx(1 / 120), "only one order is as far from 0"
    assert permutation_p(range(5), range(5), generator, "kendall") == pytest.approx(2 / 120)
    x, y = [1, 2, 3, 4, 5, 6], [2, 1, 4, 3, 6, 5]
    expected = scipy.stats.permutation_test(
        (y,), lambda v: scipy.stats.pearsonr(x, v).statistic, permutation_type="pairings", n_resamples=np.inf
    )
    assert permutation_p(x, y, generator) == pytest.approx(expected.pvalue, abs=1e-12)


def test_permutation_p_of_many_points_is_uniform_without_association():
    rng = np.random.default_rng(1)
    values = [permutation_p(rng.normal(size=20), rng.normal(size=20), rng, draws=200) for _ in range(300)]
    assert scipy.stats.kstest(values, "uniform").pvalue > 0.001
    strong = np.arange(20.0)
    assert permutation_p(strong, strong + rng.normal(size=20), rng) == pytest.approx(1 / 10_001)


def test_bootstrap_of_a_correlation():
    rng = np.random.default_rng(3)
    x = rng.normal(size=60)
    y = x + rng.normal(size=60)
    low, high, left_out = bootstrap_correlation(x, y, np.random.default_rng(4))
    expected = scipy.stats.bootstrap(
        (x, y),
        lambda a, b: scipy.stats.pearsonr(a, b).statistic,
        paired=True,
        method="percentile",
        n_resamples=2000,
        rng=5,
        vectorized=False,
    ).confidence_interval
    assert (low, high) == pytest.approx(tuple(expected), abs=0.03) and left_out == 0.0
    assert bootstrap_correlation(x, y, np.random.default_rng(4)) == (low, high, left_out), "the generator decides"
    few = bootstrap_correlation([1, 2, 3], [1, 2, 4], np.random.default_rng(0))
    assert few[2] == pytest.approx(3 / 27, abs=0.02), "three of the 27 resamples hold one point only"
