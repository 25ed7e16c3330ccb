"""``coconut generate``: a trained model answers a question, and shows its thoughts."""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterator

from coconut.analysis.lens import decode_thoughts
from coconut.datasets import load_split, text_format_of
from coconut.errors import CoconutError
from coconut.evaluation.answers import Answer, AnswerConfig, answer_questions
from coconut.latent.generate import SamplingConfig
from coconut.methods import get_method
from coconut.model import Model
from coconut.pages import question_alone
from coconut.tokenizers import encode_example
from coconut.training.progress import Progress
from coconut.training.run import Run
from coconut.types import Example


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer with its thoughts made readable.

    Attributes:
      answer: what the model wrote.
      thoughts: for each thought the most likely tokens and their probabilities, read by the model's own head.
    """

    answer: Answer
    thoughts: list[list[tuple[str, float]]]


def answer_question(
    run: Run,
    model: Model,
    progress: Progress,
    question: str,
    *,
    thoughts: int | None = None,
    forced: str = "",
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    top: int = 3,
) -> Reply:
    """Answers one question.

    Args:
      run: the run the model comes from.
      model: the model.
      progress: where it stood: its stage decides the number of thoughts, as for a question of as many steps as the
        curriculum replaces at most.
      question: the question, as the run's data writes questions.
      thoughts: number of thoughts; None for the trained number.
      forced: text the answer has to go on from.
      sampling: how tokens are chosen; None for the run's own.
      seed: of the draws.
      top: tokens to read from each thought.

    Raises:
      CoconutError: a symbol the tokenizer does not know, a question longer than the model's positions, or a number of
        thoughts for a method that gives a question none.
    """
    method, text_format = get_method(run.config.method), text_format_of(run.config.data)
    if top < 1:
        raise CoconutError(f"--top {top}: must be at least 1")
    example = Example(question=question.strip(), steps=(), answer="")
    try:
        encoded = encode_example(run.tokenizer, example, text_format)
    except CoconutError as error:
        raise CoconutError(f"{error}{_example_of(run)}") from error
    config = AnswerConfig(
        batch_size=1,
        sampling=sampling or run.config.sampling,
        thoughts=thoughts,
        forced=forced,
        seed=seed,
        halting=run.config.halting,
        keep_thoughts=True,
    )
    [answer] = answer_questions(
        model,
        run.tokenizer,
        method,
        run.placing(progress.stage),
        [question_alone(encoded.question, run.config.curriculum)],
        config,
    )
    read = []
    if answer.thought_inputs is not None and len(answer.thought_inputs):
        read = decode_thoughts(model, run.tokenizer, answer.thought_inputs, top)
    return Reply(answer=answer, thoughts=read)


def read_questions() -> Iterator[str]:
    """The lines of standard input until an empty one or its end; on a terminal each is asked for.

    Raises:
      CoconutError: nobody is there to be asked, and there is no line.
    """
    lines = _lines()
    if sys.stdin.isatty():
        return lines
    # Before a model is loaded for nothing.
    if (first := next(lines, None)) is None:
        raise CoconutError("--question is missing, and standard input holds none")
    return itertools.chain([first], lines)


def _lines() -> Iterator[str]:
    with contextlib.suppress(EOFError):
        while line := input("question (empty to end): " if sys.stdin.isatty() else "").strip():
            yield line


def _example_of(run: Run) -> str:
    """How the run's data write a question; nothing where they cannot be read."""
    data = run.config.data
    one = data if isinstance(data.train, str) else dataclasses.replace(data, train=1)
    try:
        return f". A question of this run: {load_split(one, 'train')[0].question!r}"
    except CoconutError:
        return ""


def describe(reply: Reply) -> str:
    """The reply as text: a line a thought, a line for what is written between thoughts, then the answer."""
    lines, number = [], 0
    for turn in reply.answer.turns:
        if isinstance(turn, str):
            lines.append(f"writes: {turn}")
            continue
        for tokens in reply.thoughts[number : number + turn]:
            number += 1
            lines.append(f"thought {number}: " + "  ".join(f"{token} {share:.2f}" for token, share in tokens))
    written = reply.answer.turns and isinstance(reply.answer.turns[-1], str)
    lines, last = (lines[:-1], reply.answer.turns[-1]) if written else (lines, "")
    return "\n".join([*lines, f"answer: {last}"])
