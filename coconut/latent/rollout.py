"""The latent rollout: one walk over a schedule of language and latent spans.

A language span is one parallel pass over its tokens. A latent span makes thoughts one after the other
(`coconut.latent.thoughts`), the last of which is run with the language that follows. All passes attend to the segments
left so far, and leave a segment of their own.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from coconut.errors import CoconutError
from coconut.latent.feedback import Feedback, Identity, prepare
from coconut.latent.thoughts import Past, Place, think, think_sequentially, trunk, unless_unused
from coconut.models.cache import Segment
from coconut.models.decoder import Decoder
from coconut.models.layers import Dropout, take_columns
from coconut.sharding import constrain
from coconut.types import Batch, Language, Latent, ModelOutput, Schedule

Gradient = Literal["implicit", "autodiff"]


def rollout(
    decoder: Decoder,
    schedule: Schedule,
    *,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    feedback: Feedback = Identity(),  # noqa: B008 - immutable
    gradient: Gradient = "implicit",
    dropout_key: Key[Array, ""] | None = None,
    every_hidden: bool = False,
) -> ModelOutput:
    """Walks ``schedule`` once.

    Rows may use fewer columns than a span has: the others are masked by ``valid``, and the result of each row equals
    that of the row alone, unpadded. In a latent span a row uses columns from the left.

    Args:
      decoder: the decoder.
      schedule: spans whose lengths sum to ``T``. Static under jit.
      tokens: token ids; those of latent columns are not read.
      positions: position of each column in its row.
      valid: columns that belong to the row.
      feedback: how a hidden state becomes the next thought.
      gradient: ``implicit`` (`coconut.latent.thoughts`) or ``autodiff``, JAX's own derivative of the scan. They are
        equal up to rounding.
      dropout_key: key of the decoder's dropout; None applies none.
      every_hidden: return the hidden states of all columns, too. Without it the last layer leaves out what nobody
        reads (`Decoder.trunk`).

    Raises:
      CoconutError: the schedule does not fit ``T``, or starts with a latent span.
    """
    T = tokens.shape[1]
    if sum(span.length for span in schedule) != T or not isinstance(schedule[0], Language):
        raise CoconutError(f"the schedule {schedule} must start with language and have {T} columns, as the tokens do")
    dropout = None
    if dropout_key is not None and decoder.config.dropout > 0:
        dropout = Dropout(dropout_key, jnp.arange(T), T, decoder.config.dropout)
    # One look-up for all spans: each one of its own would add a gradient of the whole table's size.
    embedded = decoder.embed(tokens)
    feedback = prepare(feedback, decoder)
    passes = _passes(schedule)
    lengths = [step.end - step.start for step in passes]
    read = lengths if every_hidden else [_number_read(step) for step in passes]
    decoders = [decoder] * len(passes)
    if gradient == "implicit" and len(passes) > 1:
        decoders = decoder.lend(tokens.shape[0], lengths, read)
    past: Past = ()
    last = jnp.zeros_like(embedded[:, 0])
    hiddens, predictors, thoughts = [], [], []
    for step, length, number_read, borrower in zip(passes, lengths, read, decoders, strict=True):
        columns = slice(step.start, step.end)
        place = Place(positions[:, columns], valid[:, columns], jnp.arange(step.start, step.end))
        if dropout is not None:
            place = dataclasses.replace(place, dropout=dataclasses.replace(dropout, columns=place.columns))
        if step.scored is None:
            make = think if gradient == "implicit" else think_sequentially
            made, hidden, layers = make(borrower, feedback, past, last, place)
            thoughts.append(made)
            last = last_valid(hidden, place.valid, last)
        else:
            inputs = embedded[:, columns]
            if step.starts_with_thought:
                thought = unless_unused(feedback(decoder, last), place.valid[:, 0])[:, None]
                # It comes from a pass of one column, and joins one whose columns a mesh may split.
                thoughts.append(constrain(thought, "rows", "columns", "features"))
                inputs = jnp.concatenate([thoughts[-1], inputs[:, 1:]], 1)
            if number_read < length:
                hidden, layers = trunk(borrower, inputs, place, past, _columns_read(step, place.valid))
                predictors.append(hidden[:, :-1])
                last = jnp.where(place.valid.any(1)[:, None], hidden[:, -1], last)
            else:
                hidden, layers = trunk(borrower, inputs, place, past)
                if step.starts_with_thought:  # A row that has not this thought goes on from what came before.
                    unused = (jnp.arange(length) == 0) & ~place.valid[:, :1]
                    hidden = jnp.where(unused[..., None], last[:, None], hidden)
                # What predicts the first column of a span stands before the span.
                before = jnp.concatenate([last[:, None], hidden[:, :-1]], 1)
                predictors.append(before[:, length - step.scored :])
                last = last_valid(hidden, place.valid, last)
        past = (*past, Segment(layers, place.valid, place.columns))
        hiddens.append(hidden)
    ends = np.cumsum([span.length for span in schedule if isinstance(span, Latent)])
    return ModelOutput(
        hidden=jnp.concatenate(hiddens, 1) if every_hidden else None,
        predictors=jnp.concatenate(predictors, 1),
        thoughts=tuple(jnp.split(jnp.concatenate(thoughts, 1), ends[:-1], axis=1)) if thoughts else (),
        past=past,
        last=last,
    )


def rollout_batch(
    decoder: Decoder, feedback: Feedback, batch: Batch, dropout_key: Key[Array, ""] | None = None
) -> ModelOutput:
    """`rollout` over the columns of a batch, by its own schedule."""
    return rollout(
        decoder,
        batch.schedule,
        tokens=batch.tokens,
        positions=batch.positions,
        valid=batch.valid,
        feedback=feedback,
        dropout_key=dropout_key,
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


class _Pass(NamedTuple):
    """Columns that the decoder runs over together, or thoughts that it makes one after the other.

    Attributes:
      start: the first column.
      end: the column behind the last one.
      scored: of a language span, how many of the last columns may carry a label; None for thoughts.
      starts_with_thought: whether the first column is the last thought of the span before.
    """

    start: int
    end: int
    scored: int | None
    starts_with_thought: bool


def _passes(schedule: Schedule) -> list[_Pass]:
    """What a schedule is run in.

    Nothing is made of the last thought of a span but language: it runs in parallel with the language that follows, so
    that ``K`` thoughts take ``K - 1`` passes one after the other.
    """
    passes, start, joined = [], 0, 0
    for span, following in zip(schedule, (*schedule[1:], None), strict=True):
        end = start + span.length
        if isinstance(span, Language):
            passes.append(_Pass(start - joined, end, span.scored, bool(joined)))
            joined = 0
        else:
            joined = int(isinstance(following, Language))
            if span.length > joined:
                passes.append(_Pass(start, end - joined, None, False))
        start = end
    return passes


def _number_read(step: _Pass) -> int:
    """Columns of a pass whose hidden states somebody reads: of language those that predict, and the last valid one."""
    length = step.end - step.start
    return length if step.scored is None else min(length, step.scored + 1)


def _columns_read(step: _Pass, valid: Bool[Array, "B T"]) -> Int[Array, "B W"]:
    """The columns that predict the scored ones, in order, and each row's last valid one."""
    assert step.scored is not None
    batch, length = valid.shape
    predicting = jnp.broadcast_to(jnp.arange(length - 1 - step.scored, length - 1), (batch, step.scored))
    return jnp.concatenate([predicting, last_valid_column(valid)[:, None]], 1)
