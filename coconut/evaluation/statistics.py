"""How sure an accuracy is that was measured with several seeds, and whether two of them differ.

Answers are given as a table: a row for each seed, a column for each question, True where the answer is right.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import binomtest


def standard_deviation(values: Sequence[float]) -> float | None:
    """Of a sample, with one degree of freedom less than values; None for fewer than two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def bootstrap_interval(
    right: Bool[np.ndarray, "S N"] | Float[np.ndarray, "S N"], *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of the mean accuracy, for other seeds and other questions.

    A resample draws as many seeds and as many questions as there are, each with replacement (Owen 2007, "The pigeonhole
    bootstrap"). The interval holds the resampled means between the 2.5th and the 97.5th percentile. Of few seeds it is
    too narrow: three seeds know little of a fourth. Where all answers are right, or none is, it has no width at all.

    Args:
      right: of each seed and question, or the share of a question's samples that are.
      resamples: how many.
      seed: of the draws.
    """
    seeds, questions = right.shape
    rng = np.random.default_rng(seed)
    # How often each is drawn.
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples)
    means = np.empty(resamples)
    for index, weights in enumerate(of_seeds):
        of_questions = np.bincount(rng.integers(questions, size=questions), minlength=questions)
        means[index] = weights @ right @ of_questions / (seeds * questions)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


class Comparison(NamedTuple):
    """Two methods on the same questions.

    Attributes:
      first_only: questions that the first one alone has right.
      second_only: that the second one alone has right.
      p_value: of McNemar's exact test.
    """

    first_only: int
    second_only: int
    p_value: float


def mcnemar(first: Bool[np.ndarray, "*N"], second: Bool[np.ndarray, "*N"]) -> Comparison:
    """McNemar's exact test (McNemar 1947): whether two methods are right equally often, two-sided.

    Of the questions that one alone has right, each has it by a fair coin if both are equally good. Given several seeds
    it pools them: a question with each seed is one more. It then says that *these* models differ, and nothing of what
    other seeds would give.

    Args:
      first: where the first method is right.
      second: where the second one is, in the same order.
    """
    first_only, second_only = int((first & ~second).sum()), int((second & ~first).sum())
    number = first_only + second_only
    p_value = binomtest(first_only, number).pvalue if number else 1.0
    return Comparison(first_only, second_only, float(p_value))
