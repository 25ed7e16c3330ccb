"""Decoding through the rollout's own pieces: prefill, thoughts, language.

Three compiled programs serve every batch of one shape: a parallel pass over the prompts, a scan over thoughts whose
number is data (each row may have its own), and a loop over new tokens, behind the end marker and whatever else is
forced, that ends when every row has. They return what they add to a prefix: keys and values that pass through a program
are copied by it.

A prefix may hold any number of blocks of a known number of thoughts. In the loop a row may open further ones, where it
is told how (`coconut.latent.halting`): each turn, each row reads, thinks, writes, or is done.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from coconut.errors import CoconutError, check_fields
from coconut.latent.feedback import Feedback, with_constants
from coconut.latent.halting import Blocks, Thinking
from coconut.latent.rollout import last_valid, last_valid_column, walk
from coconut.latent.swi_reasoning import SwiReasoning
from coconut.latent.thinkers import OneByOne, Thinker
from coconut.latent.thoughts import (
    Past,
    Place,
    check_positions,
    room_behind,
    run_one_by_one,
    run_one_column,
    think_sequentially,
    trunk,
)
from coconut.models.cache import Segment
from coconut.models.config import DecoderConfig, ExecutionConfig
from coconut.models.decoder import Decoder
from coconut.models.products import may_flatten
from coconut.sharding import replicate
from coconut.types import Latent
from pallas_kernels.platform import platform

CACHED_BYTES = 8 * 2**20
"""Of an MLP's hidden numbers: XLA:CPU takes them through memory once for each operation, which is slow where they do
not fit a processor's caches. 64 rows of 160 columns take 1.3 times as long together as in portions on an AMD EPYC."""


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen.

    Attributes:
      max_new_tokens: tokens after which a row ends at the latest, EOS included. Thoughts are not counted.
      temperature: 0 takes the most likely token; else logits are divided by it and a token is drawn.
      top_k: draw among the most likely so many; None for all.
      top_p: draw among the fewest most likely ones whose shares of what ``top_k`` left sum to at least this (nucleus
        sampling, Holtzman et al. 2020): the token that crosses the bound is one of them. 1 for all.
      min_p: draw among those that are at least so many times as likely as the likeliest (Nguyen et al. 2024); 0 for
        all.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_new_tokens < 1:
            raise CoconutError(f"SamplingConfig.max_new_tokens = {self.max_new_tokens!r}: must be at least 1")
        if not self.temperature >= 0:
            raise CoconutError(f"SamplingConfig.temperature = {self.temperature!r}: must be at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise CoconutError(f"SamplingConfig.top_k = {self.top_k!r}: must be None or at least 1")
        if not 0 < self.top_p <= 1:
            raise CoconutError(f"SamplingConfig.top_p = {self.top_p!r}: must be above 0, and at most 1")
        if not 0 <= self.min_p <= 1:
            raise CoconutError(f"SamplingConfig.min_p = {self.min_p!r}: must be between 0 and 1")


class Prefix(NamedTuple):
    """What decoding goes on from.

    Attributes:
      past: segments so far.
      last: hidden state of each row's last column.
      length: columns each row has used, the position of its next one.
    """

    past: Past
    last: Float[Array, "B D"]
    length: Int[Array, " B"]

    def shared(self, count: int) -> "Prefix":
        """The prefix of ``count`` times as many rows: each row's copies follow each other and share its segments."""
        return Prefix(self.past, jnp.repeat(self.last, count, axis=0), jnp.repeat(self.length, count, axis=0))


class Continuation(NamedTuple):
    """What a program adds to a prefix.

    Attributes:
      segment: keys and values of its columns.
      last: hidden state of each row's last column.
      length: columns each row has used.
    """

    segment: Segment
    last: Float[Array, "B D"]
    length: Int[Array, " B"]

    def behind(self, past: Past) -> Prefix:
        """What decoding goes on from."""
        return Prefix((*past, self.segment), self.last, self.length)


class Generated(NamedTuple):
    """Decoded rows.

    Attributes:
      tokens: new token ids, the latent marker's where a row thought; EOS after a row's end.
      lengths: columns of each row before its EOS, or before the limit: new tokens and thoughts.
      ended: whether the row ended by itself, by EOS.
      finite: whether all states that the row's tokens were chosen from were finite. Where they are not the model is
        broken, and its tokens mean nothing.
      blocks: what the rows thought and where; None where they could not.
      log_probs: log-probability of each token in the whole distribution after the temperature, before ``top_k``,
        ``top_p`` and ``min_p`` leave tokens out; 0 behind a row's end. None where they were not asked for.
      margins: by how much the best logit of each column is above the second best, before temperature: how near another
        token was to being the likeliest. 0 behind a row's end. None where they were not asked for.
    """

    tokens: Int[Array, "B S"]
    lengths: Int[Array, " B"]
    ended: Bool[Array, " B"]
    finite: Bool[Array, " B"]
    blocks: Blocks | None = None
    log_probs: Float[Array, "B S"] | None = None
    margins: Float[Array, "B S"] | None = None


def prefill(
    decoder: Decoder,
    tokens: Int[Array | np.ndarray, "B P"],
    valid: Bool[Array | np.ndarray, "B P"],
    prefix: Prefix | None = None,
) -> Prefix:
    """Reads tokens in one parallel pass, from the start or behind ``prefix``.

    Args:
      decoder: the decoder.
      tokens: token ids.
      valid: columns that belong to the row; a row may have none of them, and is then left as it was.
      prefix: what the tokens follow.

    Raises:
      CoconutError: with those of the prefix there are more columns, padding included, than a learned table has
        positions.
    """
    return prefill_program(decoder, tokens, valid, prefix).behind(() if prefix is None else prefix.past)


@jax.jit
def prefill_program(
    decoder: Decoder, tokens: Int[Array, "B P"], valid: Bool[Array, "B P"], prefix: Prefix | None
) -> Continuation:
    """The compiled part of `prefill`."""
    if prefix is None:
        batch = tokens.shape[0]
        nothing = jnp.zeros((batch, decoder.config.embed_dim), decoder.execution.compute_dtype)
        prefix = Prefix((), nothing, jnp.zeros(batch, jnp.int32))
    place, past = place_behind(decoder, prefix, valid), prefix.past

    def read(given: tuple[Array, Array, Array]) -> tuple[Any, Array]:
        tokens, positions, valid = given
        here = dataclasses.replace(place, positions=positions, valid=valid)
        hidden, key_values = trunk(decoder, decoder.embed(tokens), here, past, last_valid_column(valid)[:, None])
        return key_values, hidden[:, 0]

    given = (tokens, place.positions, valid)
    if (portions := 1 if past else _portions(decoder.config, decoder.execution, *tokens.shape)) == 1:
        key_values, last = read(given)
    else:
        parted = jax.tree.map(lambda x: x.reshape(portions, -1, *x.shape[1:]), given)
        key_values, last = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(read, parted))
    return Continuation(
        Segment(key_values, valid, place.columns),
        jnp.where(valid.any(1)[:, None], last, prefix.last),
        prefix.length + valid.sum(1, dtype=jnp.int32),
    )


