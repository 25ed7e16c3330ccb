"""How the TPU kernels cut queries and keys into blocks, and which blocks meet at a step of their grid."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.flash_attention.visibility import Options, Rows, all_seen, blocks, keys_seen, queries_seeing

BLOCK = 512
"""Most queries and keys of a block."""

LANES, SUBLANES = 128, 16
"""Columns and rows of a tile of bfloat16; float32 has 8 rows."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How queries and keys are cut, and which blocks meet. ``T`` and ``S`` count real queries and keys."""

    options: Options
    T: int
    S: int
    query_size: int
    key_size: int

    @property
    def query_blocks(self) -> int:
        """How many blocks of queries there are; the last may reach beyond ``T``."""
        return pl.cdiv(self.T, self.query_size)

    @property
    def key_blocks(self) -> int:
        """How many blocks of keys there are; the last may reach beyond ``S``."""
        return pl.cdiv(self.S, self.key_size)

    @property
    def key_steps(self) -> int:
        """Most blocks of keys that a block of queries sees."""
        return self._steps(self.key_blocks, self.key_size, self.query_size)

    @property
    def query_steps(self) -> int:
        """Most blocks of queries that see a block of keys."""
        return self._steps(self.query_blocks, self.query_size, self.key_size)

    def _steps(self, count: int, size: int, other: int) -> int:
        window = self.options.window
        return count if window is None else min(count, pl.cdiv(other + window - 2, size) + 1)

    def query_columns(self, i: Any, offset: Any) -> tuple[Any, Any]:
        """First and last column of a block of queries."""
        first = offset + i * self.query_size
        return first, first + self.query_size - 1

    def key_columns(self, j: Any) -> tuple[Any, Any]:
        """First and last column of a block of keys."""
        return j * self.key_size, (j + 1) * self.key_size - 1

    def key_block(self, i: Any, step: Any, offset: Any, start: Any, end: Any) -> tuple[Any, Any]:
        """The block of keys that queries ``i`` meet at a step, and whether they see any of it."""
        low, high = keys_seen(self.options, *self.query_columns(i, offset), start, end)
        return _at_step(*blocks(low, high, self.key_size, self.key_blocks), step)

    def query_block(self, j: Any, step: Any, offset: Any, start: Any, end: Any) -> tuple[Any, Any]:
        """The block of queries that keys ``j`` meet at a step, and whether it sees any of them."""
        first, last = self.key_columns(j)
        first, last = jnp.maximum(first, start), jnp.minimum(last, end - 1)
        low, high = queries_seeing(self.options, first, last, offset, self.T)
        high = jnp.where(first <= last, high, 0)
        return _at_step(*blocks(low, high, self.query_size, self.query_blocks), step)

    def unmasked(self, i: Any, j: Any, offset: Any, start: Any, end: Any) -> Any:
        """Whether blocks ``i`` and ``j`` need no mask, neither of keys nor of queries beyond the last."""
        seen = all_seen(self.options, self.query_columns(i, offset), self.key_columns(j), start, end)
        return seen & ((i + 1) * self.query_size <= self.T)


def _at_step(first: Any, last: Any, step: Any) -> tuple[Any, Any]:
    return jnp.clip(first + step, 0, jnp.maximum(last - 1, 0)), first + step < last


def cut_blocks(T: int, S: int, options: Options) -> Blocks:
    """Blocks for ``T`` queries and ``S`` keys."""
    return Blocks(options, T, S, _block_size(T), _block_size(S))


def _block_size(length: int) -> int:
    """Equal blocks of whole tiles, at most `BLOCK`: 640 is two of 384, not one of 512 and a rest of 128."""
    size = pl.cdiv(length, pl.cdiv(length, BLOCK))
    tile = SUBLANES if length < LANES else LANES
    return pl.cdiv(size, tile) * tile


def pad(x: Array, size: int, axis: int) -> Array:
    """Fills up a block larger than the whole array, which Mosaic does not take; longer arrays are not copied."""
    missing = max(0, size - x.shape[axis])
    return jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)]) if missing else x


def pad_rows(rows: Rows, cut: Blocks) -> Rows:
    """`pad` for segments."""
    if rows.query_segments is None:
        return rows
    return rows._replace(
        query_segments=pad(rows.query_segments, cut.query_size, 1),
        key_segments=pad(rows.key_segments, cut.key_size, 1),
    )


def walk_keys(cut: Blocks, rows: Rows, group: int, D: int) -> tuple:
    """Specs for a grid of (row, query head, block of queries, step over keys).

    Returns:
      The specs of queries, of keys and of one number a query, the arrays of segments, and their specs.
    """

    def queries(b, h, i, step, *_):
        return b, h, i

    def keys(b, h, i, step, offset, start, end):
        return b, h // group, cut.key_block(i, step, offset[b], start[b], end[b])[0]

    return _specs(cut, rows, D, queries, keys)


def walk_queries(cut: Blocks, rows: Rows, group: int, D: int) -> tuple:
    """As `walk_keys`, for a grid of (row, key head, block of keys, query head of the group, step over queries)."""

    def queries(b, m, j, g, step, offset, start, end):
        return b, m * group + g, cut.query_block(j, step, offset[b], start[b], end[b])[0]

    def keys(b, m, j, *_):
        return b, m, j

    return _specs(cut, rows, D, queries, keys)


def _specs(cut: Blocks, rows: Rows, D: int, queries: Callable, keys: Callable) -> tuple:
    """Specs from where a grid point finds its row, head and block of queries, and those of keys."""
    arrays, specs = (), ()
    if rows.query_segments is not None:
        # A row and a column, as the transposed scores want them.
        arrays = rows.query_segments[:, None, :], rows.key_segments[:, :, None]
        specs = (
            pl.BlockSpec((1, 1, cut.query_size), lambda *at: (queries(*at)[0], 0, queries(*at)[2])),
            pl.BlockSpec((1, cut.key_size, 1), lambda *at: (keys(*at)[0], keys(*at)[2], 0)),
        )
    return (
        pl.BlockSpec((1, 1, cut.query_size, D), lambda *at: (*queries(*at), 0)),
        pl.BlockSpec((1, 1, cut.key_size, D), lambda *at: (*keys(*at), 0)),
        pl.BlockSpec((1, 1, 1, cut.query_size), lambda *at: (*queries(*at)[:2], 0, queries(*at)[2])),
        arrays,
        specs,
    )
