"""The latent rollout: one walk over a schedule of language and latent spans.

A language span is one parallel pass over its tokens. A latent span makes thoughts one after the other
(`coconut.latent.thoughts`) or in sweeps over all of them (`coconut.latent.thinkers`); what makes them last runs with
the language that follows. All passes attend to the segments left so far, and leave a segment of their own.

A row may hold several examples (`coconut.packing`): `coconut.latent.packed` says how they are kept apart.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key

from coconut.errors import CoconutError
from coconut.latent.feedback import Feedback, Identity, with_constants
from coconut.latent.packed import columns_before, last_of_each, states_before, think_of_each
from coconut.latent.thinkers import OneByOne, Sweeps, Thinker
from coconut.latent.thoughts import (
    Past,
    Place,
    check_positions,
    feed_back,
    observe,
    think_implicitly,
    think_sequentially,
)
from coconut.models.cache import Segment
from coconut.models.decoder import Decoder
from coconut.models.dropout import Dropout, RowMasks
from coconut.models.layers import take_columns
from coconut.models.segment_attention import choose_attention
from coconut.sharding import constrain
from coconut.types import Batch, Language, Latent, ModelOutput, Schedule


def rollout(
    decoder: Decoder,
    schedule: Schedule,
    *,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    feedback: Feedback = Identity(),  # noqa: B008 - immutable
    think: Thinker = OneByOne(),  # noqa: B008 - immutable
    keys: Key[Array, " B"] | None = None,
    dropout_key: Key[Array, ""] | None = None,
    masks: RowMasks | None = None,
    every_hidden: bool = False,
    observed: Int[Array, "B O"] | None = None,
    members: Int[Array, "B T"] | None = None,
    examples_per_row: int | None = None,
) -> ModelOutput:
    """Walks ``schedule`` once.

    Rows may use fewer columns than a span has, or none: the others are masked by ``valid``, and the result of each row
    equals that of the row alone, unpadded. In a latent span a row uses columns from the left.

    Args:
      decoder: the decoder.
      schedule: spans whose lengths sum to ``T``. Static under jit.
      tokens: token ids. Those of latent columns are read by `Sweeps` alone, as what the columns hold at first.
      positions: position of each column in its row. With learned positions those of valid columns must be below
        ``DecoderConfig.max_positions``: behind their table a row's states are NaN. Traced positions cannot be looked
        at, and how many of ``T`` columns are padding is data; `coconut.training` and `coconut.evaluation` look at
        the data before.
      valid: columns that belong to the row.
      feedback: how a hidden state becomes the next thought.
      think: how the thoughts of a span are made. Static under jit.
      keys: a key for each row, for feedbacks that draw (`feed_back`).
      dropout_key: key of the decoder's dropout; None applies none.
      masks: in its place, the masks that a policy draws for each row (`coconut.latent.policies`).
      every_hidden: return the hidden states of all columns, too. Without it the last layer leaves out what nobody
        reads (`Decoder.observe`).
      observed: columns of each row whose states between the layers are returned, too. They must hold language; those
        of thoughts and of no column (-1) are zero.
      members: which of its row's examples each column belongs to, where rows hold several (`Batch.members`). The
        result of each example then equals that of the example alone.
      examples_per_row: how many examples a row holds, where there are ``members``.

    Raises:
      CoconutError: the schedule does not fit ``T``, or starts with a latent span; or, outside of jit, a position of a
        valid column is behind a learned table. For rows of several examples: thoughts made in sweeps, keys or masks of
        rows, attention by a kernel that was asked for, or a latent span that does not make a thought of each together.
    """
    T = tokens.shape[1]
    if sum(span.length for span in schedule) != T or not isinstance(schedule[0], Language):
        raise CoconutError(f"the schedule {schedule} must start with language and have {T} columns, as the tokens do")
    if not isinstance(positions, Tracer) and not isinstance(valid, Tracer):
        check_positions(decoder, int(np.max(np.where(valid, positions, -1))) + 1, "the valid columns")
    dropout: Dropout | RowMasks | None = masks
    if masks is None and dropout_key is not None and decoder.drops:
        dropout = Dropout(dropout_key, jnp.arange(T), T, decoder.config.dropout)
    if members is not None:
        _check_packed(schedule, think, examples_per_row, drawn=keys is not None or masks is not None)
        decoder = decoder.by_masks()
    # One look-up for all spans: each one of its own would add a gradient of the whole table's size.
    embedded = decoder.embed(tokens)
    return walk(
        decoder,
        with_constants(feedback, decoder),
        schedule,
        embedded=embedded,
        place=Place(positions, valid, jnp.arange(T), dropout, keys, members),
        past=(),
        last=jnp.zeros_like(
            embedded, shape=(len(tokens), *(() if members is None else (examples_per_row,)), embedded.shape[-1])
        ),
        think=think,
        every_hidden=every_hidden,
        observed=observed,
    )


def rollout_batch(
    decoder: Decoder,
    feedback: Feedback,
    batch: Batch,
    dropout_key: Key[Array, ""] | None = None,
    *,
    think: Thinker = OneByOne(),  # noqa: B008 - immutable
    keys: Key[Array, " B"] | None = None,
    masks: RowMasks | None = None,
    every_hidden: bool = False,
    observed: Int[Array, "B O"] | None = None,
) -> ModelOutput:
    """`rollout` over the columns of a batch, by its own schedule."""
    return rollout(
        decoder,
        batch.schedule,
        tokens=batch.tokens,
        positions=batch.positions,
        valid=batch.valid,
        feedback=feedback,
        think=think,
        keys=keys,
        dropout_key=dropout_key,
        masks=masks,
        every_hidden=every_hidden,
        observed=observed,
        members=batch.members,
        examples_per_row=batch.examples_per_row,
    )


def walk(
    decoder: Decoder,
    feedback: Feedback,
    schedule: Schedule,
    *,
    embedded: Float[Array, "B T D"],
    place: Place,
    past: Past,
    last: Float[Array, "B *G D"],
    think: Thinker,
    every_hidden: bool = False,
    observed: Int[Array, "B O"] | None = None,
) -> ModelOutput:
    """`rollout` behind what came before.

    Args:
      decoder: the decoder.
      feedback: how a hidden state becomes the next thought, as `with_constants` returns it.
      schedule: the spans.
      embedded: token embeddings.
      place: where the columns stand.
      past: the segments before.
      last: hidden state of each row's last column before; of each example's, where a row holds several.
      think: how the thoughts of a span are made.
      every_hidden: see `rollout`.
      observed: see `rollout`; counted from the first of these columns.
    """
    passes = _passes(schedule, think, join=choose_attention(decoder.config, decoder.execution) == "dense")
    B, number_observed = len(last), 0 if observed is None else observed.shape[1]
    # Examples of a row that have thoughts made one by one do so as rows of their own.
    examples = 1 if place.members is None else last.shape[1]
    rows = [B * examples if one.one_by_one else B for one in passes]
    lengths = [(one.end - one.start) * B // n for one, n in zip(passes, rows, strict=True)]
    wanted = lengths
    if not every_hidden:
        wanted = [one.wanted(length, examples, number_observed) for one, length in zip(passes, lengths, strict=True)]
    decoders = [decoder] * len(passes)
    if think != OneByOne(gradient="autodiff") and len(passes) > 1:
        decoders = decoder.lend(rows, lengths, wanted, drops=place.dropout is not None)
    # States of the columns behind ``last``, of which the next pass makes further thoughts.
    following = embedded[:, :0]
    hiddens, predictors, thoughts, states = [], [], [], []
    for one, length, number_wanted, borrower in zip(passes, lengths, wanted, decoders, strict=True):
        here = place.part(one.start, one.end)
        if one.one_by_one:
            make = think_implicitly if think == OneByOne() else think_sequentially
            if here.members is None:
                made, hidden, key_values = make(borrower, feedback, past, last, here)
                last = last_valid(hidden, here.valid, last)
            else:
                made, hidden, key_values = think_of_each(make, borrower, feedback, past, last, here)
                last = last_of_each(hidden, here, last)
        else:
            inputs, latent = embedded[:, one.start : one.end], here.part(0, one.latent)
            if think == Sweeps(count=0):
                made = jnp.where(latent.valid[..., None], inputs[:, : one.latent], 0.0)
            else:
                before = last if here.members is not None else last[:, None]
                before = jnp.concatenate([before, following], 1)[:, : one.latent]
                # They come from a pass of one column, maybe, and join one whose columns a mesh may split.
                made = constrain(feed_back(feedback, decoder, before, latent), "rows", "columns", "features")
                inputs = jnp.concatenate([made, inputs[:, one.latent :]], 1)
            number = one.scored + examples
            if here.members is None:
                predicting, before = _columns_before(here.valid[:, : one.kept], number), last[:, None]
            else:
                of = here.members[:, : one.kept]
                predicting = columns_before(here.valid[:, : one.kept], of, one.scored, examples)
                before = states_before(last, of, one.scored)
            columns = jnp.maximum(predicting, 0)
            within = jnp.zeros((len(last), 0), jnp.int32) if observed is None else observed - one.start
            watched = jnp.clip(within, 0, length - 1)
            if number_wanted < length:
                behind = jnp.broadcast_to(jnp.arange(one.kept, length), (len(last), length - one.kept))
                columns = jnp.concatenate([columns, behind], 1)
                hidden, key_values, between = observe(borrower, inputs, here, past, watched, columns)
                ends, following = hidden[:, :number], hidden[:, number:]
            else:
                hidden, key_values, between = observe(borrower, inputs, here, past, watched)
                ends, following = take_columns(hidden, columns), hidden[:, one.kept :]
            if observed is not None:
                is_here = (within >= one.latent) & (within < one.kept)
                states.append(jnp.where(is_here[..., None], between, 0.0))
            # What predicts the first column of a pass, or follows where a row has none in it, stands before the pass.
            ends = jnp.where(predicting[..., None] >= 0, ends, before)
            predictors.append(ends[:, : one.scored])
            last = ends[:, -1] if here.members is None else ends[:, one.scored :]
        if one.kept:
            key_values = jax.tree.map(lambda x, kept=one.kept: x[..., :kept, :], key_values)
            kept = here.part(0, one.kept)
            past = (*past, Segment(key_values, kept.valid, kept.columns, kept.members))
            hiddens.append(hidden[:, : one.kept])
            thoughts.append(made)
    ends = np.cumsum([span.length for span in schedule if isinstance(span, Latent)])
    return ModelOutput(
        hidden=jnp.concatenate(hiddens, 1) if every_hidden else None,
        predictors=jnp.concatenate(predictors, 1),
        thoughts=tuple(jnp.split(jnp.concatenate(thoughts, 1), ends[:-1], axis=1)) if len(ends) else (),
        past=past,
        last=last,
        states=functools.reduce(jnp.add, states) if states else None,
    )


def last_valid(
    hidden: Float[Array, "B T D"], valid: Bool[Array, "B T"], otherwise: Float[Array, "B D"]
) -> Float[Array, "B D"]:
    """The hidden state of each row's last valid column, or ``otherwise`` where a row has none."""
    found = take_columns(hidden, last_valid_column(valid)[:, None])[:, 0]
    return jnp.where(valid.any(1)[:, None], found, otherwise)