def _portions(config: DecoderConfig, execution: ExecutionConfig, rows: int, columns: int) -> int:
    """In how many equal portions a single CPU device best reads the rows of a batch; 1 on others."""
    if platform() != "cpu" or not may_flatten() or execution.scan_layers:
        return 1
    hidden = columns * config.width_of_mlp * execution.compute_dtype.itemsize
    least = max(1, min(math.ceil(rows * hidden / CACHED_BYTES), rows))
    # A number of rows with no fitting divisor is read together.
    return next((portions for portions in range(least, min(2 * least, rows) + 1) if rows % portions == 0), 1)


def think_on(
    decoder: Decoder,
    feedback: Feedback,
    prefix: Prefix,
    counts: Int[Array | np.ndarray, " B"],
    *,
    room: int,
    think: Thinker = OneByOne(),  # noqa: B008 - immutable
    latent_id: int | None = None,
    keys: Key[Array, " B"] | None = None,
) -> tuple[Prefix, Float[Array, "B K D"]]:
    """Thinks ``counts`` thoughts, at most ``room``, and returns them beside what decoding goes on from.

    The counts are data: another number of thoughts needs no other program.

    Args:
      decoder: the decoder.
      feedback: how a hidden state becomes the next thought.
      prefix: what the thoughts follow.
      counts: thoughts of each row.
      room: columns of the block.
      think: how thoughts are made.
      latent_id: id of the latent marker, which `Sweeps` start from.
      keys: a key for each row, for feedbacks that draw.

    Raises:
      CoconutError: sweeps without the marker's id; or more columns than positions, as in `prefill`, with the whole
        ``room``.
    """
    following, thoughts = think_program(
        decoder, feedback, prefix, counts, room=room, think=think, latent_id=latent_id, keys=keys
    )
    return following.behind(prefix.past), thoughts


