"""Means of numbers that come in levels (the height of a node, a step of search), several of them from one question."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from coconut.errors import CoconutError


class LevelMeans(NamedTuple):
    """Means by level.

    Attributes:
      levels: rising; those that some number has.
      means: of the numbers of each level.
      low: lower ends of the means' 95 % intervals; NaN for a level whose numbers come from one question alone.
      high: upper ends.
      number: how many numbers each level has.
      questions: how many questions they come from.
    """

    levels: Int[np.ndarray, " G"]
    means: Float[np.ndarray, " G"]
    low: Float[np.ndarray, " G"]
    high: Float[np.ndarray, " G"]
    number: Int[np.ndarray, " G"]
    questions: Int[np.ndarray, " G"]


def means_by_level(
    numbers: Sequence[tuple[int, int, float]], questions: int, *, resamples: int = 2000, seed: int = 0
) -> LevelMeans:
    """Averages numbers level by level; each number counts the same.

    The interval is that of a bootstrap which draws questions, each with all its numbers, since the numbers of one
    question are not independent (the cluster bootstrap, Davison and Hinkley 1997, section 3.8).

    Args:
      numbers: ``(level, question, number)`` each.
      questions: how many there are; they are numbered from 0.
      resamples: of the bootstrap.
      seed: of its draws.

    Raises:
      CoconutError: there are no questions.
    """
    if questions < 1:
        raise CoconutError("means_by_level: there are no questions")
    drawn = np.random.default_rng(seed).multinomial(questions, np.full(questions, 1 / questions), resamples)
    levels = sorted({level for level, _, _ in numbers})
    means, low, high = (np.full(len(levels), np.nan) for _ in range(3))
    number, sources = (np.zeros(len(levels), int) for _ in range(2))
    for index, wanted in enumerate(levels):
        own = [(question, value) for level, question, value in numbers if level == wanted]
        where, values = np.asarray([question for question, _ in own]), np.asarray([value for _, value in own])
        sums, counts = np.bincount(where, values, questions), np.bincount(where, minlength=questions)
        means[index], number[index], sources[index] = values.mean(), len(own), (counts > 0).sum()
        if sources[index] > 1:
            total = drawn @ counts
            # A resample may hold none of the few questions that have this level.
            low[index], high[index] = np.percentile((drawn @ sums)[total > 0] / total[total > 0], (2.5, 97.5))
    return LevelMeans(np.asarray(levels, int), means, low, high, number, sources)