def last_valid_column(valid: Bool[Array, "B T"]) -> Int[Array, " B"]:
    """The last valid column of each row; 0 where a row has none."""
    return jnp.max(jnp.where(valid, jnp.arange(valid.shape[1]), 0), axis=1)


def _columns_before(valid: Bool[Array, "B T"], number: int) -> Int[Array, "B W"]:
    """The last valid column before each of the last ``number - 1`` columns, and before the end; -1 where is none."""
    last = jax.lax.cummax(jnp.where(valid, jnp.arange(valid.shape[1]), -1), axis=1)
    return jnp.pad(last, ((0, 0), (1, 0)), constant_values=-1)[:, valid.shape[1] + 1 - number :]


def _check_packed(schedule: Schedule, think: Thinker, examples: int | None, *, drawn: bool) -> None:
    """Refuses what rows of several examples cannot have."""
    if isinstance(think, Sweeps) and think.count:
        raise CoconutError(f"{think}: the thoughts of rows of several examples are made one by one, not in sweeps")
    if drawn:
        raise CoconutError(
            "rows of several examples have no keys of their own: neither thoughts nor masks can be drawn"
        )
    if any(span.together != examples for span in schedule if isinstance(span, Latent)):
        raise CoconutError(
            f"the schedule {schedule}: a latent span of rows of {examples} examples makes as many together"
        )


