"""What an answer is worth. Rewards have a register: somebody's own function is one more entry.

A reward looks at all samples of a step together, so that it can compare those of one question. A run weighs several:
``ReinforcementConfig.rewards = {"answer": 1.0, "thoughts": -0.05}``.
"""

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from coconut.errors import CoconutError
from coconut.tasks import Task
from coconut.types import Example


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample of a question.

    Attributes:
      example: the question, with its expected answer.
      question: number of the question in the step: samples of equal numbers answer the same one.
      text: what was written, without EOS and markers.
      new_tokens: its tokens, EOS not counted.
      thoughts: thoughts before it.
      ended: whether it ended by itself.
    """

    example: Example
    question: int
    text: str
    new_tokens: int
    thoughts: int
    ended: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What a reward knows beside the samples.

    Attributes:
      task: judges answers.
      answer_prefix: what stands before an answer (``###``).
      max_new_tokens: tokens after which a sample is cut.
    """

    task: Task
    answer_prefix: str
    max_new_tokens: int


Reward = Callable[[Sequence[Sample], Setting], Sequence[float]]
"""(samples, setting) -> a finite number for each sample, in their order."""


def right_answer(samples: Sequence[Sample], setting: Setting) -> list[float]:
    """1 where the task's own check finds the expected answer, else 0."""
    return [float(setting.task.check(sample.text, sample.example)) for sample in samples]


def answer_format(samples: Sequence[Sample], setting: Setting) -> list[float]:
    """1 where the sample ended by itself and names an answer exactly once, else 0."""
    mark = setting.answer_prefix.strip()
    return [float(sample.ended and sample.text.count(mark) == 1) for sample in samples]


def number_of_thoughts(samples: Sequence[Sample], setting: Setting) -> list[float]:
    """The number of thoughts, which a negative weight makes a price."""
    del setting
    return [float(sample.thoughts) for sample in samples]


def shorter_than_others(samples: Sequence[Sample], setting: Setting) -> list[float]:
    """How many thoughts fewer than its group's mean a sample took, over the range of the group.

    Only where all samples of a question are right, so that nothing is gained by thinking too little (after the length
    reward of arXiv 2511.21581, which compares the right ones of every group): 0 elsewhere, and where all are as long.
    """
    values = []
    for _, group in itertools.groupby(samples, key=lambda sample: sample.question):
        own = list(group)
        lengths = np.asarray([sample.thoughts for sample in own], float)
        spread = lengths.max() - lengths.min()
        comparable = spread and all(right_answer(own, setting))
        values += ((lengths.mean() - lengths) / spread).tolist() if comparable else [0.0] * len(own)
    return values


def not_overlong(samples: Sequence[Sample], setting: Setting) -> list[float]:
    """DAPO's soft punishment (arXiv 2503.14476, equation 13): 0, and linearly to -1 in the last fifth of the limit.

    A sample that was cut has -1.
    """
    limit = setting.max_new_tokens
    buffer = max(limit / 5, 1.0)
    over = [sample.new_tokens - (limit - buffer) for sample in samples]
    return [
        -1.0 if not sample.ended else -min(max(excess, 0.0) / buffer, 1.0)
        for sample, excess in zip(samples, over, strict=True)
    ]


REWARDS: dict[str, Reward] = {
    "answer": right_answer,
    "format": answer_format,
    "thoughts": number_of_thoughts,
    "shorter": shorter_than_others,
    "overlong": not_overlong,
}
"""Rewards by name."""


def register_reward(name: str, reward: Reward) -> None:
    """Adds a reward: ``ReinforcementConfig.rewards = {name: weight}`` uses it.

    Raises:
      CoconutError: there is another one of that name.
    """
    if REWARDS.get(name, reward) is not reward:
        raise CoconutError(f"a reward named {name!r} is registered already")
    REWARDS[name] = reward


def check_rewards(weights: Mapping[str, float], field: str) -> None:
    """Looks whether the names and weights of rewards mean something.

    Raises:
      CoconutError: there are none, one is unknown, or a weight is not finite.
    """
    if not weights:
        raise CoconutError(f"{field} = {dict(weights)!r}: there must be at least one; known: {', '.join(REWARDS)}")
    for name, weight in weights.items():
        if name not in REWARDS:
            nearest = difflib.get_close_matches(name, REWARDS, 1, 0.0)[0]
            raise CoconutError(f"{field}: no reward is named {name!r}, did you mean {nearest!r}? (known: "
                               f"{', '.join(REWARDS)}; your own: --import MODULE)")  # fmt: skip
        # Compared, not converted: an integer may be too long for a float.
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not abs(weight) < 1e30:
            raise CoconutError(f"{field}: the weight of {name!r} is {weight!r}: must be a finite number")


def score(
    samples: Sequence[Sample], setting: Setting, weights: Mapping[str, float]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The weighed sum of rewards, and each of them.

    Args:
      samples: the samples of a step, those of a question behind each other.
      setting: what the rewards are told.
      weights: of each reward.

    Raises:
      CoconutError: a reward gives another number of values than there are samples, or one that is not finite.
    """
    parts = {}
    for name in weights:
        values = np.asarray(REWARDS[name](samples, setting), float)
        if values.shape != (len(samples),):
            raise CoconutError(f"reward {name!r}: gave values of shape {values.shape} for {len(samples)} samples")
        if not np.isfinite(values).all():
            index = int(np.argmin(np.isfinite(values)))
            raise CoconutError(f"reward {name!r}: gave {values[index]} for the text {samples[index].text!r:.80}")
        parts[name] = values
    total = np.zeros(len(samples))
    for name, values in parts.items():
        total += weights[name] * values
    return total, parts
