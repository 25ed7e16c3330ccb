"""Answering questions in batches: from examples to texts."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int, Key

from coconut.batching import align, page_shape
from coconut.evaluation.reading import given_pages, latent_columns, read
from coconut.latent.generate import SamplingConfig, decode
from coconut.methods.method import Method
from coconut.pages import Page, Placing, Text, count_thoughts, question_alone
from coconut.tokenizers import TokenizedExample, Tokenizer
from coconut.training.state import Model
from coconut.types import CoconutError, check_fields


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """How questions are answered.

    Attributes:
      batch_size: rows decoded together.
      sampling: how tokens are chosen.
      thoughts: thoughts of every block a question is given with, chosen at test time; None for what the stage was
        trained with.
      forced: text the model must go on from, behind the question and its thoughts (an answer's prefix, the start of a
        step).
      seed: of the draws.
    """

    batch_size: int = 64
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    thoughts: int | None = None
    forced: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.batch_size < 1:
            raise CoconutError(f"AnswerConfig.batch_size = {self.batch_size!r}: must be at least 1")
        if self.thoughts is not None and self.thoughts < 0:
            raise CoconutError(f"AnswerConfig.thoughts = {self.thoughts!r}: must be None or at least 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model wrote for one example.

    Attributes:
      example: index of the example.
      text: forced beginning and generated text, without EOS.
      new_tokens: tokens of ``text``, the forced ones included, EOS not.
      thoughts: thoughts before it, or pause tokens.
      ended: whether the model ended by itself.
      thought_inputs: ``[K, D]``, the thoughts themselves; None where there were none.
    """

    example: int
    text: str
    new_tokens: int
    thoughts: int
    ended: bool
    thought_inputs: np.ndarray | None


def answer_questions(
    model: Model,
    tokenizer: Tokenizer,
    method: Method,
    placing: Placing,
    examples: Sequence[TokenizedExample],
    config: AnswerConfig,
    *,
    advance: Callable[[int], None] = lambda rows: None,
) -> Iterator[Answer]:
    """Answers every example once, in order.

    The model reads what it is given of each example's page, thinks where the page has thoughts, and writes on from
    there. All batches have one shape, so each program of `coconut.latent.generate` is compiled once for what it reads.

    Args:
      model: the model.
      tokenizer: its tokenizer.
      method: how an example is written down.
      placing: the stage it has reached, stored with the checkpoint, and its method's options.
      examples: the questions. Steps are read where the curriculum makes the number of thoughts depend on how many
        there are, or where they are blocks of thoughts themselves; answers are not.
      config: how to answer.
      advance: called with the number of rows after each batch.

    Raises:
      CoconutError: a row would be longer than the model's positions, or has no place for the thoughts that are asked
        for.
    """
    if not examples:
        return
    forced = np.asarray(tokenizer.encode(config.forced), np.int32)
    pages = [(*page, Text(forced)) for page in given_pages(method, placing, examples, config.thoughts)]
    # Room for the last stage's thoughts at every stage, and for any number asked for below: one program.
    last = dataclasses.replace(placing, stage=placing.curriculum.final_stage)
    widest = given_pages(method, last, [question_alone(examples[0].question, placing.curriculum)])
    shape = page_shape([*pages, *widest])
    columns = shape.columns + config.sampling.max_new_tokens
    if columns > model.decoder.config.max_positions:
        raise CoconutError(
            f"DecoderConfig.max_positions = {model.decoder.config.max_positions}: a question of {shape.prompt} tokens, "
            f"{sum(shape.thoughts)} thoughts, {sum(shape.texts)} forced and {config.sampling.max_new_tokens} new "
            f"tokens need {columns}"
        )
    for start in range(0, len(examples), config.batch_size):
        rows: list[Page | None] = list(pages[start : start + config.batch_size])
        count = len(rows)
        batch = align(
            rows + [None] * (config.batch_size - count),
            shape,
            pad_id=tokenizer.eos_id,
            latent_id=tokenizer.latent_id,
            feeds_back=method.feeds_back,
        )
        # Rows that only fill the batch read one token, so that their softmax has something to see.
        batch.valid[count:, shape.prompt - 1] = True
        prefix, thoughts = read(model, batch)
        active = np.arange(config.batch_size) < count
        generated = decode(
            model.decoder,
            prefix,
            active,
            _row_keys(config.seed, start, config.batch_size),
            sampling=config.sampling,
            eos_id=tokenizer.eos_id,
            vocab_size=tokenizer.vocab_size,
        )
        new, lengths, ended = (np.asarray(x) for x in generated)
        inputs = np.concatenate([np.asarray(block) for block in thoughts], 1) if thoughts else None
        used = batch.valid[:, latent_columns(batch)]
        for index in range(count):
            yield Answer(
                example=start + index,
                text=tokenizer.decode([*forced.tolist(), *new[index, : lengths[index]].tolist()]),
                new_tokens=len(forced) + int(lengths[index]),
                thoughts=count_thoughts(pages[start + index]),
                ended=bool(ended[index]),
                thought_inputs=None if inputs is None else inputs[index, used[index]],
            )
        advance(count)


@functools.partial(jax.jit, static_argnames="rows")
def _row_keys(seed: Int[ArrayLike, ""], start: Int[ArrayLike, ""], rows: int) -> Key[Array, " B"]:
    """A key for each of some rows, by its example's number; made under jit, so that every process holds all of them."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), start + jnp.arange(rows))