class _Pass(NamedTuple):
    """Columns that the decoder runs over together, or thoughts that it makes one after the other.

    Attributes:
      start: the first column.
      end: the column behind the last one.
      kept: how many of its columns, from the first, later passes look back on. Those behind them belong to a latent
        span, and are run again by the next pass on the thoughts that their states make.
      latent: how many of its columns, from the first, hold thoughts.
      scored: how many of the columns kept, from the last, may carry a label.
      one_by_one: whether the decoder runs over one column at a time.
    """

    start: int
    end: int
    kept: int
    latent: int = 0
    scored: int = 0
    one_by_one: bool = False

    def wanted(self, length: int, examples: int, observed: int) -> int:
        """Columns whose last states are wanted of those that a row of the pass has, ``length``.

        They are what predicts, the last one kept of each example of a row, all not kept, and those observed.
        """
        return length if self.one_by_one else min(length, self.scored + examples + length - self.kept + observed)


def _passes(schedule: Schedule, think: Thinker, *, join: bool) -> list[_Pass]:
    """What a schedule is run in.

    What makes the last thoughts of a span runs in parallel with the language that follows: nothing else is made of
    them. So ``K`` thoughts one by one take ``K - 1`` passes one after the other. Sweeps start in parallel with the
    language before.

    Args:
      schedule: the spans.
      think: how thoughts are made.
      join: whether several thoughts may share a pass with language. A row that uses a part of them has a gap there,
        which the kernels do not take (`coconut.models.segment_attention`).
    """
    passes, start, waiting = [], 0, 0
    for before, span, following in zip((None, *schedule), schedule, (*schedule[1:], None), strict=False):
        end, length = start + span.length, span.length
        if isinstance(span, Language):
            opened = 0
            if join and isinstance(following, Latent) and isinstance(think, Sweeps) and think.count:
                opened = following.length - 1  # Of the last column's state no thought is made.
            passes.append(_Pass(start - waiting, end + opened, waiting + length, waiting, span.scored))
            waiting = 0
        elif isinstance(think, OneByOne):
            waiting = span.together if isinstance(following, Language) else 0
            if length > waiting:
                passes.append(_Pass(start, end - waiting, length - waiting, length - waiting, one_by_one=True))
        else:
            if length > 1 and think.count:
                if not (join and isinstance(before, Language)):
                    passes.append(_Pass(start, end - 1, 0))
                passes += [_Pass(start, end - 1, 0, length - 1)] * (think.needed(length) - 1)
            waiting = length if join and isinstance(following, Language) else 0
            if not waiting:
                passes.append(_Pass(start, end, length, length))
        start = end
    return passes
