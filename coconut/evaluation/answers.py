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
from coconut.evaluation.reading import (
    given_pages,
    latent_columns,
    open_last_block,
    pages_for_inputs,
    place_first_inputs,
    place_inputs,
    read,
)
from coconut.latent.feedback import draws
from coconut.latent.generate import Generated, Prefix, SamplingConfig, decode
from coconut.latent.halting import HaltingConfig, Mode, Thinking
from coconut.latent.soft_thinking import SoftThinking, SoftThinkingConfig
from coconut.latent.swi_reasoning import SwiReasoning, SwiReasoningConfig
from coconut.latent.thinkers import OneByOne, Thinker
from coconut.methods.method import Method
from coconut.model import Model
from coconut.pages import Page, Placing, Text, Thoughts, has_blocks, question_alone
from coconut.sharding import rows_together
from coconut.tokenizers import TokenizedExample, Tokenizer


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """How questions are answered.

    Attributes:
      batch_size: rows decoded together, at most.
      sampling: how tokens are chosen.
      thoughts: thoughts of every block, chosen at test time; None for what the stage was trained with.
      forced: text the model must go on from, behind the question and its thoughts (an answer's prefix, the start of a
        step).
      seed: of the draws.
      halting: when a block is over that the model opens itself, and the last one before the answer, where the method
        writes one and was trained to think in it; None for what the method says. Where ``thoughts`` are given, only the
        number of blocks is taken from it.
      soft_thinking: think softly behind the question, before anything is written (`coconut.latent.soft_thinking`), or
        by turns with what is written (`coconut.latent.swi_reasoning`).
      keep_thoughts: keep the inputs of the thoughts that the model has made in blocks of its own, too.
      keep_choices: keep how clearly and how likely each token was chosen (`Answer.margins`, `Answer.log_prob`).
    """

    batch_size: int = 64
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    thoughts: int | None = None
    forced: str = ""
    seed: int = 0
    halting: HaltingConfig | None = None
    soft_thinking: SoftThinkingConfig | SwiReasoningConfig | None = None
    keep_thoughts: bool = False
    keep_choices: bool = False

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
        if self.forced and isinstance(self.soft_thinking, SwiReasoningConfig):
            raise CoconutError(
                f"AnswerConfig.forced = {self.forced!r}: SwiReasoning has no place between thinking and answer"
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
      passes: passes of the decoder that had to wait for each other: one for the question, those of the thoughts before
        the text (`coconut.latent.thinkers`), and one for each token and thought behind them.
      thought_inputs: ``[K, D]``, the thoughts themselves, in order; None where they were not kept.
      chosen: ids of what stands in the columns behind what it was given, EOS and markers included, the latent marker's
        where it thought.
      margins: by how much the best logit was above the second best in each of these columns; None where not kept.
      log_prob: log-probability of what was chosen, in nats; None where not kept, or where the row could think itself.
    """

    example: int
    text: str
    new_tokens: int
    thoughts: int
    ended: bool
    cut: bool
    turns: tuple[str | int, ...]
    soft_text: str
    passes: int
    thought_inputs: np.ndarray | None
    chosen: tuple[int, ...] = ()
    margins: tuple[float, ...] | None = None
    log_prob: float | None = None


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
        (`coconut.evaluation.interventions`); a page's only block becomes as long as they are. None for the model's own.
      advance: called with the number of rows after each batch.

    Raises:
      CoconutError: a row would be longer than the model's positions, or has no place for the thoughts that are asked
        for; or inputs are not as many as thoughts.
      NotFiniteError: the model gives numbers that are not finite, so that its answers mean nothing.
    """
    if not examples:
        return
    config = _with_no_empty_rows(config, len(examples))
    think, soft = method.think(placing.options), config.soft_thinking
    if isinstance(soft, SoftThinkingConfig):
        think = OneByOne()
        feedback = SoftThinking(config=soft, vocab_size=tokenizer.vocab_size)
        model = model._replace(parts={**model.parts, "feedback": feedback})
    forced = np.asarray(tokenizer.encode(config.forced), np.int32)
    pages = given_pages(method, placing, examples, config.thoughts)
    if inputs is not None:
        pages = pages_for_inputs(pages, inputs)
    pages, opened, behind = _open_blocks(pages, tokenizer, method, config)
    # What is forced stands behind the thoughts, also where nobody knows yet how many there are.
    pages = [page if is_open else (*page, Text(forced)) for page, is_open in zip(pages, opened, strict=True)]
    # Room for the last stage's thoughts at every stage, and for any number asked for below: one program.
    last = dataclasses.replace(placing, stage=placing.curriculum.final_stage)
    widest, _, _ = _open_blocks(
        given_pages(method, last, [question_alone(examples[0].question, placing.curriculum)]), tokenizer, method, config
    )
    shape = page_shape([*pages, *widest])
    halting = config.halting or method.halting(placing)
    if soft is not None:
        halting = soft.halting if isinstance(soft, SoftThinkingConfig) else None
    if halting is not None and config.thoughts is not None:
        most, blocks = max(config.thoughts, 1), halting.room // halting.most
        halting = HaltingConfig(stop="count", least=min(config.thoughts, 1), most=most, room=blocks * most)
    thinking: Thinking | SwiReasoning | None = None
    if isinstance(soft, SwiReasoningConfig):
        thinking = _by_turns(tokenizer, soft, config)
    elif halting is not None:
        thinking = _thinking(model, tokenizer, think, halting, config)
    sampling = config.sampling
    if any(opened) and isinstance(thinking, Thinking):
        thinking = dataclasses.replace(thinking, behind=(*behind, *forced.tolist()))
        # What is read behind the block would else stand in the page, where it is no new token.
        read_there = len(behind) + len(forced)
        sampling = dataclasses.replace(sampling, max_new_tokens=sampling.max_new_tokens + read_there)
    room = sampling.max_new_tokens + (0 if thinking is None else thinking.room)
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
            model,
            tokenizer,
            method,
            placing,
            pages,
            shape,
            here,
            config,
            inputs=None if inputs is None else inputs[here],
        )
        active = np.arange(config.batch_size) < count
        if isinstance(thinking, Thinking):
            is_open = np.zeros(config.batch_size, bool)
            is_open[:count] = opened[start : start + count]
            thinking = dataclasses.replace(thinking, keys=drawn, opened=is_open if any(opened) else None)
        generated = decode(
            model.decoder,
            prefix,
            active,
            keys,
            thinking=thinking,
            sampling=sampling,
            eos_id=tokenizer.eos_id,
            vocab_size=tokenizer.vocab_size,
            keep_log_probs=config.keep_choices,
            keep_margins=config.keep_choices,
        )
        written = jax.tree.map(np.asarray, generated)
        if not (finite := written.finite[:count]).all():
            first = start + int(np.argmin(finite))
            raise NotFiniteError(f"the model's numbers are not finite at question {first} and others: it is broken")
        for index in range(count):
            own = None if kept is None else kept[index]
            yield _answer(
                written,
                index,
                tokenizer,
                example=start + index,
                forced=() if opened[start + index] else tuple(forced.tolist()),
                behind=len(behind) if opened[start + index] else 0,
                given_blocks=[part.count for part in pages[start + index] if isinstance(part, Thoughts)],
                think=think,
                inputs=own,
                thinking=thinking,
            )
        advance(count)


