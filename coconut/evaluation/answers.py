"""Answering questions in batches: from examples to texts."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int, Key

from coconut.batching import align, page_shape
from coconut.errors import CoconutError, NotFiniteError, check_fields
from coconut.evaluation.reading import given_pages, latent_columns, read
from coconut.latent.feedback import draws
from coconut.latent.generate import Generated, SamplingConfig, decode
from coconut.latent.halting import HaltingConfig, Mode, Thinking
from coconut.latent.thinkers import Thinker
from coconut.methods.method import Method
from coconut.model import Model
from coconut.pages import Page, Placing, Text, count_thoughts, question_alone
from coconut.tokenizers import TokenizedExample, Tokenizer


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """How questions are answered.

    Attributes:
      batch_size: rows decoded together.
      sampling: how tokens are chosen.
      thoughts: thoughts of every block, chosen at test time; None for what the stage was trained with.
      forced: text the model must go on from, behind the question and its thoughts (an answer's prefix, the start of a
        step).
      seed: of the draws.
      halting: when a block is over that the model opens itself, and, unless ``thoughts`` says how many it has, the
        last block before the answer, where the method writes one; None for what the method says, with ``thoughts``
        where they are given.
      soft_thinking: think softly behind the question, before anything is written (`coconut.latent.soft_thinking`).
      keep_thoughts: keep the inputs of the thoughts that the model has made in blocks of its own, too.
    """

    batch_size: int = 64
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    thoughts: int | None = None
    forced: str = ""
    seed: int = 0
    halting: HaltingConfig | None = None
    soft_thinking: SoftThinkingConfig | None = None
    keep_thoughts: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.batch_size < 1:
            raise CoconutError(f"AnswerConfig.batch_size = {self.batch_size!r}: must be at least 1")
        if self.thoughts is not None and self.thoughts < 0:
            raise CoconutError(f"AnswerConfig.thoughts = {self.thoughts!r}: must be None or at least 0")
        for field in ("thoughts", "halting"):
            if self.soft_thinking is not None and getattr(self, field) is not None:
                raise CoconutError(
                    f"AnswerConfig.{field} = {getattr(self, field)!r}: soft_thinking says itself when thinking is over"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model wrote for one example.

    Attributes:
      example: index of the example.
      text: forced beginning and generated text, without EOS, markers and thoughts.
      new_tokens: tokens of ``text``, the forced ones included, EOS and markers not.
      thoughts: thoughts, or pause tokens, before the text and within it.
      ended: whether the model ended by itself.
      cut: whether it was ended where it began to think with no room left.
      turns: what followed what, from the first thought on: a text, or a number of thoughts.
      soft_text: the most likely token of each soft thought, as one text; empty where there are none.
      thought_inputs: ``[K, D]``, the thoughts themselves, in order; None where they were not kept.
    """

    example: int
    text: str
    new_tokens: int
    thoughts: int
    ended: bool
    cut: bool
    turns: tuple[str | int, ...]
    soft_text: str
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
      NotFiniteError: the model gives numbers that are not finite, so that its answers mean nothing.
    """
    if not examples:
        return
    forced = np.asarray(tokenizer.encode(config.forced), np.int32)
    pages = [(*page, Text(forced)) for page in given_pages(method, placing, examples, config.thoughts)]
    # Room for the last stage's thoughts at every stage, and for any number asked for below: one program.
    last = dataclasses.replace(placing, stage=placing.curriculum.final_stage)
    widest = given_pages(method, last, [question_alone(examples[0].question, placing.curriculum)])
    shape = page_shape([*pages, *widest])
    halting = config.halting
    if halting is None and (halting := method.halting(placing)) is not None and config.thoughts is not None:
        most, blocks = max(config.thoughts, 1), halting.room // halting.most
        halting = HaltingConfig(stop="count", least=min(config.thoughts, 1), most=most, room=blocks * most)
    thinking = None if halting is None else _thinking(model, tokenizer, method.think(placing.options), halting, config)
    room = config.sampling.max_new_tokens + (0 if halting is None else halting.room)
    columns = shape.columns + room
    if columns > model.decoder.config.max_positions:
        raise CoconutError(
            f"DecoderConfig.max_positions = {model.decoder.config.max_positions}: a question of {shape.prompt} tokens, "
            f"{sum(shape.thoughts)} thoughts, {sum(shape.texts)} forced and {room} new "
            f"tokens and thoughts need {columns}"
        )
    for start in range(0, len(examples), config.batch_size):
        rows: list[Page | None] = list(pages[start : start + config.batch_size])
        count = len(rows)
        batch = align(
            rows + [None] * (config.batch_size - count),
            shape,
            pad_id=tokenizer.eos_id,
            latent_id=tokenizer.latent_id,
            feeds_back=method.feeds_back(placing.options),
        )
        # Rows that only fill the batch read one token, so that their softmax has something to see.
        batch.valid[count:, shape.prompt - 1] = True
        keys = _row_keys(config.seed, start, config.batch_size)
        drawn = _keys_of_thoughts(keys) if draws(model.feedback) else None
        prefix, thoughts = read(model, batch, method.think(placing.options), latent_id=tokenizer.latent_id, keys=drawn)
        active = np.arange(config.batch_size) < count
        generated = decode(
            model.decoder,
            prefix,
            active,
            keys,
            thinking=None if thinking is None else dataclasses.replace(thinking, keys=drawn),
            sampling=config.sampling,
            eos_id=tokenizer.eos_id,
            vocab_size=tokenizer.vocab_size,
        )
        given = np.concatenate([np.asarray(block) for block in thoughts], 1) if thoughts else None
        used = batch.valid[:, latent_columns(batch)]
        written = jax.tree.map(np.asarray, generated)
        if not (finite := written.finite[:count]).all():
            first = start + int(np.argmin(finite))
            raise NotFiniteError(f"the model's numbers are not finite at question {first} and others: it is broken")
        for index in range(count):
            inputs = None if given is None else given[index, used[index]]
            number = count_thoughts(pages[start + index])
            yield _answer(start + index, written, index, tokenizer, forced, number, inputs)
        advance(count)


def _thinking(
    model: Model, tokenizer: Tokenizer, think: Thinker, halting: HaltingConfig, config: AnswerConfig
) -> Thinking:
    """How rows think that open a block themselves."""
    halt = None
    if halting.stop == "head":
        if "halt" not in model.parts:
            raise CoconutError("HaltingConfig.stop = 'head': the model has no part named 'halt'")
        halt = model.parts["halt"]
    return Thinking(
        feedback=model.feedback,
        config=halting,
        start_id=tokenizer.start_latent_id,
        latent_id=tokenizer.latent_id,
        end_id=tokenizer.end_latent_id,
        think=think,
        halt=halt,
        counts=None if config.thoughts is None or config.halting else jnp.full(config.batch_size, config.thoughts),
        keep_inputs=config.keep_thoughts,
    )


def _answer(
    example: int,
    generated: Generated,
    row: int,
    tokenizer: Tokenizer,
    forced: np.ndarray,
    given: int,
    inputs: np.ndarray | None,
) -> Answer:
    """One row of what was generated, behind ``given`` thoughts."""
    tokens = generated.tokens[row, : generated.lengths[row]].tolist()
    blocks, own = generated.blocks, [False] * len(tokens)
    if blocks is not None:
        own = (blocks.modes[row, : len(tokens)] == Mode.THINKING).tolist()
        if blocks.inputs is not None:
            kept = np.asarray(blocks.inputs)[row, : len(tokens)][own]
            inputs = kept if inputs is None else np.concatenate([inputs, kept])
    markers = (tokenizer.start_latent_id, tokenizer.end_latent_id) if blocks is not None else ()
    text = [*forced.tolist(), *(token for token, thought in zip(tokens, own, strict=True) if not thought)]
    text = [token for token in text if token not in markers]
    turns: list[str | int] = [given] if given else []
    for thought, group in itertools.groupby(
        [*((token, False) for token in forced.tolist()), *zip(tokens, own, strict=True)], key=lambda pair: pair[1]
    ):
        ids = [token for token, _ in group if token not in markers]
        turns.append(len(ids) if thought else tokenizer.decode(ids))
    return Answer(
        example=example,
        text=tokenizer.decode(text),
        new_tokens=len(text),
        thoughts=given + sum(own),
        ended=bool(generated.ended[row]),
        cut=blocks is not None and bool(blocks.cut[row]),
        turns=tuple(turns),
        thought_inputs=inputs,
    )


@functools.partial(jax.jit, static_argnames="rows")
def _row_keys(seed: Int[ArrayLike, ""], start: Int[ArrayLike, ""], rows: int) -> Key[Array, " B"]:
    """A key for each of some rows, by its example's number; made under jit, so that every process holds all of them."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), start + jnp.arange(rows))


@jax.jit
def _keys_of_thoughts(keys: Key[Array, " B"]) -> Key[Array, " B"]:
    """Keys for what a feedback draws, apart from those that choose tokens."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
