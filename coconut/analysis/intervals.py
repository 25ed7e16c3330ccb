"""Means over questions with their intervals, where not every question has every number."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from coconut.errors import CoconutError


class Means(NamedTuple):
    """Means over questions; NaN where no question has the number.

    Attributes:
      mean: the means.
      low: lower ends of their 95 % intervals.
      high: upper ends.
      number: how many questions each is the mean of.
    """

    mean: Float[np.ndarray, "*C"]
    low: Float[np.ndarray, "*C"]
    high: Float[np.ndarray, "*C"]
    number: Int[np.ndarray, "*C"]


def means_of_questions(values: Float[np.ndarray, "Q *C"], *, resamples: int = 1000, seed: int = 0) -> Means:
    """Means over the questions that have each number, with bootstrap intervals (Efron 1979).

    A resample draws as many questions as there are, with replacement, and the same ones for all numbers. The interval
    holds the resampled means between the 2.5th and the 97.5th percentile. It knows nothing of other seeds of training,
    and where all questions agree it has no width at all.

    Args:
      values: of each question; NaN where a question has no such number.
      resamples: how many.
      seed: of the draws.

    Raises:
      CoconutError: there are no questions, or no resamples; or a value is infinite.
    """
    if not len(values):
        raise CoconutError("means_of_questions: there are no questions")
    if resamples < 1:
        raise CoconutError(f"resamples = {resamples}: must be at least 1")
    if np.isinf(values).any():
        raise CoconutError("means_of_questions: some values are infinite")
    flat = values.reshape(len(values), -1).astype(np.float64)
    has = ~np.isnan(flat)
    known, number = np.where(has, flat, 0.0), has.sum(0)
    drawn = np.random.default_rng(seed).multinomial(len(flat), np.full(len(flat), 1 / len(flat)), resamples)
    counted = drawn @ has.astype(np.float64)
    with np.errstate(invalid="ignore"):
        mean = known.sum(0) / number
        means = (drawn @ known) / counted
    low, high = np.full(len(number), np.nan), np.full(len(number), np.nan)
    if (some := number > 0).any():
        # A resample may hold none of the few questions that have a number.
        low[some], high[some] = np.nanpercentile(means[:, some], (2.5, 97.5), axis=0)
    return Means(*(part.reshape(values.shape[1:]) for part in (mean, low, high, number)))