@functools.partial(jax.jit, static_argnames=("room", "think", "latent_id"))
def think_program(
    decoder: Decoder,
    feedback: Feedback,
    prefix: Prefix,
    counts: Int[Array, " B"],
    *,
    room: int,
    think: Thinker = OneByOne(),  # noqa: B008 - immutable
    latent_id: int | None = None,
    keys: Key[Array, " B"] | None = None,
) -> tuple[Continuation, Float[Array, "B K D"]]:
    """The compiled part of `think_on`."""
    place = place_behind(decoder, prefix, jnp.arange(room) < counts[:, None], keys)
    feedback = with_constants(feedback, decoder)
    if isinstance(think, OneByOne):
        span = think_sequentially(decoder, feedback, prefix.past, prefix.last, place)
        thoughts, segment = span.thoughts, Segment(span.key_values, place.valid, place.columns)
        last = last_valid(span.hidden, place.valid, prefix.last)
    else:
        if latent_id is None:
            raise CoconutError(f"{think}: a block starts from the latent marker, whose id is missing")
        output = walk(
            decoder,
            feedback,
            (Latent(room),),
            embedded=decoder.embed(jnp.full(place.valid.shape, latent_id)),
            place=place,
            past=prefix.past,
            last=prefix.last,
            think=think,
        )
        thoughts, segment, last = output.thoughts[0], output.past[-1], output.last
    return Continuation(segment, last, prefix.length + jnp.minimum(counts, room)), replicate(thoughts)


def run_given(
    decoder: Decoder,
    prefix: Prefix,
    inputs: Float[Array | np.ndarray, "B K D"],
    counts: Int[Array | np.ndarray, " B"],
    *,
    think: Thinker = OneByOne(),  # noqa: B008 - immutable
) -> Prefix:
    """`think_on` with thoughts that are given: keys, values and all that follows come of these inputs.

    Given the thoughts that `think_on` made it leaves what that left. Columns run one by one, or all together, as they
    do where the thinker makes the thoughts.

    Args:
      decoder: the decoder.
      prefix: what the thoughts follow.
      inputs: of the columns of the block.
      counts: columns that each row uses, from the left.
      think: how the model was trained to think.

    Raises:
      CoconutError: more columns than positions, as in `think_on`.
    """
    return given_program(decoder, prefix, inputs, counts, think=think).behind(prefix.past)


@functools.partial(jax.jit, static_argnames="think")
def given_program(
    decoder: Decoder,
    prefix: Prefix,
    inputs: Float[Array, "B K D"],
    counts: Int[Array, " B"],
    *,
    think: Thinker = OneByOne(),  # noqa: B008 - immutable
) -> Continuation:
    """The compiled part of `run_given`."""
    room = inputs.shape[1]
    place = place_behind(decoder, prefix, jnp.arange(room) < counts[:, None])
    run = run_one_by_one if isinstance(think, OneByOne) else trunk
    hidden, key_values = run(decoder, inputs, place, prefix.past)
    last = last_valid(hidden, place.valid, prefix.last)
    return Continuation(
        Segment(key_values, place.valid, place.columns), last, prefix.length + jnp.minimum(counts, room)
    )


