"""Which answers change with the numbers that a model is computed in: dtypes, rows of a batch, devices.

Sums that are made in another order round otherwise. A greedy answer turns where its two best tokens are nearer to each
other than that, and goes its own way from there (Yuan et al. 2025, "Give me FP32 or give me death?"). Thoughts that are
fed back make the difference larger before the first token. An answer that turned where its tokens were far apart is
worth a look: it may be no rounding.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from coconut.evaluation.answers import Answer
from coconut.evaluation.evaluate import wilson_interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """What a model wrote in one setting.

    Attributes:
      answers: of every question, in order.
      right: whether each is right.
    """

    answers: Sequence[Answer]
    right: Sequence[bool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """A question whose text is another one in another setting.

    Attributes:
      example: index of the question.
      column: number of the first token that differs, from 0 behind what the model was given.
      tokens: their ids, in the first setting and in the other; None behind the end of an answer.
      margin: by how much the first setting's logit of its token is above its second best; None where not kept.
      texts: what was written.
      right: whether it was right.
    """

    example: int
    column: int
    tokens: tuple[int | None, int | None]
    margin: float | None
    texts: tuple[str, str]
    right: tuple[bool, bool]


def differences(first: Judged, other: Judged) -> list[Difference]:
    """The questions that two settings answer by another text, in order.

    Raises:
      ValueError: they were asked other questions.
    """
    found = []
    for one, two, *right in zip(first.answers, other.answers, first.right, other.right, strict=True):
        if one.text == two.text:
            continue
        shared = min(len(one.chosen), len(two.chosen))
        column = next((index for index in range(shared) if one.chosen[index] != two.chosen[index]), shared)
        at = lambda answer, column=column: answer.chosen[column] if column < len(answer.chosen) else None
        kept = one.margins is not None and column < len(one.margins)
        found.append(
            Difference(
                example=one.example,
                column=column,
                tokens=(at(one), at(two)),
                margin=one.margins[column] if one.margins is not None and kept else None,
                texts=(one.text, two.text),
                right=(right[0], right[1]),
            )
        )
    return found


def compare(first: Judged, other: Judged) -> dict[str, Any]:
    """How much a setting differs from the first one, as plain values.

    Returns:
      ``questions``, ``correct``, ``accuracy`` and its ``interval_95``; ``other_texts``, how many texts differ, of which
      ``turned_wrong`` and ``turned_right`` say where rightness did; ``first_column``, ``smallest_margin`` and
      ``largest_margin`` over these texts (`Difference`; None where there are none); and ``differences``, all of them.
    """
    found = differences(first, other)
    questions, correct = len(other.right), sum(other.right)
    margins = [difference.margin for difference in found if difference.margin is not None]
    return {
        "questions": questions,
        "correct": correct,
        "accuracy": correct / questions,
        "interval_95": list(wilson_interval(correct, questions)),
        "other_texts": len(found),
        "turned_wrong": sum(difference.right == (True, False) for difference in found),
        "turned_right": sum(difference.right == (False, True) for difference in found),
        "first_column": min((difference.column for difference in found), default=None),
        "smallest_margin": min(margins, default=None),
        "largest_margin": max(margins, default=None),
        "differences": [dataclasses.asdict(difference) for difference in found],
    }


def smallest_margin(judged: Judged) -> float | None:
    """The smallest margin of any token that a setting chose; None where margins were not kept."""
    return min((margin for answer in judged.answers for margin in answer.margins or ()), default=None)
