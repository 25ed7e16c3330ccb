"""The latent rollout: one walk over a schedule of language and latent spans.

A language span is one parallel pass over its tokens. A latent span makes thoughts one after the other
(`coconut.latent.thoughts`). Both attend to the segments left so far, and leave a segment of their own.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from coconut.latent.feedback import Feedback, Identity, prepare
from coconut.latent.thoughts import Past, Place, think, think_sequentially, trunk
from coconut.models.cache import Segment
from coconut.models.decoder import Decoder
from coconut.models.layers import Dropout, take_columns
from coconut.types import Batch, CoconutError, Language, Latent, ModelOutput, Schedule, Span

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
    lengths = [span.length for span in schedule]
    read = lengths if every_hidden else [_number_read(span) for span in schedule]
    decoders = [decoder] * len(schedule)
    if gradient == "implicit" and len(schedule) > 1:
        decoders = decoder.lend(tokens.shape[0], lengths, read)
    past: Past = ()
    last = jnp.zeros_like(embedded[:, 0])
    hiddens, predictors, thoughts = [], [], []
    start = 0
    for span, number_read, borrower in zip(schedule, read, decoders, strict=True):
        end = start + span.length
        place = Place(positions[:, start:end], valid[:, start:end], jnp.arange(start, end))
        if dropout is not None:
            place = Place(
                place.positions, place.valid, place.columns, Dropout(dropout.key, place.columns, T, dropout.rate)
            )
        if isinstance(span, Latent):
            make = think if gradient == "implicit" else think_sequentially
            made, hidden, layers = make(borrower, feedback, past, last, place)
            thoughts.append(made)
            last = last_valid(hidden, place.valid, last)
        elif number_read < span.length:
            hidden, layers = trunk(borrower, embedded[:, start:end], place, past, _columns_read(span, place.valid))
            predictors.append(hidden[:, :-1])
            last = jnp.where(place.valid.any(1)[:, None], hidden[:, -1], last)
        else:
            hidden, layers = trunk(borrower, embedded[:, start:end], place, past)
            # What predicts the first column of a span stands before the span.
            before = jnp.concatenate([last[:, None], hidden[:, :-1]], 1)
            predictors.append(before[:, span.length - span.scored :])
            last = last_valid(hidden, place.valid, last)
        past = (*past, Segment(layers, place.valid, place.columns))
        hiddens.append(hidden)
        start = end
    return ModelOutput(
        hidden=jnp.concatenate(hiddens, 1) if every_hidden else None,
        predictors=jnp.concatenate(predictors, 1),
        thoughts=tuple(thoughts),
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


def _number_read(span: Span) -> int:
    """Columns of a span whose hidden states somebody reads: of language those that predict, and the last valid one."""
    return min(span.length, span.scored + 1) if isinstance(span, Language) else span.length


def _columns_read(span: Language, valid: Bool[Array, "B T"]) -> Int[Array, "B W"]:
    """The columns that predict the scored ones, in order, and each row's last valid one."""
    predicting = jnp.arange(span.length - 1 - span.scored, span.length - 1)
    predicting = jnp.broadcast_to(predicting, (valid.shape[0], span.scored))
    return jnp.concatenate([predicting, last_valid_column(valid)[:, None]], 1)
