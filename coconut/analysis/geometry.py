"""How thoughts lie beside each other and beside token embeddings: whether they have collapsed into one.

SIM-CoT (Wei et al. 2025, arXiv 2509.20317) finds that Coconut's thoughts move together where it fails: their pairwise
distances shrink, and they leave the neighbourhood of the token embeddings.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from coconut.errors import CoconutError

_TOGETHER = 256
"""Vectors compared with a whole vocabulary together: those of GPT-2 make 100 MB of cosines."""


class Pairs(NamedTuple):
    """How far some vectors are from each other.

    Attributes:
      cosine: between each two; NaN with a vector of no length.
      distance: the Euclidean one.
    """

    cosine: Float[np.ndarray, "K K"]
    distance: Float[np.ndarray, "K K"]

    def means(self) -> tuple[float, float]:
        """The mean cosine and the mean distance of two different vectors; NaN for fewer than two."""
        pairs = np.triu_indices(len(self.cosine), 1)
        if not len(pairs[0]):
            return float("nan"), float("nan")
        return float(self.cosine[pairs].mean()), float(self.distance[pairs].mean())


def pairs_of(vectors: Float[np.ndarray, "K D"]) -> Pairs:
    """Cosine and distance of each two vectors: a question's thoughts, or the thoughts of questions at one place."""
    vectors = vectors.astype(np.float64)
    with np.errstate(invalid="ignore"):
        directions = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    # Not from inner products, which lose the distance of two vectors that are long and near.
    distance = np.stack([np.linalg.norm(vectors - one, axis=-1) for one in vectors] or [np.zeros(0)])
    return Pairs(np.clip(directions @ directions.T, -1.0, 1.0), distance.reshape(len(vectors), len(vectors)))


def effective_rank(vectors: Float[np.ndarray, "K D"], *, centred: bool = False) -> float:
    """How many directions the vectors use: the exponential of the entropy of their singular values.

    The singular values are normalised to sum to 1 (Roy and Vetterli 2007, "The effective rank: a measure of effective
    dimensionality"). It is 1 where all lie on one line through the origin, and ``K`` where they are orthogonal and
    equally long.

    Args:
      vectors: at most as many directions as there are of them can be used: compare sets of one size.
      centred: take their mean off first, so that what all have in common counts nothing.

    Returns:
      NaN where all vectors are nothing, or there are none.
    """
    vectors = vectors.astype(np.float64)
    if centred and len(vectors):
        vectors = vectors - vectors.mean(0)
    if not vectors.any():
        return float("nan")
    values = np.linalg.svd(vectors, compute_uv=False)
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


class Nearest(NamedTuple):
    """The token embedding that is nearest to each vector, in the two ways.

    Attributes:
      by_distance: the token at the least Euclidean distance.
      distance: that distance.
      by_cosine: the token of the largest cosine.
      cosine: that cosine; NaN for a vector of no length.
      to_mean: the distance to the mean of all embeddings.
    """

    by_distance: Int[np.ndarray, " K"]
    distance: Float[np.ndarray, " K"]
    by_cosine: Int[np.ndarray, " K"]
    cosine: Float[np.ndarray, " K"]
    to_mean: Float[np.ndarray, " K"]


def nearest_tokens(vectors: Float[np.ndarray, "K D"], embeddings: Float[np.ndarray, "V D"]) -> Nearest:
    """How near each vector is to the embedding of a token.

    Args:
      vectors: the thoughts.
      embeddings: of all tokens (``decoder.input_table``), without rows that are no token. One of no length has no
        direction, and is nearest to none by cosine.

    Raises:
      CoconutError: there are no embeddings.
    """
    if not len(embeddings):
        raise CoconutError("embeddings: there are none to be near to")
    table = embeddings.astype(np.float64)
    squares = (table**2).sum(-1)
    norms = np.sqrt(squares)
    found = []
    for start in range(0, len(vectors), _TOGETHER):
        own = vectors[start : start + _TOGETHER].astype(np.float64)
        products, length = own @ table.T, np.linalg.norm(own, axis=-1)
        near = np.argmin(squares - 2 * products, axis=-1)
        cosines = np.where(norms > 0, products / np.where(norms > 0, norms, 1.0), -np.inf)
        alike = np.argmax(cosines, axis=-1)
        cosine = np.take_along_axis(cosines, alike[:, None], 1)[:, 0] / np.where(length > 0, length, np.nan)
        found.append(
            (
                near,
                np.linalg.norm(own - table[near], axis=-1),
                alike,
                cosine,
                np.linalg.norm(own - table.mean(0), axis=-1),
            )
        )
    if not found:
        return Nearest(np.zeros(0, int), np.zeros(0), np.zeros(0, int), np.zeros(0), np.zeros(0))
    return Nearest(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


class Geometry(NamedTuple):
    """Numbers of each question and each place; NaN where a question has no such thought.

    Attributes:
      norms: of each thought.
      cosine: mean of each question's pairs of thoughts; of questions with at least two.
      distance: the same for distances.
      rank: effective rank of each question's thoughts; of questions with at least two.
      cosine_between: mean of the pairs of *different questions'* thoughts at each place, if at least two have it.
      distance_between: the same for distances.
      rank_between: effective rank of the thoughts of all questions at each place, their mean taken off.
      counts: how many questions have a thought at each place.
    """

    norms: Float[np.ndarray, "Q K"]
    cosine: Float[np.ndarray, " Q"]
    distance: Float[np.ndarray, " Q"]
    rank: Float[np.ndarray, " Q"]
    cosine_between: Float[np.ndarray, " K"]
    distance_between: Float[np.ndarray, " K"]
    rank_between: Float[np.ndarray, " K"]
    counts: Int[np.ndarray, " K"]


def geometry(thoughts: Sequence[Float[np.ndarray, "_ D"]]) -> Geometry:
    """How the thoughts of questions lie: the diagnosis of a collapse.

    Two kinds must be told apart. Where thoughts of *one question* are alike, further thoughts add nothing. Where
    thoughts of *different questions* at one place are alike, they say nothing of the question.

    Args:
      thoughts: ``[K, D]`` of each question (`coconut.evaluation.answers.thoughts_of_questions`).

    Raises:
      CoconutError: there are no thoughts at all.
    """
    most = max(map(len, thoughts), default=0)
    if not most:
        raise CoconutError("thoughts: there are none")
    norms = np.full((len(thoughts), most), np.nan)
    inside = np.full((3, len(thoughts)), np.nan)
    for question, own in enumerate(thoughts):
        norms[question, : len(own)] = np.linalg.norm(own.astype(np.float64), axis=-1)
        if len(own) > 1:
            inside[:, question] = (*pairs_of(own).means(), effective_rank(own))
    between, counts = np.full((3, most), np.nan), np.zeros(most, int)
    for place in range(most):
        here = np.stack([own[place] for own in thoughts if len(own) > place])
        counts[place] = len(here)
        if len(here) > 1:
            between[:, place] = (*pairs_of(here).means(), effective_rank(here, centred=True))
    cosine, distance, rank = inside
    cosine_between, distance_between, rank_between = between
    return Geometry(norms, cosine, distance, rank, cosine_between, distance_between, rank_between, counts)