@functools.partial(jax.jit, static_argnames=("sampling", "eos_id", "vocab_size", "keep_log_probs", "keep_margins"))
def decode(
    decoder: Decoder,
    prefix: Prefix,
    active: Bool[Array, " B"],
    keys: Key[Array, " B"],
    *,
    forced: Int[Array, "B F"] | None = None,
    thinking: Thinking | SwiReasoning | None = None,
    sampling: SamplingConfig,
    eos_id: int,
    vocab_size: int | None = None,
    keep_log_probs: bool = False,
    keep_margins: bool = False,
) -> Generated:
    """Writes language until every active row has met EOS or its limit.

    Args:
      decoder: the decoder.
      prefix: what the language follows.
      active: rows to decode; the others (which only fill the batch) are not waited for.
      keys: a key for each row, so that a row's draws do not depend on its neighbours; not used at temperature 0.
      forced: tokens read first, in one parallel pass: the end marker, an answer's prefix.
      thinking: how rows think that write the start marker, or by turns; None where no row thinks.
      sampling: how tokens are chosen.
      eos_id: id that ends a row.
      vocab_size: ids that may be chosen, from 0; None for every row of the embedding. Published embeddings often have
        rows that are no token.
      keep_log_probs: return the tokens' log-probabilities (`Generated.log_probs`), of rows that think nothing.
      keep_margins: return how clearly each token was chosen (`Generated.margins`).

    Raises:
      CoconutError: parts of ``thinking`` that do not fit each other (`Thinking.check`); or more columns than positions,
        as in `prefill`, with all tokens and thoughts that there is room for.
    """
    batch, room = active.shape[0], sampling.max_new_tokens
    if forced is not None and forced.shape[1]:
        prefix = prefill(decoder, forced, jnp.ones(forced.shape, bool), prefix)
    state: Any = None
    row_keys = None
    if thinking is not None:
        thinking = thinking.ready(decoder)
        room, row_keys = room + thinking.room, thinking.keys
        state = thinking.begin(~active, room, decoder.config.embed_dim, prefix.last.dtype)
    place = place_behind(decoder, prefix, jnp.ones((batch, room), bool), row_keys)

    def unfinished(carry: tuple) -> Array:
        index, *_, done, _, _, _, _ = carry
        return (index < room) & ~done.all()

    def body(carry: tuple) -> tuple:
        index, last, own, tokens, done, finite, log_probs, margins, state = carry
        # A row that is done may run on past what the model has positions for.
        finite &= done | jnp.isfinite(last).all(-1)
        here, logits = place.column(index), decoder.unembed(last)[:, :vocab_size]
        token = jnp.where(done, eos_id, _choose(logits, keys, index, sampling))
        if log_probs is not None:
            own_log_probs = jnp.where(done, 0.0, _log_prob_of(logits, token, sampling.temperature))
            log_probs = jax.lax.dynamic_update_slice_in_dim(log_probs, own_log_probs[:, None], index, axis=1)
        if margins is not None:
            best = jax.lax.top_k(logits, 2)[0]
            own_margins = jnp.where(done, 0.0, best[:, 0] - best[:, 1])
            margins = jax.lax.dynamic_update_slice_in_dim(margins, own_margins[:, None], index, axis=1)
        if thinking is None:
            done, inputs = done | (token == eos_id), decoder.embed(token)
        else:
            state, done, token, inputs = thinking.turn(
                state,
                done,
                decoder,
                hidden=last,
                logits=logits,
                chosen=token,
                here=here,
                index=index,
                eos_id=eos_id,
                limit=sampling.max_new_tokens,
            )
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], index, axis=1)
        hidden, own = run_one_column(decoder, inputs, here, prefix.past, own, index)
        return index + 1, hidden, own, tokens, done, finite, log_probs, margins, state

    tokens = jnp.full((batch, room), eos_id, jnp.int32)
    own, finite = room_behind(decoder, place, prefix.past), jnp.ones(batch, bool)
    nothing = jnp.zeros((batch, room), decoder.execution.accumulation_dtype)
    log_probs = nothing if keep_log_probs and thinking is None else None
    margins = nothing if keep_margins else None
    start = (jnp.zeros((), jnp.int32), prefix.last, own, tokens, ~active, finite, log_probs, margins, state)
    *_, tokens, _, finite, log_probs, margins, state = jax.lax.while_loop(unfinished, body, start)
    if thinking is not None:
        blocks = thinking.blocks(state)
        lengths = blocks.written + blocks.thoughts - blocks.ended
        return replicate(Generated(tokens, lengths, blocks.ended, finite, blocks, margins=margins))
    ends = tokens == eos_id
    ended = ends.any(1)
    lengths = jnp.where(ended, jnp.argmax(ends, 1), room).astype(jnp.int32)
    return replicate(Generated(tokens, lengths, ended, finite, log_probs=log_probs, margins=margins))


def _log_prob_of(logits: Float[Array, "B V"], token: Int[Array, " B"], temperature: float) -> Float[Array, " B"]:
    likely = jax.nn.log_softmax(logits / temperature if temperature else logits)
    return jnp.take_along_axis(likely, token[:, None], -1)[:, 0]


def place_behind(
    decoder: Decoder, prefix: Prefix, valid: Bool[Array, "B T"], keys: Key[Array, " B"] | None = None
) -> Place:
    """The columns that follow a prefix, if the decoder has positions for all of them; which are padding is data."""
    positions = prefix.length[:, None] + jnp.cumsum(valid, 1, dtype=jnp.int32) - 1
    before = sum(segment.valid.shape[1] for segment in prefix.past)
    T = valid.shape[1]
    check_positions(decoder, before + T, f"{before} columns of a prefix and {T} behind it, padding included,")
    return Place(jnp.where(valid, positions, 0), valid, before + jnp.arange(valid.shape[1]), keys=keys)


def _choose(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], index: Int[Array, ""], sampling: SamplingConfig
) -> Int[Array, " B"]:
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        order = jnp.argsort(-logits, -1)
        shares = jax.nn.softmax(jnp.take_along_axis(logits, order, -1))
        kept = jnp.cumsum(shares, -1) - shares < sampling.top_p
        # Each token keeps its place, so that a key draws what it drew before wherever that token is kept.
        logits = jnp.where(jnp.take_along_axis(kept, jnp.argsort(order, -1), -1), logits, -jnp.inf)
    if sampling.min_p:
        least = logits.max(-1, keepdims=True) + math.log(sampling.min_p)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
