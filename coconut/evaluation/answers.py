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

from coconut.batching import Shape, align, page_shape
from coconut.errors import CoconutError, NotFiniteError, check_fields
from coconut.evaluation.reading import given_pages, latent_columns, place_inputs, read
from coconut.latent.feedback import draws
from coconut.latent.generate import Generated, Prefix, SamplingConfig, decode
from coconut.latent.halting import HaltingConfig, Mode, Thinking
from coconut.latent.thinkers import Thinker
from coconut.methods.method import Method
from coconut.model import Model
from coconut.pages import Page, Placing, Text, Thoughts, question_alone
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
      halting: when a block is over that the model opens itself; None for what the method says, with ``thoughts``
        where they are given.
      keep_thoughts: keep the inputs of the thoughts that the model has made in blocks of its own, too.
    """

    batch_size: int = 64
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    thoughts: int | None = None
    forced: str = ""
    seed: int = 0
    halting: HaltingConfig | None = None
    keep_thoughts: bool = False

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
      text: forced beginning and generated text, without EOS, markers and thoughts.
      new_tokens: tokens of ``text``, the forced ones included, EOS and markers not.
      thoughts: thoughts, or pause tokens, before the text and within it.
      ended: whether the model ended by itself.
      cut: whether it was ended where it began to think with no room left.
      turns: what followed what, from the first thought on: a text, or a number of thoughts.
      passes: passes of the decoder that had to wait for each other: one for the question, those of the thoughts before
        the text (`coconut.latent.thinkers`), and one for each token and thought behind them.
      thought_inputs: ``[K, D]``, the thoughts themselves, in order; None where they were not kept.
    """

    example: int
    text: str
    new_tokens: int
    thoughts: int
    ended: bool
    cut: bool
    turns: tuple[str | int, ...]
    passes: int
    thought_inputs: np.ndarray | None


def answer_questions(
    model: Model,
    tokenizer: Tokenizer,
    method: Method,
    placing: Placing,
    examples: Sequence[TokenizedExample],
    config: AnswerConfig,
    *,
    inputs: Sequence[np.ndarray] | None = None,
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
      inputs: ``[K, D]`` of each question, run in the place of the thoughts that its page has before the answer
        (`coconut.evaluation.interventions`); None for the model's own.
      advance: called with the number of rows after each batch.

    Raises:
      CoconutError: a row would be longer than the model's positions, or has no place for the thoughts that are asked
        for; or inputs are not as many as thoughts.
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
    think = method.think(placing.options)
    for start in range(0, len(examples), config.batch_size):
        here = slice(start, start + config.batch_size)
        count = len(pages[here])
        keys, drawn, prefix, kept = _read_questions(
            model, tokenizer, method, placing, pages, shape, here, config, None if inputs is None else inputs[here]
        )
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
        written = jax.tree.map(np.asarray, generated)
        if not (finite := written.finite[:count]).all():
            first = start + int(np.argmin(finite))
            raise NotFiniteError(f"the model's numbers are not finite at question {first} and others: it is broken")
        for index in range(count):
            blocks = [part.count for part in pages[start + index] if isinstance(part, Thoughts)]
            own = None if kept is None else kept[index]
            yield _answer(start + index, written, index, tokenizer, forced, blocks, think, own)
        advance(count)


def thoughts_of_questions(
    model: Model,
    tokenizer: Tokenizer,
    method: Method,
    placing: Placing,
    examples: Sequence[TokenizedExample],
    config: AnswerConfig,
) -> list[np.ndarray]:
    """The thoughts ``[K, D]`` that the model has before it answers each question; nothing is written.

    The arguments are those of `answer_questions`.

    Raises:
      CoconutError: a question has no place for the thoughts that are asked for; or the method feeds nothing back.
    """
    pages = given_pages(method, placing, examples, config.thoughts)
    shape, found = page_shape(pages), []
    for start in range(0, len(pages), config.batch_size):
        here = slice(start, start + config.batch_size)
        *_, kept = _read_questions(model, tokenizer, method, placing, pages, shape, here, config, None)
        if kept is None:
            raise CoconutError(f"the method {method.name!r} feeds no thoughts back here")
        found += kept[: len(pages[here])]
    return found


def _read_questions(
    model: Model,
    tokenizer: Tokenizer,
    method: Method,
    placing: Placing,
    pages: Sequence[Page],
    shape: Shape,
    here: slice,
    config: AnswerConfig,
    inputs: Sequence[np.ndarray] | None,
) -> tuple[Key[Array, " B"], Key[Array, " B"] | None, Prefix, list[np.ndarray] | None]:
    """Reads some of the pages.

    Returns:
      A key for each row, one for what a feedback draws, what decoding goes on from, and each row's thoughts ``[K, D]``;
      None where the batch has no latent columns.
    """
    rows: list[Page | None] = list(pages[here])
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
    keys = _row_keys(config.seed, here.start, config.batch_size)
    drawn = _keys_of_thoughts(keys) if draws(model.feedback) else None
    think, latent_id = method.think(placing.options), tokenizer.latent_id
    given = None if inputs is None else place_inputs(batch, inputs)
    prefix, thoughts = read(model, batch, think, latent_id=latent_id, keys=drawn, inputs=given)
    if not thoughts:
        return keys, drawn, prefix, None
    made, used = np.concatenate([np.asarray(block) for block in thoughts], 1), batch.valid[:, latent_columns(batch)]
    return keys, drawn, prefix, [own[columns] for own, columns in zip(made, used, strict=True)]


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
    given_blocks: Sequence[int],
    think: Thinker,
    inputs: np.ndarray | None,
) -> Answer:
    """One row of what was generated, behind blocks of so many thoughts."""
    given = sum(given_blocks)
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
        passes=1 + sum(map(think.needed, given_blocks)) + len(tokens),
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
