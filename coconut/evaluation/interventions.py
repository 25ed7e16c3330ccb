"""Interventions on thoughts: what stays of a model's accuracy if its thoughts are replaced by something else.

First the model makes its thoughts for all questions, then some are altered, and its answers are written behind the
altered ones: keys and values come of what they are now. An answer that does not care what its thoughts are was not
thought of in them.

An alteration is a function of the thoughts of all questions. It gives None for a question that it cannot alter: one
without thoughts, one with a single thought whose order is asked for. Such questions count in no denominator.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from coconut.errors import CoconutError
from coconut.tasks import unknown

Thoughts = np.ndarray
"""``[K, D]``: the thoughts of one question, in their order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What an alteration knows beside the thoughts.

    Attributes:
      questions: the text of each question; the same text is the same question.
      mean: what thoughts are on average (`mean_thoughts`); None where nobody asks for it.
      seed: of the draws.
    """

    questions: Sequence[str]
    mean: "MeanThoughts | None" = None
    seed: int = 0


Alter = Callable[[Sequence[Thoughts], Surroundings], list[Thoughts | None]]
"""(thoughts of each question, surroundings) -> what is run in their place, of the same shape and dtype; or None."""


class MeanThoughts(NamedTuple):
    """What the thoughts of some questions are on average, in float64.

    Attributes:
      at_position: ``[K, D]``, of each position over the questions that have a thought there.
      of_all: ``[D]``, of all thoughts of all questions.
    """

    at_position: np.ndarray
    of_all: np.ndarray


def mean_thoughts(thoughts: Sequence[Thoughts]) -> MeanThoughts:
    """The mean of thoughts ``[K, D]`` of several questions.

    Raises:
      CoconutError: no question has a thought.
    """
    longest = max((len(own) for own in thoughts), default=0)
    if not longest:
        raise CoconutError("there is no mean of thoughts: no question of the validation split has one")
    at_position = [np.mean([own[k] for own in thoughts if len(own) > k], 0, np.float64) for k in range(longest)]
    return MeanThoughts(np.stack(at_position), np.concatenate(list(thoughts)).mean(0, np.float64))


def _keep(thoughts: Sequence[Thoughts], surroundings: Surroundings) -> list[Thoughts | None]:
    del surroundings
    return [own if len(own) else None for own in thoughts]


def _zero(thoughts: Sequence[Thoughts], surroundings: Surroundings) -> list[Thoughts | None]:
    del surroundings
    return [np.zeros_like(own) if len(own) else None for own in thoughts]


def _noise(thoughts: Sequence[Thoughts], surroundings: Surroundings) -> list[Thoughts | None]:
    """Gaussian noise: a direction drawn uniformly, at the norm of the thought that was there."""
    rng, altered = np.random.default_rng(surroundings.seed), []
    for own in thoughts:
        drawn = rng.standard_normal(own.shape)
        norms = [np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True) for x in (own, drawn)]
        altered.append((drawn * (norms[0] / norms[1])).astype(own.dtype) if len(own) else None)
    return altered


def _mean(thoughts: Sequence[Thoughts], surroundings: Surroundings) -> list[Thoughts | None]:
    """The mean of each position. A question with more thoughts than there are means cannot be altered."""
    assert surroundings.mean is not None
    mean = surroundings.mean.at_position
    return [mean[: len(own)].astype(own.dtype) if 0 < len(own) <= len(mean) else None for own in thoughts]


def _mean_of_all(thoughts: Sequence[Thoughts], surroundings: Surroundings) -> list[Thoughts | None]:
    """One mean for all positions."""
    assert surroundings.mean is not None
    mean = surroundings.mean.of_all
    return [np.broadcast_to(mean, own.shape).astype(own.dtype) if len(own) else None for own in thoughts]


def _other(thoughts: Sequence[Thoughts], surroundings: Surroundings) -> list[Thoughts | None]:
    """Each question gets the thoughts of another one that has as many, and each gives its own to one.

    The questions of a number of thoughts stand in a ring, in a drawn order but equal ones side by side. A shift by the
    number of the most frequent one leaves none on itself, unless it is more than half of them.
    """
    questions, rng = surroundings.questions, np.random.default_rng(surroundings.seed)
    place = {question: number for number, question in enumerate(dict.fromkeys(questions))}
    drawn = rng.permutation(len(place))
    altered: list[Thoughts | None] = [None] * len(thoughts)
    for count in {len(own) for own in thoughts} - {0}:
        ring = [index for index, own in enumerate(thoughts) if len(own) == count]
        ring.sort(key=lambda index: drawn[place[questions[index]]])
        same = np.unique([place[questions[index]] for index in ring], return_counts=True)[1].max()
        for position, index in enumerate(ring):
            donor = ring[(position + same) % len(ring)]
            if questions[donor] != questions[index]:
                altered[index] = thoughts[donor]
    return altered


def _permuted(thoughts: Sequence[Thoughts], surroundings: Surroundings) -> list[Thoughts | None]:
    """The same thoughts in another order, drawn from all others."""
    rng, altered = np.random.default_rng(surroundings.seed), []
    for own in thoughts:
        order = np.arange(len(own))
        while len(own) > 1 and (order == np.arange(len(own))).all():
            order = rng.permutation(len(own))
        altered.append(own[order] if len(own) > 1 else None)
    return altered


def _repeated(thoughts: Sequence[Thoughts], surroundings: Surroundings) -> list[Thoughts | None]:
    """In the place of each thought the one before it; the first one stays. It takes two thoughts."""
    del surroundings
    return [np.concatenate([own[:1], own[:-1]]) if len(own) > 1 else None for own in thoughts]


def without_directions(directions: np.ndarray) -> Alter:
    """An alteration: thoughts without their part in some directions.

    Args:
      directions: ``[R, D]``; they need not be orthogonal, nor of length 1.

    Raises:
      CoconutError: they are not finite, or one is zero.
    """
    lengths = np.linalg.norm(directions, axis=-1)
    if not np.isfinite(lengths).all() or not lengths.all():
        raise CoconutError(f"directions of the lengths {lengths.tolist()}: each must be finite, and none zero")
    basis = np.linalg.svd(directions.astype(np.float64), full_matrices=False)[2]

    def altered(thoughts: Sequence[Thoughts], surroundings: Surroundings) -> list[Thoughts | None]:
        del surroundings
        return [(own - (own @ basis.T) @ basis).astype(own.dtype) if len(own) else None for own in thoughts]

    return altered


def at_thoughts(alter: Alter, numbers: Sequence[int]) -> Alter:
    """The same alteration of some thoughts alone, and of the questions that have all of these.

    Each is altered as it would be among all thoughts of its question; ``permuted`` changes their places among
    themselves.

    Args:
      alter: one of `ALTERATIONS`, or another.
      numbers: of the thoughts; the first one is 1.
    """
    places = np.asarray(numbers) - 1

    def altered(thoughts: Sequence[Thoughts], surroundings: Surroundings) -> list[Thoughts | None]:
        has = [len(own) > places.max() for own in thoughts]
        # Only an order is a matter of the others that are altered.
        alone = alter is _permuted
        given = [own[places] if alone and all_there else own for own, all_there in zip(thoughts, has, strict=True)]
        results: list[Thoughts | None] = []
        for own, all_there, new in zip(thoughts, has, alter(given, surroundings), strict=True):
            if not all_there or new is None:
                results.append(None)
                continue
            mixed = own.copy()
            mixed[places] = new if alone else new[places]
            # The first thought has none before it, for example.
            results.append(None if alter is _repeated and (places == 0).all() else mixed)
        return results

    return altered


ALTERATIONS: Mapping[str, Alter] = MappingProxyType(
    {
        "intact": _keep,
        "zero": _zero,
        "noise": _noise,
        "mean": _mean,
        "mean_of_all": _mean_of_all,
        "other": _other,
        "permuted": _permuted,
        "repeated": _repeated,
    }
)
"""Alterations by name. ``intact`` alters nothing: its answers are those of the plain evaluation, which is a check."""

REMOVED = "removed"
"""The intervention that leaves no columns behind: the model is given no thoughts, and its answer is forced."""


def check_interventions(names: Sequence[str]) -> None:
    """Looks whether all names are known.

    Raises:
      CoconutError: one is not; the message names the nearest.
    """
    for name in names:
        if name not in (REMOVED, *ALTERATIONS):
            raise CoconutError(unknown("intervention", name, (REMOVED, *ALTERATIONS)))
