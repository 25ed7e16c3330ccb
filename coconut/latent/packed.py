"""Rows of several examples (`coconut.packing`) in a rollout: how the examples of a row are kept apart.

A language span is one pass over the row, in which a column sees columns of its own example alone
(`coconut.models.visibility`). Thoughts are made in passes of one column of every example at once. There each example is
a row of its own: it has thoughts of its own to look back on, and shares with the others of its row what the row's
earlier passes left, of which it sees its own columns (`coconut.models.cache.Segment`). So thoughts, and the gradient
through them, are made as those of rows that hold one example; nothing of the row is copied.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coconut.latent.feedback import Feedback
from coconut.latent.thoughts import LatentSpan, Past, Place
from coconut.models.cache import LayerCache, Segment, of_layers
from coconut.models.decoder import Decoder
from coconut.models.layers import take_columns

Make = Callable[[Decoder, Feedback, Past, Float[Array, "B D"], Place], LatentSpan]


def think_of_each(
    make: Make, decoder: Decoder, feedback: Feedback, past: Past, last: Float[Array, "B G D"], place: Place
) -> LatentSpan:
    """Makes the thoughts of every example of every row.

    Args:
      make: `think_sequentially` or `think_implicitly`.
      decoder: the decoder.
      feedback: how a hidden state becomes the next thought.
      past: segments before the span, whose columns have members.
      last: hidden state of each example's last column before the span.
      place: the span's ``K G`` columns: one of each example of a row, then the next one of each, and so on.

    Returns:
      What the span leaves, by rows: ``K G`` columns in the order of ``place``.
    """
    B, examples, _ = last.shape
    seen = tuple(segment_of_each(segment, examples) for segment in past)
    span = make(decoder, feedback, seen, last.reshape(B * examples, -1), place_of_each(place, examples))

    def by_row(x: Array) -> Array:
        return x.reshape(B, examples, *x.shape[1:]).swapaxes(1, 2).reshape(B, -1, x.shape[-1])

    return LatentSpan(by_row(span.thoughts), by_row(span.hidden), key_values_by_row(span.key_values, examples))


def last_of_each(
    hidden: Float[Array, "B T D"], place: Place, otherwise: Float[Array, "B G D"]
) -> Float[Array, "B G D"]:
    """The hidden state of each example's last valid column, or ``otherwise`` where it has none."""
    assert place.members is not None
    ends = columns_before(place.valid, place.members, 0, otherwise.shape[1])
    return jnp.where(ends[..., None] >= 0, take_columns(hidden, jnp.maximum(ends, 0)), otherwise)


def place_of_each(place: Place, examples: int) -> Place:
    """The columns of a latent span as rows of one example each: ``[B, K G]`` as ``[B G, K]``.

    Args:
      place: one column of each example of a row, then the next one of each, and so on.
      examples: ``G``.
    """

    def of_each(x: Array) -> Array:
        return x.reshape(len(x), -1, examples).swapaxes(1, 2).reshape(len(x) * examples, -1)

    # Each a number of its own, which is what dropout asks for; those of the other examples differ by their rows.
    columns = place.columns[::examples]
    dropout = None if place.dropout is None else dataclasses.replace(place.dropout, columns=columns)
    return Place(of_each(place.positions), of_each(place.valid), columns, dropout)


def segment_of_each(segment: Segment, examples: int) -> Segment:
    """What each example of a row sees of a segment, whose keys and values they share."""
    assert segment.members is not None
    own = segment.valid[:, None] & (segment.members[:, None] == jnp.arange(examples)[:, None])
    return Segment(segment.key_values, own.reshape(-1, own.shape[-1]), segment.columns)


def key_values_by_row(key_values: Any, examples: int) -> Any:
    """What rows of one example each kept of ``K`` columns, as columns of the rows that hold ``G`` of them.

    Undoes the order of `place_of_each`.
    """

    def of_layer(kept: LayerCache) -> LayerCache:
        # The layers' axis may stand before the rows'.
        return jax.tree.map(lambda x: by_row(x, x.ndim - len(kept.AXES)), kept)

    def by_row(x: Array, axis: int) -> Array:
        x = x.reshape(*x.shape[:axis], -1, examples, *x.shape[axis + 1 :])
        x = jnp.moveaxis(x, axis + 1, -2)
        return x.reshape(*x.shape[:-3], -1, x.shape[-1])

    return of_layers(of_layer, key_values)


def columns_before(
    valid: Bool[Array, "B T"], members: Int[Array, "B T"], scored: int, examples: int
) -> Int[Array, "B _"]:
    """The last valid column of the same example before each scored one, and then the last one of each example.

    Args:
      valid: columns that belong to an example.
      members: which example of the row they belong to.
      scored: how many columns are scored, the last ones.
      examples: ``G``.

    Returns:
      ``[B, scored + G]``; -1 where there is none.
    """
    T = valid.shape[1]
    own = valid[:, None] & (members[:, None] == jnp.arange(examples)[:, None])
    last = jax.lax.cummax(jnp.where(own, jnp.arange(T), -1), axis=2)
    last = jnp.pad(last, ((0, 0), (0, 0), (1, 0)), constant_values=-1)
    of_scored = jnp.take_along_axis(last[:, :, T - scored : T], members[:, None, T - scored :], axis=1)[:, 0]
    return jnp.concatenate([of_scored, last[:, :, T]], 1)


def states_before(last: Float[Array, "B G D"], members: Int[Array, "B T"], scored: int) -> Float[Array, "B _ D"]:
    """For each column of `columns_before` the state of its example before the pass."""
    of_scored = take_columns(last, members[:, members.shape[1] - scored :])
    return jnp.concatenate([of_scored, last], 1)
