"""Accuracy and its price, as the paper counts them."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from coconut.errors import CoconutError
from coconut.evaluation.answers import Answer, AnswerConfig, answer_questions
from coconut.methods.method import Method
from coconut.model import Model
from coconut.pages import Placing
from coconut.tasks import Task
from coconut.tokenizers import TokenizedExample, Tokenizer
from coconut.types import Example


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result on one set of questions; every example counts exactly once.

    Attributes:
      examples: number of questions.
      correct: answers that equal the whole expected answer.
      tokens: mean number of generated tokens without EOS, plus one for each thought; markers and pause tokens do not
        count (Hao et al. 2024, table 1).
      thoughts: mean number of thoughts (or pause tokens).
      passes: mean number of passes of the decoder that had to wait for each other (`Answer.passes`).
      ended: share of rows that ended by themselves before the limit.
      cut: share of rows that ended where they began to think with no room left.
    """

    examples: int
    correct: int
    tokens: float
    thoughts: float
    passes: float
    ended: float
    cut: float

    @property
    def accuracy(self) -> float:
        """Share of correct answers."""
        return self.correct / self.examples

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        return wilson_interval(self.correct, self.examples)

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            **dataclasses.asdict(self),
            "accuracy": self.accuracy,
            "interval_95": list(self.interval),
        }


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a binomial proportion (Wilson 1927)."""
    z = 1.959963984540054
    share = successes / trials
    scale = 1 + z**2 / trials
    middle = (share + z**2 / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    method: Method,
    placing: Placing,
    task: Task,
    examples: Sequence[Example],
    tokenized: Sequence[TokenizedExample],
    config: AnswerConfig,
    *,
    inputs: Sequence[np.ndarray] | None = None,
    counted: Sequence[bool] | None = None,
    advance: Callable[[int], None] = lambda rows: None,
    record: Callable[[Answer, bool], None] = lambda answer, right: None,
) -> Evaluation:
    """Answers every question by generation and compares with the expected answers.

    Args:
      model: the model.
      tokenizer: its tokenizer.
      method: how an example is written down.
      placing: the stage it has reached, and its method's options.
      task: judges the answers.
      examples: the questions.
      tokenized: their ids, in the same order.
      config: how to answer.
      inputs: what is run in the place of each question's thoughts; see `answer_questions`.
      counted: which questions count; None for all of them. The others are answered all the same, so that a question's
        draws and its neighbours in a batch stay what they were.
      advance: called with the number of rows after each batch.
      record: called with each answer and whether it is right.

    Raises:
      CoconutError: there are no questions, or one is longer than the model's positions.
    """
    count = len(examples) if counted is None else sum(counted)
    if not count:
        raise CoconutError("there are no questions to evaluate: the split is empty")
    correct = tokens = thoughts = passes = ended = cut = 0
    answers = answer_questions(model, tokenizer, method, placing, tokenized, config, inputs=inputs, advance=advance)
    for answer in answers:
        if counted is not None and not counted[answer.example]:
            continue
        right = task.check(answer.text, examples[answer.example])
        correct += right
        # A thought costs a sequential pass, a pause token none.
        tokens += answer.new_tokens + (answer.thoughts if method.feeds_back(placing.options) else 0)
        thoughts += answer.thoughts
        passes += answer.passes
        ended += answer.ended
        cut += answer.cut
        record(answer, right)
    return Evaluation(
        examples=count,
        correct=correct,
        tokens=tokens / count,
        thoughts=thoughts / count,
        passes=passes / count,
        ended=ended / count,
        cut=cut / count,
    )