def thoughts_of_questions(
    model: Model,
    tokenizer: Tokenizer,
    method: Method,
    placing: Placing,
    examples: Sequence[TokenizedExample],
    config: AnswerConfig,
    *,
    given: Sequence[np.ndarray] | None = None,
) -> list[np.ndarray]:
    """The thoughts ``[K, D]`` that the model has before it answers each question; nothing is written.

    Args:
      model: the model, and what follows it as in `answer_questions`.
      tokenizer: its tokenizer.
      method: how an example is written down.
      placing: the stage it has reached, and its method's options.
      examples: the questions.
      config: how to answer.
      given: ``[m, D]`` of each question, run in the place of its first ``m`` thoughts: behind them the model thinks on
        by itself. None for its own thoughts alone.

    Raises:
      CoconutError: a question has no place for the thoughts that are asked for, or fewer thoughts than are given; the
        method feeds nothing back; or thoughts are given where the model makes all of them together.
    """
    config = _with_no_empty_rows(config, len(examples))
    pages = given_pages(method, placing, examples, config.thoughts)
    shape, found = page_shape(pages), []
    for start in range(0, len(pages), config.batch_size):
        here = slice(start, start + config.batch_size)
        *_, kept = _read_questions(
            model, tokenizer, method, placing, pages, shape, here, config, first=None if given is None else given[here]
        )
        if kept is None:
            raise CoconutError(f"the method {method.name!r} feeds no thoughts back here")
        found += kept[: len(pages[here])]
    return found


