"""What later columns may look back on.

A pass of the decoder attends to itself and to any number of segments that earlier passes left. Segments are never
joined: the softmax runs over all of them (`coconut.models.attention.attend`), so that a thought does not copy the
prompt's keys and values, and a gradient to the prompt is formed once.

What a layer keeps of a column is its mixer's own (`coconut.models.decoder_layer.MIXERS`): keys and values by heads, or
a latent vector. Whoever passes it on knows a `LayerCache` alone, whose columns lie on the last axis but one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, no_type_check

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from coconut.sharding import constrain

LOOKED_BACK = "looked_back"
"""The `jax.checkpoint` name of what a pass made by looking back on a `Filling`."""


class LayerCache:
    """What a mixer keeps of the columns of one layer, or of all layers where the arrays have a leading layer axis.

    A subclass is a dataclass of arrays that JAX knows as a pytree.

    Attributes:
      AXES: the logical axes (`coconut.sharding.RULES`) of each of its arrays in one layer. The first are the rows, the
        last but one the columns, which later passes see whole (``past``).
    """

    AXES: ClassVar[tuple[str, ...]]


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values, cotangents and shardings
@dataclasses.dataclass(frozen=True)
class KeyValue(LayerCache):
    """Keys and values by heads."""

    AXES = ("rows", "kv_heads", "past", "head")

    keys: Float[Array, "*L B M C H"]
    values: Float[Array, "*L B M C H"]


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values, cotangents and shardings
@dataclasses.dataclass(frozen=True)
class Filling:
    """Columns written one pass at a time, in a computation that is differentiated.

    To differentiate what a pass read, autodiff would keep the columns as they were then: a copy of all of them for each
    column. But a pass does not see what later ones write, so the columns as they are in the end serve as well. They
    come from the other side: as the cotangent of ``completed``, which whoever differentiates sets
    (`coconut.latent.thoughts`) and every pass hands on.

    Attributes:
      written: the columns, as far as they are written.
      completed: zeros of the same shapes.
    """

    written: LayerCache
    completed: LayerCache


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values, cotangents and shardings
@dataclasses.dataclass(frozen=True)
class Segment:
    """The columns one pass left behind.

    A segment may have fewer rows than what looks back on it: then each of its rows is shared by as many of these, which
    follow each other. The samples of one question share its prompt so, and nothing is copied.

    Attributes:
      key_values: a `LayerCache` with a leading layer axis where the decoder scans its layers, else a tuple of one
        `LayerCache` a layer; or a `Filling` in the place of each.
      valid: which columns may be attended to.
      columns: index of each column in the whole sequence (dropout draws its masks by column).
      members: which of its row's examples each column belongs to, where a row holds several (`Batch.members`); a column
        is looked back on by those of its own example alone. None where a row is one example.
    """

    key_values: Any
    valid: Bool[Array, "B C"]
    columns: Int[Array, " C"]
    members: Int[Array, "B C"] | None = None


def write(room: LayerCache | Filling, new: LayerCache, start: Int[Array, ""] | int) -> LayerCache | Filling:
    """Puts the columns of ``new`` into those of one layer that were made for them.

    Args:
      room: what one layer keeps.
      new: what it keeps of the new columns, of the same kind.
      start: first column to write, counted in ``room``. Data, not a recompile.
    """

    def put(old: Array, update: Array) -> Array:
        written = jax.lax.dynamic_update_slice_in_dim(old, update.astype(old.dtype), start, axis=old.ndim - 2)
        return constrain(written, *new.AXES)

    if isinstance(room, Filling):
        return dataclasses.replace(room, written=jax.tree.map(put, room.written, new))
    return jax.tree.map(put, room, new)


def look_back(function: Callable[[Any, Any], Any], x: Any, columns: LayerCache | Filling) -> tuple[Any, Any]:
    """``function(x, columns)``, and the columns from there on: a `Filling` is looked back on by this alone.

    Args:
      function: what is made of the columns. Columns that are not written yet must have no part in its derivatives.
      x: its other arguments.
      columns: what one layer keeps of them.
    """
    if not isinstance(columns, Filling):
        return function(x, columns), columns
    y, completed = _look_back(function, x, columns.written, columns.completed)
    # Not to be made again by `jax.checkpoint`, which would keep what is written so far for it.
    return checkpoint_name(y, LOOKED_BACK), dataclasses.replace(columns, completed=completed)


def _look_back_written(
    function: Callable[[Any, LayerCache], Any], x: Any, written: LayerCache, completed: LayerCache
) -> tuple[Any, LayerCache]:
    return function(x, written), completed


_look_back = jax.custom_vjp(_look_back_written, nondiff_argnums=(0,))


def _look_back_forward(
    function: Callable[[Any, LayerCache], Any], x: Any, written: LayerCache, completed: LayerCache
) -> tuple[tuple[Any, LayerCache], Any]:
    return (function(x, written), completed), x


def _look_back_backward(
    function: Callable[[Any, LayerCache], Any], x: Any, cotangents: tuple[Any, LayerCache]
) -> tuple[Any, LayerCache, LayerCache]:
    of_result, completed = cotangents
    _, pull_back = jax.vjp(function, x, completed)
    to_x, to_written = pull_back(of_result)
    return to_x, to_written, completed


_look_back.defvjp(_look_back_forward, _look_back_backward)


def empty_segment(key_values: Any, batch: int, columns: Int[Array, " C"]) -> Segment:
    """A segment with room for ``C`` columns, none of them valid yet.

    Args:
      key_values: those of a segment of any length, or their `jax.eval_shape`, for layout and dtype.
      batch: ``B``.
      columns: index of each column in the whole sequence.
    """
    room = len(columns)
    zeros = jax.tree.map(lambda x: jnp.zeros((*x.shape[:-2], room, x.shape[-1]), x.dtype), key_values)
    return Segment(zeros, jnp.zeros((batch, room), bool), columns)


def of_layers(function: Callable[..., Any], *key_values: Any) -> Any:
    """``function`` of what each layer keeps, in the layout of `Segment.key_values`."""
    return jax.tree.map(function, *key_values, is_leaf=lambda x: isinstance(x, LayerCache | Filling))


def take_rows(segment: Segment, rows: Int[Array, " B"]) -> Segment:
    """The segment of other rows, each a copy of one there is."""

    def of_layer(kept: LayerCache) -> LayerCache:
        # The layers' axis may stand before the rows'.
        return jax.tree.map(lambda x: jnp.take(x, rows, axis=x.ndim - len(kept.AXES)), kept)

    valid = jnp.take(segment.valid, rows, axis=0)
    return dataclasses.replace(segment, key_values=of_layers(of_layer, segment.key_values), valid=valid)
