"""Holm's adjustment and the paired statistics against references computed another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from physisforcing.core.paired_stats import (
    paired_proportions,
    paired_t,
    permutation_p_of_two,
    sign_flip_p,
    smallest_permutation_p,
    smallest_sign_flip_p,
    student_t,
    welch_t,
)
from physisforcing.core.stats import holm


def test_holm_on_a_published_table():
    """Values of R's p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm") and of one with ties and out of order."""
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert holm([0.04, 0.001, 0.04, 0.2]) == pytest.approx([0.12, 0.004, 0.12, 0.2])
    assert holm([]) == [] and holm([0.7]) == [0.7] and holm([0.9, 0.8]) == [1.0, 1.0]


def test_holm_rejects_as_the_step_down_rule_does():
    """The rule read literally: walk up the sorted values, stop at the first above level / (m - i)."""
    generator = np.random.default_rng(0)
    for _ in range(300):
        p = generator.beta(0.4, 3, generator.integers(1, 12))
        for level in (0.01, 0.05, 0.2):
            rejected = np.zeros(len(p), bool)
            for rank, place in enumerate(np.argsort(p, kind="stable")):
                if p[place] > level / (len(p) - rank):
                    break
                rejected[place] = True
            assert [q <= level for q in holm(p.tolist())] == rejected.tolist()


@pytest.mark.parametrize("wrong", [[-0.1], [1.1, 0.5], [math.nan]])
def test_holm_refuses_what_is_no_probability(wrong):
    with pytest.raises(ValueError, match=r"0\.\.1"):
        holm(wrong)


def test_paired_proportions_cover_the_truth():
    """Share of 95 % intervals that hold the true difference: episodes of unequal difficulty, n = 10 and 50."""
    generator = np.random.default_rng(1)
    for n, gap in ((10, 0.0), (10, 0.3), (50, 0.1)):
        hits, rounds = 0, 600
        for _ in range(rounds):
            hard = generator.uniform(0, 1 - gap, n)
            draw = generator.uniform(size=(2, n))
            a, b = draw[0] < hard + gap, draw[1] < hard
            cells = (a & b).sum(), (a & ~b).sum(), (~a & b).sum(), (~a & ~b).sum()
            _, low, high = paired_proportions(*map(int, cells))
            hits += low <= gap <= high
        assert hits / rounds > 0.93, (n, gap, hits / rounds)


def test_paired_proportions_edges():
    difference, low, high = paired_proportions(0, 0, 0, 10)
    assert difference == 0 and low < -0.2 and high > 0.2  # ten agreeing failures do not prove equality
    difference, low, high = paired_proportions(0, 10, 0, 0)
    assert difference == 1 and high == 1 and 0.5 < low < 1
    assert paired_proportions(3, 4, 1, 2)[0] == pytest.approx(-paired_proportions(3, 1, 4, 2)[0])
    mirrored = paired_proportions(3, 1, 4, 2)
    assert paired_proportions(3, 4, 1, 2)[1:] == pytest.approx((-mirrored[2], -mirrored[1]))
    with pytest.raises(ValueError):
        paired_proportions(0, 0, 0, 0)


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("freedom", [1, 2, 4.37, 9, 30, 500])
def test_student_t_equals_scipy(confidence, freedom):
    expected = scipy.stats.t.ppf(0.5 + confidence / 2, freedom)
    assert student_t(confidence, freedom) == pytest.approx(expected, rel=1e-7)


def test_t_intervals_equal_scipy():
    generator = np.random.default_rng(2)
    a, b = generator.normal(0.4, 1, 7), generator.normal(0, 3, 5)
    mean, low, high = paired_t(a)
    expected = scipy.stats.t.interval(0.95, 6, loc=a.mean(), scale=scipy.stats.sem(a))
    assert (mean, low, high) == pytest.approx((a.mean(), *expected), rel=1e-9)
    wanted = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert welch_t(a, b) == pytest.approx((a.mean() - b.mean(), wanted.low, wanted.high), rel=1e-7)


def test_no_interval_where_nothing_says_how_far_others_would_lie():
    for few in ([0.3], [0.3, 0.7], [0.5] * 4):
        assert paired_t(few) == (pytest.approx(np.mean(few)), None, None)
    for a, b in (([1, 1, 1], [0, 0, 0]), ([1, 2], [0, 1, 2, 5]), ([1, 2, 4], [3])):
        assert welch_t(a, b) == (pytest.approx(np.mean(a) - np.mean(b)), None, None)
    assert welch_t([1, 1, 1], [0, 1, 2])[1] is not None
    with pytest.raises(ValueError):
        paired_t([])


def test_the_smallest_p_values_are_reached_and_not_undercut():
    generator = np.random.default_rng(0)
    for n in (1, 3, 5, 16, 17):
        p, _ = sign_flip_p([1.0] * n, generator)
        assert smallest_sign_flip_p(n) == pytest.approx(p, abs=2e-4)
    for m, n in ((2, 2), (5, 5), (5, 6), (12, 12)):
        p, _ = permutation_p_of_two(1 + np.arange(m), -1.0 - np.arange(n), generator)
        assert smallest_permutation_p(m, n) == pytest.approx(p, abs=2e-4)
    assert smallest_permutation_p(5, 5) == pytest.approx(0.00794, abs=1e-5) and smallest_sign_flip_p(5) == 0.0625


def test_sign_flips_equal_scipy_and_are_exact_for_few():
    generator = np.random.default_rng(3)
    data = generator.normal(0.5, 1, 9)
    expected = scipy.stats.permutation_test(
        (data, np.zeros(9)), lambda x, y: np.mean(x) - np.mean(y), permutation_type="samples", n_resamples=np.inf
    )
    p, exact = sign_flip_p(data, generator)
    assert exact and p == pytest.approx(expected.pvalue, rel=1e-9)
    many = generator.normal(0.25, 1, 60)
    p, exact = sign_flip_p(many, generator)
    assert not exact and p == pytest.approx(scipy.stats.ttest_1samp(many, 0).pvalue, abs=0.02)
    assert sign_flip_p([1.0] * 5, generator) == (2 / 32, True)  # five seeds that all agree cannot go below this
    with pytest.raises(ValueError):
        sign_flip_p([1.0, math.nan], generator)


def test_permutation_of_two_groups_equals_scipy():
    generator = np.random.default_rng(4)
    a, b = generator.normal(1, 1, 5), generator.normal(0, 1, 6)
    expected = scipy.stats.permutation_test(
        (a, b), lambda x, y: np.mean(x) - np.mean(y), permutation_type="independent", n_resamples=np.inf
    )
    p, exact = permutation_p_of_two(a, b, generator)
    # scipy doubles the smaller tail; here both tails count from the same distance
    distance = np.abs(expected.null_distribution) >= abs(expected.statistic) - 1e-12
    assert exact and p == pytest.approx(distance.mean(), rel=1e-9)
    p, exact = permutation_p_of_two(generator.normal(0, 1, 30), generator.normal(0, 1, 30), generator)
    assert not exact and 0.005 < p <= 1