def _with_no_empty_rows(config: AnswerConfig, questions: int) -> AnswerConfig:
    """Batches of no more rows than there are questions: rows beyond them would only be memory."""
    return dataclasses.replace(config, batch_size=rows_together(config.batch_size, questions))


def _read_questions(
    model: Model,
    tokenizer: Tokenizer,
    method: Method,
    placing: Placing,
    pages: Sequence[Page],
    shape: Shape,
    here: slice,
    config: AnswerConfig,
    *,
    inputs: Sequence[np.ndarray] | None = None,
    first: Sequence[np.ndarray] | None = None,
) -> tuple[Key[Array, " B"], Key[Array, " B"] | None, Prefix, list[np.ndarray] | None]:
    """Reads some of the pages, on inputs in the place of all of their thoughts or of the first ones.

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
    placed, given = None if inputs is None else place_inputs(batch, inputs), None
    if first is not None:
        placed, given = place_first_inputs(batch, first)
    prefix, thoughts = read(model, batch, think, latent_id=latent_id, keys=drawn, inputs=placed, given=given)
    if not thoughts:
        return keys, drawn, prefix, None
    made, used = np.concatenate([np.asarray(block) for block in thoughts], 1), batch.valid[:, latent_columns(batch)]
    return keys, drawn, prefix, [own[columns] for own, columns in zip(made, used, strict=True)]


def _thinking(
    model: Model, tokenizer: Tokenizer, think: Thinker, halting: HaltingConfig, config: AnswerConfig
) -> Thinking:
    """How rows think that open a block themselves, or think softly."""
    halt = None
    if halting.has_head:
        if "halt" not in model.parts:
            raise CoconutError(f"HaltingConfig.stop = {halting.stop!r}: the model has no part named 'halt'")
        halt = model.parts["halt"]
    start_id, latent_id, end_id = tokenizer.start_latent_id, tokenizer.latent_id, tokenizer.end_latent_id
    if isinstance(soft := config.soft_thinking, SoftThinkingConfig):
        start_id, latent_id = None, None
        end_id = _only_token(tokenizer, soft.end, "SoftThinkingConfig.end") if soft.end else None
    return Thinking(
        feedback=model.feedback,
        config=halting,
        start_id=start_id,
        latent_id=latent_id,
        end_id=end_id,
        text_ids=tuple(_only_token(tokenizer, text, "HaltingConfig.texts") for text in halting.texts),
        think=think,
        halt=halt,
        counts=None if config.thoughts is None else jnp.full(config.batch_size, config.thoughts),
        keep_inputs=config.keep_thoughts,
    )


def _by_turns(tokenizer: Tokenizer, swi: SwiReasoningConfig, config: AnswerConfig) -> SwiReasoning:
    """How rows think and write by turns."""
    ids = {
        name: _only_token(tokenizer, text, f"SwiReasoningConfig.{name}") if text else None
        for name, text in (("start", swi.start), ("end", swi.end))
    }
    return SwiReasoning(
        config=swi,
        first_id=_only_token(tokenizer, swi.first, "SwiReasoningConfig.first"),
        start_id=ids["start"],
        end_id=ids["end"],
        lead_ids=tuple(tokenizer.encode(swi.lead)),
        keep_inputs=config.keep_thoughts,
    )


def _open_blocks(
    pages: list[Page], tokenizer: Tokenizer, method: Method, config: AnswerConfig
) -> tuple[list[Page], list[bool], tuple[int, ...]]:
    """The pages, up to the block that the model itself ends where one has such a block, and what is read behind it."""
    if (soft := config.soft_thinking) is not None:
        if any(map(has_blocks, pages)):
            raise CoconutError("AnswerConfig.soft_thinking: the method writes blocks of thoughts of its own")
        start = Text(np.asarray(tokenizer.encode(soft.start), np.int32))
        if isinstance(soft, SwiReasoningConfig):
            return [(*page, start) for page in pages], [False] * len(pages), ()
        end = (_only_token(tokenizer, soft.end, "SoftThinkingConfig.end"),) if soft.end else ()
        return [(*page, start) for page in pages], [True] * len(pages), end
    if not (config.halting or method.ends_blocks) or config.thoughts is not None:
        return pages, [False] * len(pages), ()
    opened = [open_last_block(page) for page in pages]
    behind = {tuple(found[1].tolist()) for found in opened if found is not None}
    if len(behind) > 1:
        raise CoconutError("AnswerConfig.halting: what the method writes behind the last thoughts differs by question")
    shortened = [page if found is None else found[0] for page, found in zip(pages, opened, strict=True)]
    return shortened, [found is not None for found in opened], behind.pop() if behind else ()


def _only_token(tokenizer: Tokenizer, text: str, field: str) -> int:
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        raise CoconutError(f"{field} = {text!r}: the tokenizer makes {len(ids)} tokens of it, not one")
    return ids[0]


def _answer(
    generated: Generated,
    row: int,
    tokenizer: Tokenizer,
    *,
    example: int,
    forced: tuple[int, ...],
    behind: int,
    given_blocks: Sequence[int],
    think: Thinker,
    inputs: np.ndarray | None,
    thinking: Thinking | SwiReasoning | None,
) -> Answer:
    """One row of what was generated.

    Args:
      generated: the rows.
      row: which one.
      tokenizer: the tokenizer.
      example: its example.
      forced: what the text begins with, which stands in the page.
      behind: tokens that were read behind the row's first block because the page has them there: no part of the text.
      given_blocks: thoughts of each block in the page.
      think: how these were made.
      inputs: these thoughts; None where there are none.
      thinking: how rows could think.
    """
    given = sum(given_blocks)
    tokens = generated.tokens[row, : generated.lengths[row]].tolist()
    blocks, modes, marks = generated.blocks, np.full(len(tokens), Mode.WRITING), np.zeros(len(tokens), bool)
    if blocks is not None:
        assert thinking is not None
        modes, ids = blocks.modes[row, : len(tokens)], np.asarray(tokens, np.int64)
        # What opened a block, and what was read behind one. Elsewhere a marker is text like any other.
        marks |= (modes == Mode.WRITING) & (ids == (-1 if thinking.start_id is None else thinking.start_id))
        marks |= (modes == Mode.READING) & (ids == (-1 if thinking.end_id is None else thinking.end_id))
        if blocks.inputs is not None:
            kept = np.asarray(blocks.inputs)[row, : len(tokens)][modes == Mode.THINKING]
            inputs = kept if inputs is None else np.concatenate([inputs, kept])
    own, reads = modes == Mode.THINKING, modes == Mode.READING
    seen = ~(reads & (np.cumsum(reads) <= behind))
    thoughts = [token for token, thought in zip(tokens, own, strict=True) if thought]
    parts = [(token, False, False) for token in forced]
    parts += [
        (token, bool(thought), bool(mark))
        for token, thought, mark, is_seen in zip(tokens, own, marks, seen, strict=True)
        if is_seen
    ]
    text = [token for token, thought, mark in parts if not thought and not mark]
    turns: list[str | int] = [given] if given else []
    for thought, group in itertools.groupby(parts, key=lambda pair: pair[1]):
        ids = [token for token, _, mark in group if not mark]
        turns.append(len(ids) if thought else tokenizer.decode(ids))
    columns = len(tokens) + bool(generated.ended[row])
    margins = None if generated.margins is None else tuple(generated.margins[row, :columns].tolist())
    return Answer(
        example=example,
        text=tokenizer.decode(text),
        new_tokens=len(text),
        thoughts=given + len(thoughts),
        ended=bool(generated.ended[row]),
        cut=blocks is not None and bool(blocks.cut[row]),
        turns=tuple(turns),
        soft_text=tokenizer.decode(thoughts) if thinking is not None and thinking.latent_id is None else "",
        passes=1 + sum(map(think.needed, given_blocks)) + len(tokens),
        thought_inputs=inputs,
        chosen=tuple(generated.tokens[row, :columns].tolist()),
        margins=margins,
        log_prob=None if generated.log_probs is None else float(generated.log_probs[row].sum()),
    )


@functools.partial(jax.jit, static_argnames="rows")
def _row_keys(seed: Int[ArrayLike, ""], start: Int[ArrayLike, ""], rows: int) -> Key[Array, " B"]:
    """A key for each of some rows, by its example's number; made under jit, so that every process holds all of them."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), start + jnp.arange(rows))


@jax.jit
def _keys_of_thoughts(keys: Key[Array, " B"]) -> Key[Array, " B"]:
    """Keys for what a feedback draws, apart from those that choose tokens."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
