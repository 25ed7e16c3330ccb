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

from coconut.curriculum import CurriculumConfig, SequenceRule
from coconut.errors import CoconutError, check_fields
from coconut.latent.generate import SamplingConfig, decode, prefill, think_on
from coconut.model import Model
from coconut.tokenizers import TokenizedExample, Tokenizer


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """How questions are answered.

    Attributes:
      batch_size: rows decoded together.
      sampling: how tokens are chosen.
      thoughts: fillers of every question, chosen at test time; None for what the stage was trained with.
      forced: text the model must go on from behind the end marker (an answer's prefix, the start of a step).
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
      thoughts: fillers before it.
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
    rule: SequenceRule,
    curriculum: CurriculumConfig,
    stage: int,
    examples: Sequence[TokenizedExample],
    config: AnswerConfig,
    *,
    advance: Callable[[int], None] = lambda rows: None,
) -> Iterator[Answer]:
    """Answers every example once, in order.

    All batches have one shape, so each of the three programs of `coconut.latent.generate` is compiled once.

    Args:
      model: the model.
      tokenizer: its tokenizer.
      rule: how its method writes an example down.
      curriculum: the curriculum it was trained by.
      stage: the stage it has reached; stored with the checkpoint.
      examples: the questions. Steps and answers are not read, but for the number of steps where the curriculum makes
        the number of thoughts depend on it.
      config: how to answer.
      advance: called with the number of rows after each batch.

    Raises:
      CoconutError: a row would be longer than the model's positions.
    """
    if not examples:
        return
    planned = [rule.plan(curriculum, stage, len(example.steps)).thoughts for example in examples]
    counts = np.asarray(planned if config.thoughts is None else [config.thoughts] * len(examples), np.int32)
    forced = np.asarray(
        [*([tokenizer.end_latent_id] if rule.markers else []), *tokenizer.encode(config.forced)], np.int32
    )
    prompts = [_prompt(example, int(count), rule, tokenizer) for example, count in zip(examples, counts, strict=True)]
    room = 0
    if rule.filler == "thought":
        # Room for the last stage's thoughts at every stage, and for any number asked for below: one program.
        last = rule.plan(curriculum, curriculum.final_stage, curriculum.max_latent_stage).thoughts
        room = max(int(counts.max()), last)
    width = max(len(prompt) for prompt in prompts)
    columns = width + room + len(forced) + config.sampling.max_new_tokens
    if columns > model.decoder.config.max_positions:
        raise CoconutError(
            f"DecoderConfig.max_positions = {model.decoder.config.max_positions}: a question of {width} tokens, {room} "
            f"thoughts, {len(forced)} forced and {config.sampling.max_new_tokens} new tokens need {columns}"
        )
    for start in range(0, len(examples), config.batch_size):
        rows = prompts[start : start + config.batch_size]
        tokens = np.full((config.batch_size, width), tokenizer.eos_id, np.int32)
        valid = np.zeros(tokens.shape, bool)
        # Rows that only fill the batch read one token, so that their softmax has something to see.
        valid[len(rows) :, -1] = True
        for index, prompt in enumerate(rows):
            tokens[index, width - len(prompt) :] = prompt
            valid[index, width - len(prompt) :] = True
        prefix = prefill(model.decoder, tokens, valid)
        thoughts = None
        if room:
            batch_counts = np.zeros(config.batch_size, np.int32)
            batch_counts[: len(rows)] = counts[start : start + len(rows)]
            prefix, thoughts = think_on(model.decoder, model.feedback, prefix, batch_counts, room=room)
            thoughts = np.asarray(thoughts)
        active = np.arange(config.batch_size) < len(rows)
        keys = _row_keys(config.seed, start, config.batch_size)
        generated = decode(
            model.decoder,
            prefix,
            active,
            keys,
            forced=np.tile(forced, (config.batch_size, 1)),
            sampling=config.sampling,
            eos_id=tokenizer.eos_id,
            vocab_size=tokenizer.vocab_size,
        )
        new, lengths, ended = (np.asarray(x) for x in generated[:3])
        forced_ids = forced[rule.markers :].tolist()
        for index in range(len(rows)):
            count = int(counts[start + index])
            yield Answer(
                example=start + index,
                text=tokenizer.decode([*forced_ids, *new[index, : lengths[index]].tolist()]),
                new_tokens=len(forced_ids) + int(lengths[index]),
                thoughts=count,
                ended=bool(ended[index]),
                thought_inputs=None if thoughts is None else thoughts[index, :count],
            )
        advance(len(rows))


@functools.partial(jax.jit, static_argnames="rows")
def _row_keys(seed: Int[ArrayLike, ""], start: Int[ArrayLike, ""], rows: int) -> Key[Array, " B"]:
    """A key for each of some rows, by its example's number; made under jit, so that every process holds all of them."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), start + jnp.arange(rows))


def _prompt(example: TokenizedExample, count: int, rule: SequenceRule, tokenizer: Tokenizer) -> np.ndarray:
    """What is read before the first thought; a pause method's fillers are read, too."""
    markers = [tokenizer.start_latent_id] if rule.markers else []
    fillers = [tokenizer.latent_id] * count if rule.filler == "pause" else []
    return np.concatenate([example.question, np.asarray([*markers, *fillers], np.int32)])
