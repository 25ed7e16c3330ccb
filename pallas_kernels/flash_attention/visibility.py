"""Which keys a query may see: said once, for every implementation, whole arrays and blocks alike.

Columns count the keys. Query ``t`` of a row stands at column ``offset + t``; the row's keys are the columns
``[start, end)``. All functions broadcast, work on Python integers, arrays and kernel scalars, and stay in int32.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

NO_KEYS = -(2.0**100)
"""Log-normalizer of a query that sees no key: below that of any other, yet differences of two are finite."""

HIDDEN = -(2.0**127)
"""Score of a key that is not seen: its weight is exactly 0, even against `NO_KEYS`."""

Integers = Any  # int, a traced scalar or an array: whatever compares and adds.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is static about a call: another value is another program.

    Attributes:
      causal: no query sees a key of a later column than its own.
      window: with ``causal``, a query sees its own column and the ``window - 1`` before; None for all before.
      scale: factor of the scores.
      soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``; None for no cap.
    """

    causal: bool
    window: int | None
    scale: float
    soft_cap: float | None


class Rows(NamedTuple):
    """What differs between rows; data. Integer arrays of int32.

    Attributes:
      offset: ``[B]``, the column of a row's first query.
      start: ``[B]``, the first column that holds a key.
      end: ``[B]``, the column after the last key; at most ``S``.
      query_segments: ``[B, T]``, or None; a query sees keys of its own segment only.
      key_segments: ``[B, S]``, or None together with ``query_segments``.
    """

    offset: Any
    start: Any
    end: Any
    query_segments: Any = None
    key_segments: Any = None


def sees(options: Options, query: Integers, key: Integers, start: Integers, end: Integers) -> Any:
    """Whether the query at column ``query`` sees the key at column ``key``, segments aside."""
    seen = (key >= start) & (key < end)
    if options.causal:
        seen &= key <= query
    if options.window is not None:
        seen &= key > query - options.window
    return seen


def keys_seen(options: Options, first: Integers, last: Integers, start: Integers, end: Integers) -> tuple[Any, Any]:
    """Columns ``[low, high)`` outside which no query of the columns ``first`` to ``last`` sees a key."""
    low, high = start, end
    if options.causal:
        high = jnp.minimum(high, last + 1)
    if options.window is not None:
        low = jnp.maximum(low, first - options.window + 1)
    return low, high


def queries_seeing(options: Options, first: Integers, last: Integers, offset: Integers, length: int) -> tuple[Any, Any]:
    """Queries ``[low, high)`` of ``length`` outside which none sees a key of the columns ``first`` to ``last``."""
    low, high = jnp.int32(0), jnp.int32(length)
    if options.causal:
        low = jnp.maximum(low, first - offset)
    if options.window is not None:
        high = jnp.minimum(high, last - offset + options.window)
    return low, high


def all_seen(
    options: Options,
    queries: tuple[Integers, Integers],
    keys: tuple[Integers, Integers],
    start: Integers,
    end: Integers,
) -> Any:
    """Whether every query sees every key, each given by its first and last column; segments aside."""
    seen = (keys[0] >= start) & (keys[1] < end)
    if options.causal:
        seen &= keys[1] <= queries[0]
    if options.window is not None:
        seen &= keys[0] > queries[1] - options.window
    return seen


def blocks(low: Integers, high: Integers, size: int, count: int) -> tuple[Any, Any]:
    """Blocks ``[first, last)`` of ``size`` that hold the entries ``[low, high)``, within ``count``; may be empty."""
    # Neither bound is negative after this, so division truncates as it should.
    first = jnp.maximum(low, 0) // size
    last = jnp.minimum((jnp.maximum(high, 0) + size - 1) // size, count)
    return first, jnp.where(low < high, last, 0)
