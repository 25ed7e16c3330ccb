"""What several samples of each question are worth: pass@k, votes, and the best one by a score.

Samples stand in a table: a row for each question, a column for each of its ``N`` samples, in the order of their
numbers. A measure of fewer samples is its mean over subsets of them, drawn without replacement.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from coconut.errors import CoconutError

SUBSETS = 100
"""Subsets of samples that a measure is averaged over at most. Where there are no more, it is averaged over all."""

Choose = Callable[[np.ndarray], np.ndarray]
"""(a value of each sample, ``[Q, n]``) -> the column that is chosen for each question, ``[Q]``."""


def sizes_up_to(total: int, others: Sequence[int] = ()) -> list[int]:
    """Numbers of samples for a curve: 1, 2, 4, .. below ``total``, ``total`` itself, and others.

    Raises:
      CoconutError: another one is not between 1 and ``total``.
    """
    for size in others:
        if not 1 <= size <= total:
            raise CoconutError(f"pass@{size}: must be of at least 1 sample, and of at most the {total} that are drawn")
    return sorted({*(2**power for power in range(total.bit_length())), total, *others})


def pass_at(right: Bool[np.ndarray, "Q N"], k: int) -> Float[np.ndarray, " Q"]:
    """The probability that one of ``k`` samples of each question is right.

    ``1 - C(N - c, k) / C(N, k)`` for ``c`` right ones of ``N`` (Chen et al. 2021, arXiv 2107.03374, section 2.1): the
    share of all subsets of ``k`` that hold a right one, which is unbiased. For ``k = 1`` it is the mean over samples.
    It is what an oracle gets that finds a right sample wherever there is one.
    """
    total = right.shape[1]
    by_count = np.asarray([1 - math.comb(total - c, k) / math.comb(total, k) for c in range(total + 1)])
    return by_count[right.sum(1)]


def vote(answers: Int[np.ndarray, "Q n"]) -> Int[np.ndarray, " Q"]:
    """The first sample with the answer that most samples have (self-consistency, Wang et al. 2022, arXiv 2203.11171).

    Of answers with equally many votes the one seen first is chosen.

    Args:
      answers: a number for each answer of a question; below 0 for a sample without an answer, which has no vote.
    """
    votes = (answers[:, :, None] == answers[:, None, :]).sum(-1)
    return np.argmax(np.where(answers < 0, 0, votes), 1)


def best(scores: Float[np.ndarray, "Q n"]) -> Int[np.ndarray, " Q"]:
    """The sample with the highest score, the first one of equals."""
    return np.argmax(scores, 1)


def subsets_of(total: int, size: int, most: int, seed: int) -> Int[np.ndarray, "R n"]:
    """All subsets of ``size`` of ``total`` samples where there are at most ``most``; else as many drawn ones.

    Each is in the order of the samples' numbers.
    """
    if math.comb(total, size) <= most:
        return np.asarray(list(itertools.combinations(range(total), size)))
    rng = np.random.default_rng(seed)
    return np.sort([rng.choice(total, size, replace=False) for _ in range(most)], axis=1)


def of_chosen(
    quantity: Bool[np.ndarray, "Q N"] | Float[np.ndarray, "Q N"],
    values: np.ndarray,
    choose: Choose,
    size: int,
    *,
    subsets: int = SUBSETS,
    seed: int = 0,
) -> Float[np.ndarray, " Q"]:
    """The mean of a quantity of the sample that is chosen among ``size``, for each question.

    Args:
      quantity: of each sample, such as whether it is right.
      values: of each sample, ``[Q, N]``, what it is chosen by.
      choose: `vote` or `best`.
      size: samples to choose among.
      subsets: subsets of so many that it is averaged over, at most (`subsets_of`): all questions use the same. With
        all ``N`` samples there is one, and the result is exact.
      seed: of the draw of subsets.
    """
    questions, found = np.arange(len(quantity)), subsets_of(quantity.shape[1], size, subsets, seed)
    return np.mean([quantity[questions, own[choose(values[:, own])]] for own in found], 0)


def expected_largest(values: Float[np.ndarray, "Q N"], size: int) -> Float[np.ndarray, " Q"]:
    """The mean, over all subsets of ``size`` samples of a question, of the largest value among them.

    The ``i``-th smallest of ``N`` is the largest of ``C(i - 1, size - 1)`` subsets.
    """
    total = values.shape[1]
    weights = [math.comb(index, size - 1) / math.comb(total, size) for index in range(total)]
    return np.sort(values, 1) @ np.asarray(weights)
