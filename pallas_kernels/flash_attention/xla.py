"""Blocked attention in plain JAX: an online softmax over blocks of keys, on any device and in any floating dtype.

Holds the scores of one block of queries against one block of keys, forward and backward (Dao et al. 2022, algorithms
1 and 4). Loops run over the blocks that some row of the batch can see, so a causal call costs half, whatever its
offset. A last block that would reach beyond the end is moved back and its repeated part masked: nothing is padded.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.flash_attention.visibility import HIDDEN, NO_KEYS, Options, Rows, blocks, keys_seen, sees
from pallas_kernels.platform import vary_over, varying_axes

BLOCK = 256
"""Most queries and keys of a block. On a CPU 128 to 512 differ little where there are many blocks."""

_KEYS, _QUERIES = 2, 3  # Axes: that of keys and values, and that of queries once their heads are grouped.


class _Scores(NamedTuple):
    """A block of scores, ``[B, M, G, t, s]``, with what it was made of."""

    key: Array
    value: Array
    scores: Array
    slope: Array | None


class _Queries(NamedTuple):
    """A block of queries: ``index`` is ``[t]``, ``repeated`` says which of them an earlier block holds too."""

    index: Array
    repeated: Array
    query: Array


def forward(
    q: Float[Array, "B H T D"], k: Float[Array, "B M S D"], v: Float[Array, "B M S D"], rows: Rows, options: Options
) -> tuple[Float[Array, "B H T D"], Float[Array, "B H T"]]:
    """The weighted values in the dtype of ``q``, and the log-normalizers."""
    (B, H, T, D), (M, S) = q.shape, k.shape[1:3]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    size, grouped = _block_size(T), q.reshape(B, M, H // M, T, D)

    def one_block(i: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        out, normalizers = carry
        queries = _take_queries(grouped, i, size)

        def step(j: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            accumulated, peak, total = carry
            block = _score(queries, k, v, j, rows, options)
            new_peak = jnp.maximum(peak, block.scores.max(-1))
            shrink = jnp.exp(peak - new_peak)
            weights = jnp.exp(block.scores - new_peak[..., None])
            part = _einsum("bmgts,bmsd->bmgtd", weights.astype(v.dtype), block.value)
            return accumulated * shrink[..., None] + part, new_peak, total * shrink + weights.sum(-1)

        shape = (B, M, H // M, size)
        start = (jnp.zeros((*shape, D), wide), jnp.full(shape, NO_KEYS, wide), jnp.zeros(shape, wide))
        accumulated, peak, total = _over_keys(step, start, queries, S, rows, options)
        some = total > 0.0
        total = jnp.where(some, total, 1.0)
        normalizer = jnp.where(some, peak + jnp.log(total), NO_KEYS)
        return (
            _put(out, (accumulated / total[..., None]).astype(q.dtype), i, size, _QUERIES),
            _put(normalizers, normalizer, i, size, _QUERIES),
        )

    start = (jnp.zeros(grouped.shape, q.dtype), jnp.zeros(grouped.shape[:-1], wide))
    out, normalizers = _loop(0, -(-T // size), -(-T // size), one_block, _vary_with(q, start))
    return out.reshape(q.shape), normalizers.reshape(B, H, T)


def backward(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B M S D"],
    v: Float[Array, "B M S D"],
    rows: Rows,
    options: Options,
    normalizers: Float[Array, "B H T"],
    d_out: Float[Array, "B H T D"],
    shift: Float[Array, "B H T"],
) -> tuple[Float[Array, "B H T D"], Float[Array, "B M S D"], Float[Array, "B M S D"]]:
    """Gradients of queries, keys and values.

    Args:
      q: queries.
      k: keys.
      v: values.
      rows: as in `forward`.
      options: as in `forward`.
      normalizers: what `forward` returned.
      d_out: cotangent of the weighted values, in their dtype.
      shift: ``(d_out * out).sum(-1)`` less the cotangent of the normalizers: ``dS = P * (dP - shift)``.
    """
    (B, H, T, D), (M, S) = q.shape, k.shape[1:3]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    size = _block_size(T)
    per_group = (B, M, H // M, T)
    grouped, d_grouped = q.reshape(*per_group, D), d_out.reshape(*per_group, D)
    normalizers, shift = normalizers.reshape(per_group), shift.reshape(per_group)

    def one_block(i: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        dq, dk, dv = carry
        queries = _take_queries(grouped, i, size)
        own_d_out, own_shift = _take(d_grouped, i, size, _QUERIES), _take(shift, i, size, _QUERIES)[..., None]
        # A weight of 0 for the repeated queries: their gradients were added by the block before.
        own_normalizers = jnp.where(queries.repeated, -HIDDEN, _take(normalizers, i, size, _QUERIES))[..., None]

        def step(j: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            own_dq, dk, dv = carry
            block = _score(queries, k, v, j, rows, options)
            weights = jnp.exp(block.scores - own_normalizers)
            d_weights = _einsum("bmgtd,bmsd->bmgts", own_d_out, block.value)
            d_scores = options.scale * weights * (d_weights - own_shift)
            if block.slope is not None:
                d_scores *= block.slope
            d_scores = d_scores.astype(q.dtype)
            columns = _block_size(S)
            dv = _add(dv, _einsum("bmgts,bmgtd->bmsd", weights.astype(q.dtype), own_d_out), j, columns, _KEYS)
            dk = _add(dk, _einsum("bmgts,bmgtd->bmsd", d_scores, queries.query), j, columns, _KEYS)
            return own_dq + _einsum("bmgts,bmsd->bmgtd", d_scores, block.key), dk, dv

        start = (jnp.zeros((B, M, H // M, size, D), wide), dk, dv)
        own_dq, dk, dv = _over_keys(step, start, queries, S, rows, options)
        return _add(dq, own_dq.astype(q.dtype), i, size, _QUERIES), dk, dv

    start = (jnp.zeros(grouped.shape, q.dtype), jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide))
    dq, dk, dv = _loop(0, -(-T // size), -(-T // size), one_block, _vary_with(q, start))
    return dq.reshape(q.shape), dk.astype(k.dtype), dv.astype(v.dtype)


def _score(queries: _Queries, k: Array, v: Array, j: Any, rows: Rows, options: Options) -> _Scores:
    """Scores of a block of queries against the keys of block ``j``, `HIDDEN` where they are not seen."""
    S = k.shape[2]
    size = _block_size(S)
    column = _origin(j, size, S) + jnp.arange(size, dtype=jnp.int32)
    # Columns outside the row may hold anything, NaN included, which a weight of 0 would not stop.
    held = ((column >= rows.start[:, None]) & (column < rows.end[:, None]))[:, None, :, None]
    key, value = (jnp.where(held, _take(x, j, size, _KEYS), 0) for x in (k, v))
    scores = options.scale * _einsum("bmgtd,bmsd->bmgts", queries.query, key)
    slope = None
    if options.soft_cap is not None:
        bent = jnp.tanh(scores / options.soft_cap)
        scores, slope = options.soft_cap * bent, 1.0 - bent**2
    position = rows.offset[:, None, None] + queries.index[:, None]
    seen = sees(options, position, column, rows.start[:, None, None], rows.end[:, None, None]) & (column >= j * size)
    if rows.query_segments is not None:
        own = rows.query_segments[:, queries.index]
        seen &= own[:, :, None] == rows.key_segments[:, column][:, None, :]
    return _Scores(key, value, jnp.where(seen[:, None, None], scores, HIDDEN), slope)


def _take_queries(grouped: Array, i: Any, size: int) -> _Queries:
    index = _origin(i, size, grouped.shape[3]) + jnp.arange(size, dtype=jnp.int32)
    return _Queries(index, index < i * size, _take(grouped, i, size, _QUERIES))


def _over_keys(step: Callable, start: Any, queries: _Queries, S: int, rows: Rows, options: Options) -> Any:
    """Folds ``step`` over the blocks of keys that some row's queries see."""
    size = _block_size(S)
    count = -(-S // size)
    low, high = keys_seen(
        options, rows.offset + queries.index[0], rows.offset + queries.index[-1], rows.start, rows.end
    )
    low, high = jnp.where(low < high, low, S).min(), jnp.where(low < high, high, 0).max()
    return _loop(*blocks(low, high, size, count), count, step, _vary_with(queries.query, start))


def _loop(first: Any, last: Any, count: int, step: Callable, start: Any) -> Any:
    """`jax.lax.fori_loop`, without the loop where there is but one block: XLA then fuses across it."""
    if count == 1:
        return step(0, start)
    return jax.lax.fori_loop(jnp.int32(first), jnp.int32(last), step, start)


def _vary_with(array: Array, start: Any) -> Any:
    """A loop's start, which differs between devices where its end will."""
    return jax.tree.map(lambda x: vary_over(x, varying_axes(array)), start)


def _block_size(length: int) -> int:
    """Equal blocks, so that little is computed twice: 300 is two of 150, not two of 256."""
    return -(-length // -(-length // BLOCK))


def _origin(i: Any, size: int, total: int) -> Array:
    return jnp.minimum(i * size, total - size).astype(jnp.int32)


def _take(x: Array, i: Any, size: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, _origin(i, size, x.shape[axis]), size, axis)


def _put(x: Array, block: Array, i: Any, size: int, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, block, _origin(i, size, x.shape[axis]), axis)


def _add(x: Array, block: Array, i: Any, size: int, axis: int) -> Array:
    return _put(x, _take(x, i, size, axis) + block, i, size, axis)


def _einsum(subscripts: str, x: Array, y: Array) -> Array:
    """Accumulates in at least float32; float32 factors are not rounded, whatever the device does by default."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    precision = jax.lax.Precision.HIGHEST if x.dtype == wide else jax.lax.Precision.DEFAULT
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=wide)
