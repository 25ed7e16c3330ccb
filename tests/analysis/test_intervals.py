"""Means over questions, some of which have no number."""

import numpy as np
import pytest

from coconut.analysis.intervals import means_of_questions
from coconut.errors import CoconutError


def test_only_questions_with_a_number_are_counted():
    values = np.asarray([[1.0, np.nan, np.nan], [3.0, 5.0, np.nan], [5.0, np.nan, np.nan]])
    means = means_of_questions(values)
    np.testing.assert_array_equal(means.mean, [3.0, 5.0, np.nan])
    np.testing.assert_array_equal(means.number, [3, 1, 0])
    # Of one question nothing is known but its own number, of none nothing.
    assert (means.low[1], means.high[1]) == (5.0, 5.0) and np.isnan([means.low[2], means.high[2]]).all()
    assert 1.0 <= means.low[0] < 3.0 < means.high[0] <= 5.0


def test_the_interval_is_that_of_the_normal_distribution_for_many_questions():
    values = np.random.default_rng(0).normal(2.0, 1.0, (400, 1, 2))
    means = means_of_questions(values, resamples=4000)
    half = 1.96 * values.std(0) / 20
    np.testing.assert_allclose(means.low, means.mean - half, atol=0.01)
    np.testing.assert_allclose(means.high, means.mean + half, atol=0.01)
    assert means.mean.shape == (1, 2)


def test_what_has_no_mean_is_refused():
    with pytest.raises(CoconutError, match="there are no questions"):
        means_of_questions(np.zeros((0, 2)))
    with pytest.raises(CoconutError, match="infinite"):
        means_of_questions(np.asarray([1.0, np.inf]))
    with pytest.raises(CoconutError, match="resamples = 0"):
        means_of_questions(np.ones(2), resamples=0)
