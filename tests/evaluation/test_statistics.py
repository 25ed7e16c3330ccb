"""Statistics of a table: against an obvious slow version, and scipy's tests."""

import numpy as np
import pytest
from scipy import stats

from coconut.evaluation.statistics import bootstrap_interval, mcnemar, standard_deviation


def test_mcnemar_is_the_binomial_test_of_the_questions_one_alone_has_right() -> None:
    rng = np.random.default_rng(0)
    for size, share in ((1, 0.5), (7, 0.9), (40, 0.6), (3000, 0.55)):
        for _ in range(5):
            first, second = rng.random((2, 2, size)) < np.reshape([share, 0.5], (2, 1, 1))
            found = mcnemar(first, second)
            pairs = list(zip(first.ravel().tolist(), second.ravel().tolist(), strict=True))
            alone = pairs.count((True, False)), pairs.count((False, True))
            assert (found.first_only, found.second_only) == alone
            expected = stats.binomtest(alone[0], sum(alone)).pvalue if sum(alone) else 1.0
            assert found.p_value == pytest.approx(expected, rel=1e-9)
            assert mcnemar(second, first).p_value == found.p_value
    assert mcnemar(first, first) == (0, 0, 1.0)


def test_the_interval_is_that_of_resampled_seeds_and_questions() -> None:
    rng = np.random.default_rng(1)
    # Seeds differ, and so do questions.
    right = rng.random((4, 60)) < np.clip(rng.normal([[0.5], [0.6], [0.7], [0.8]], 0.3, (4, 60)), 0, 1)
    means = []
    for _ in range(4000):
        seeds = [rng.integers(4) for _ in range(4)]
        questions = rng.integers(60, size=60)
        means.append(np.mean([right[seed][questions].mean() for seed in seeds]))
    found = bootstrap_interval(right)
    np.testing.assert_allclose(found, np.percentile(means, (2.5, 97.5)), atol=0.012)
    assert found[1] - found[0] > 0.15
    assert bootstrap_interval(right) == found != bootstrap_interval(right, seed=1)


def test_one_seed_has_the_interval_of_its_questions_alone() -> None:
    right = np.arange(400)[None] < 280
    low, high = bootstrap_interval(right)
    half = 1.96 * (0.7 * 0.3 / 400) ** 0.5
    assert (low, high) == pytest.approx((0.7 - half, 0.7 + half), abs=0.005)
    assert bootstrap_interval(np.ones((3, 5), bool)) == (1.0, 1.0)


def test_the_spread_of_one_seed_is_not_known() -> None:
    assert standard_deviation([0.5]) is None
    assert standard_deviation([0.1, 0.2, 0.6]) == pytest.approx(stats.tstd([0.1, 0.2, 0.6]))
