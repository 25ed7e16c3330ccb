"""What is measured of a model on one set of questions: answers by generation, and choices between two options."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from coconut.evaluation.answers import Answer, AnswerConfig, answer_questions, thoughts_of_questions
from coconut.evaluation.choices import choose
from coconut.evaluation.evaluate import Evaluation, evaluate, wilson_interval
from coconut.evaluation.interventions import ALTERATIONS, REMOVED, Surroundings, mean_thoughts
from coconut.evaluation.reading import given_pages
from coconut.evaluation.subject import Subject
from coconut.pages import Page, Thoughts, count_thoughts
from coconut.tokenizers import TokenizedExample
from coconut.types import Example

TRAINED = "trained"
"""The setting of the model as it was trained."""


class Measuring:
    """A model and the questions it is asked.

    Args:
      subject: the model, and how it is asked.
      examples: the questions.
      tokenized: their ids.
      config: how they are answered if nothing else is said.

    Attributes:
      examples: the questions.
      config: how they are answered if nothing else is said.
      pages: what the model is given of each.
      feeds_back: whether it has thoughts before it answers, and makes them itself.
      graphs: whether each question has two options to choose from.
      lines: every answer so far, as plain values.
    """

    def __init__(
        self,
        subject: Subject,
        examples: Sequence[Example],
        tokenized: Sequence[TokenizedExample],
        config: AnswerConfig,
    ):
        self.examples, self.config = examples, config
        self._subject = subject
        method, placing = subject.method, subject.placing
        self._tokenized = tokenized
        self.pages: list[Page] = given_pages(method, placing, self._tokenized)
        # A block whose end is the model's own is none of the page's.
        given = config.halting is None and config.soft_thinking is None and not method.ends_blocks
        self.feeds_back = given and any(self.thought_counts) and method.feeds_back(placing.options)
        self.graphs = all(example.graph is not None for example in examples)
        self.lines: list[dict[str, Any]] = []
        self._thoughts: list[np.ndarray] = []
        self._ticks: list[tuple[float, int]] = []

    @property
    def thought_counts(self) -> set[int]:
        """The numbers of thoughts that blocks have before the answer."""
        return {part.count for page in self.pages for part in page if isinstance(part, Thoughts)}

    @property
    def thinks(self) -> bool:
        """Whether there are thoughts or pause tokens: before the answer, or in blocks that the model opens itself."""
        thinks = any(self.thought_counts) or self._subject.method.halting(self._subject.placing) is not None
        return thinks and self.config.soft_thinking is None

    def check_thoughts(self, count: int | None) -> None:
        """Looks whether there is a place for so many thoughts.

        Raises:
          CoconutError: there is none.
        """
        given_pages(self._subject.method, self._subject.placing, self._tokenized, count)

    def generate(
        self, setting: str, config: AnswerConfig, advance: Callable[[int], None], **altered: Any
    ) -> Evaluation:
        """Answers every question; ``altered`` is what `coconut.evaluation.evaluate.evaluate` is told of thoughts."""

        def record(answer: Answer, right: bool) -> None:
            if setting == TRAINED and self.feeds_back:
                assert answer.thought_inputs is not None
                self._thoughts.append(answer.thought_inputs)
            example = self.examples[answer.example]
            line = {
                "setting": setting,
                "example": answer.example,
                "question": example.question,
                "expected": example.answer,
                "text": answer.text,
                "thoughts": answer.thoughts,
                "right": right,
            }
            self.lines.append(line | ({"soft_text": answer.soft_text} if config.soft_thinking else {}))

        def batch_done(rows: int) -> None:
            if setting == TRAINED:
                self._tick(rows)
            advance(rows)

        return evaluate(
            *self._subject.asked,
            self._subject.task,
            self.examples,
            self._tokenized,
            config,
            advance=batch_done,
            record=record,
            **altered,
        )

    def choose(self, thoughts: int | None, counted: Sequence[bool] | None = None, **altered: Any) -> dict[str, Any]:
        """How often the right one of two options is likelier, of the questions that count."""
        right = choose(
            *self._subject.asked,
            self.examples,
            self._subject.text_format,
            thoughts=thoughts,
            batch_size=self.config.batch_size,
            **altered,
        )
        right = right if counted is None else right[np.asarray(counted)]
        correct, count = int(right.sum()), len(right)
        low, high = wilson_interval(correct, count)
        return {"accuracy": correct / count, "correct": correct, "examples": count, "interval_95": [low, high]}

    def without(self, count: int) -> AnswerConfig:
        """Other numbers of thoughts, the answer forced behind them: the model cannot fall back on writing the steps.

        Where all answers are to go on from a text, these do, too.
        """
        forced = self.config.forced or self._subject.text_format.answer_prefix.strip()
        return dataclasses.replace(self.config, thoughts=count, forced=forced)

    def surroundings(self, validation: Sequence[Example] | None, seed: int) -> Surroundings:
        """What alterations know, with the mean thought of ``validation``; None where nobody asks for it."""
        mean = None
        if validation is not None:
            tokenized = [self._subject.tokenize(example) for example in validation]
            mean = mean_thoughts(thoughts_of_questions(*self._subject.asked, tokenized, self.config))
        return Surroundings(questions=[example.question for example in self.examples], mean=mean, seed=seed)

    def intervene(self, name: str, surroundings: Surroundings, advance: Callable[[int], None]) -> dict[str, Any] | None:
        """The accuracy under an intervention, once the model was measured as it was trained.

        Returns:
          `Evaluation.to_json` of the questions that it can alter, and for graph questions ``choice``; None for none.
        """
        config, thoughts, altered = self.config, None, {}
        if name == REMOVED:
            config, thoughts = self.without(0), 0
            counted = [count_thoughts(page) > 0 for page in self.pages]
        else:
            found = ALTERATIONS[name](self._thoughts, surroundings)
            counted = [new is not None for new in found]
            altered = {"inputs": [own if new is None else new for own, new in zip(self._thoughts, found, strict=True)]}
        if not any(counted):
            return None
        result = self.generate(name, config, advance, counted=counted, **altered).to_json()
        return {**result, "choice": self.choose(thoughts, counted, **altered)} if self.graphs else result

    def seconds_per_question(self) -> float:
        """Of the model as it was trained, without compilation: of all batches but the first.

        Where all was one batch, which compiled programs, it is answered once more.
        """
        if len(self._ticks) == 1:
            for _ in answer_questions(*self._subject.asked, self._tokenized, self.config, advance=self._tick):
                pass
        (first, _), *others = self._ticks
        return (others[-1][0] - first) / sum(rows for _, rows in others)

    def _tick(self, rows: int) -> None:
        self._ticks.append((time.perf_counter(), rows))
