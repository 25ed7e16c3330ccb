"""What can be counted in the questions of any task, and the types in which counts are given."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from coconut.errors import CoconutError
from coconut.types import Example


@dataclasses.dataclass(frozen=True, kw_only=True)
class Marginal:
    """How often each value of a whole-numbered property was seen."""

    counts: Mapping[int, int]

    @property
    def total(self) -> int:
        """Observations."""
        return sum(self.counts.values())

    @property
    def mean(self) -> float:
        """Mean of the observations."""
        return sum(value * count for value, count in self.counts.items()) / self.total

    @property
    def standard_deviation(self) -> float:
        """Standard deviation of the observations (divided by their number)."""
        mean = self.mean
        return math.sqrt(sum(count * (value - mean) ** 2 for value, count in self.counts.items()) / self.total)

    def share(self, value: int) -> float:
        """Share of the observations with this value."""
        return self.counts.get(value, 0) / self.total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Accuracy of a rule, and the half-width of its binomial 95 % interval; both in 0..1. A tie counts one half."""

    value: float
    half_width: float


def accuracies(points: Mapping[str, float], count: int) -> dict[str, Accuracy]:
    """The accuracy of each rule, given its points in ``count`` questions.

    Raises:
      CoconutError: if there were no questions.
    """
    if not count:
        raise CoconutError("there are no examples to measure")
    shares = {name: total / count for name, total in points.items()}
    return {
        name: Accuracy(value=value, half_width=1.96 * math.sqrt(value * (1 - value) / count))
        for name, value in shares.items()
    }


def marginals(measured: Iterable[Mapping[str, Iterable[int]]]) -> dict[str, Marginal]:
    """The distribution of every property, given the values that each question has of it.

    Raises:
      CoconutError: if there were no questions.
    """
    counters: dict[str, Counter[int]] = {}
    for properties in measured:
        for name, values in properties.items():
            counters.setdefault(name, Counter()).update(values)
    if not counters:
        raise CoconutError("there are no examples to measure")
    return {name: Marginal(counts=counts) for name, counts in counters.items()}


def text_statistics(examples: Iterable[Example]) -> dict[str, Marginal]:
    """The distribution of steps and words a question, for any task.

    Raises:
      CoconutError: if there are no examples.
    """
    return marginals(
        {
            "steps": [len(example.written_steps)],
            "words of the question": [len(example.question.split())],
            "words of the steps": [sum(len(step.split()) for step in example.written_steps)],
            "words of the answer": [len(example.answer.split())],
        }
        for example in examples
    )


def answer_shares(examples: Sequence[Example], most: int = 5) -> list[tuple[str, float]]:
    """The most frequent answers, each with its share; what a guess that ignores the question can be right about."""
    counts = Counter(example.answer for example in examples)
    return [(answer, count / len(examples)) for answer, count in counts.most_common(most)]
