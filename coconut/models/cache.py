"""What later columns may look back on.

A pass of the decoder attends to itself and to any number of segments that earlier passes left. Segments are never
joined: the softmax runs over all of them (`coconut.models.attention.attend`), so that a thought does not copy the
prompt's keys and values, and a gradient to the prompt is formed once.
"""

import dataclasses
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coconut.sharding import constrain


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values, cotangents and shardings
@dataclasses.dataclass(frozen=True)
class KeyValue:
    """Keys and values of one layer, or of all layers where the arrays have a leading layer axis."""

    keys: Float[Array, "*L B M C H"]
    values: Float[Array, "*L B M C H"]


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values, cotangents and shardings
@dataclasses.dataclass(frozen=True)
class Segment:
    """The columns one pass left behind.

    Attributes:
      layers: a `KeyValue` with a leading layer axis where the decoder scans its layers, else a tuple of one
        `KeyValue` a layer.
      valid: which columns may be attended to.
      columns: index of each column in the whole sequence (dropout draws its masks by column).
    """

    layers: Any
    valid: Bool[Array, "B C"]
    columns: Int[Array, " C"]


def write(room: KeyValue, new: KeyValue, start: Int[Array, ""] | int) -> KeyValue:
    """Puts the columns of ``new`` into those of one layer that were made for them.

    Args:
      room: keys and values of one layer.
      new: those of the new columns.
      start: first column to write, counted in ``room``. Data, not a recompile.
    """

    def put(old: Array, update: Array) -> Array:
        written = jax.lax.dynamic_update_slice_in_dim(old, update.astype(old.dtype), start, axis=2)
        return constrain(written, "rows", "kv_heads", "past", "head")

    return jax.tree.map(put, room, new)


def empty_segment(layers: Any, batch: int, columns: Int[Array, " C"]) -> Segment:
    """A segment with room for ``C`` columns, none of them valid yet.

    Args:
      layers: keys and values of any length, or their `jax.eval_shape`, for layout, heads and dtype.
      batch: ``B``.
      columns: index of each column in the whole sequence.
    """
    room = len(columns)
    zeros = jax.tree.map(lambda x: jnp.zeros((*x.shape[:-2], room, x.shape[-1]), x.dtype), layers)
    return Segment(zeros, jnp.zeros((batch, room), bool), columns)
