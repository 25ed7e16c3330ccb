"""``coconut generate``: a trained model answers a question, and shows its thoughts."""

import dataclasses

from coconut.analysis.lens import decode_thoughts
from coconut.datasets import text_format_of
from coconut.evaluation.answers import Answer, AnswerConfig, answer_questions
from coconut.latent.generate import SamplingConfig
from coconut.methods import get_method
from coconut.model import Model
from coconut.pages import question_alone
from coconut.storage import exists
from coconut.storage_path import StoragePath
from coconut.tokenizers import encode_example
from coconut.training.checkpoint import Which
from coconut.training.loading import load_model
from coconut.training.progress import Progress
from coconut.training.run import RUN_FILE, Run
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
    example = Example(question=question.strip(), steps=(), answer="")
    encoded = encode_example(run.tokenizer, example, text_format)
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


def load(workdir: StoragePath, which: Which | int = "best", *, verify: bool = True) -> tuple[Run, Model, Progress]:
    """The model of a workdir; a quickstart's folder stands for its Coconut run."""
    if not exists(workdir / RUN_FILE) and exists(workdir / "coconut" / RUN_FILE):
        workdir = workdir / "coconut"
    return load_model(workdir, which, verify=verify)


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
