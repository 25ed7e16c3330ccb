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
from coconut.methods import get_method
from coconut.model import Model
from coconut.pages import Page, Thoughts, count_thoughts
from coconut.tasks import get_task
from coconut.tokenizers import TextFormat, encode_example
from coconut.training.run import Run
from coconut.types import Example

TRAINED = "trained"
"""The setting of the model as it was trained."""


class Measuring:
    """A model and the questions it is asked.

    Args:
      run: the run that the model comes from.
      model: the model.
      stage: that it has reached.
      examples: the questions.
      text_format: how they are written.
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
        run: Run,
        model: Model,
        stage: int,
        examples: Sequence[Example],
        text_format: TextFormat,
        config: AnswerConfig,
    ):
        self.examples, self.config = examples, config
        self._run, self._model, self._text_format = run, model, text_format
        self._method, self._task = get_method(run.config.method), get_task(run.config.data.task)
        self._placing = run.placing(stage)
        self._tokenized = [encode_example(run.tokenizer, example, text_format) for example in examples]
        self.pages: list[Page] = given_pages(self._method, self._placing, self._tokenized)
        self.feeds_back = any(self.thought_counts) and self._method.feeds_back(self._placing.options)
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
        return any(self.thought_counts) or self._method.halting(self._placing) is not None

    def generate(
        self, setting: str, config: AnswerConfig, advance: Callable[[int], None], **altered: Any
    ) -> Evaluation:
        """Answers every question; ``altered`` is what `coconut.evaluation.evaluate.evaluate` is told of thoughts."""

        def record(answer: Answer, right: bool) -> None:
            if setting == TRAINED and self.feeds_back:
                assert answer.thought_inputs is not None
                self._thoughts.append(answer.thought_inputs)
            example = self.examples[answer.example]
            self.lines.append(
                {
                    "setting": setting,
                    "example": answer.example,
                    "question": example.question,
                    "expected": example.answer,
                    "text": answer.text,
                    "right": right,
                }
            )

        def batch_done(rows: int) -> None:
            if setting == TRAINED:
                self._tick(rows)
            advance(rows)

        return evaluate(
            self._model,
            self._run.tokenizer,
            self._method,
            self._placing,
            self._task,
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
            self._model,
            self._run.tokenizer,
            self._method,
            self._placing,
            self.examples,
            self._text_format,
            thoughts=thoughts,
            batch_size=self.config.batch_size,
            **altered,
        )
        right = right if counted is None else right[np.asarray(counted)]
        correct, count = int(right.sum()), len(right)
        low, high = wilson_interval(correct, count)
        return {"accuracy": correct / count, "correct": correct, "examples": count, "interval_95": [low, high]}

    def without(self, count: int) -> AnswerConfig:
        """Other numbers of thoughts, the answer forced behind them: the model cannot fall back on writing the steps."""
        return dataclasses.replace(self.config, thoughts=count, forced=self._text_format.answer_prefix.strip())

    def surroundings(self, validation: Sequence[Example] | None, seed: int) -> Surroundings:
        """What alterations know, with the mean thought of ``validation``; None where nobody asks for it."""
        mean = None
        if validation is not None:
            tokenized = [encode_example(self._run.tokenizer, example, self._text_format) for example in validation]
            mean = mean_thoughts(
                thoughts_of_questions(
                    self._model, self._run.tokenizer, self._method, self._placing, tokenized, self.config
                )
            )
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
            for _ in answer_questions(
                self._model,
                self._run.tokenizer,
                self._method,
                self._placing,
                self._tokenized,
                self.config,
                advance=self._tick,
            ):
                pass
        (first, _), *others = self._ticks
        return (others[-1][0] - first) / sum(rows for _, rows in others)

    def _tick(self, rows: int) -> None:
        self._ticks.append((time.perf_counter(), rows))
