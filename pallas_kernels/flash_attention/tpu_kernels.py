"""Bodies of the TPU kernels. References hold one block each, the scalars of all rows, and sums between steps."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.flash_attention.tpu_blocks import Blocks
from pallas_kernels.flash_attention.visibility import HIDDEN, NO_KEYS, sees

_KEYS, _QUERIES = 0, 1  # Axes of the transposed scores.


def forward_kernel(offset, start, end, q, k, v, segments, out, normalizers, accumulated, peak, total, *, cut):
    """Online softmax of a block of queries over its blocks of keys (Dao et al. 2022, algorithm 1)."""
    b, i, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    row = offset[b], start[b], end[b]
    j, live = cut.key_block(i, step, *row)

    @pl.when(step == 0)
    def _():
        accumulated[...] = jnp.zeros_like(accumulated)
        peak[...] = jnp.full_like(peak, NO_KEYS)
        total[...] = jnp.zeros_like(total)

    def meet(masked: bool) -> None:
        key, value = _held(k, j, row, cut, masked), _held(v, j, row, cut, masked)
        scores, _ = _scores(key, q[0, 0], i, j, row, segments, cut, masked)
        new_peak = jnp.maximum(peak[...], scores.max(_KEYS, keepdims=True))
        shrink = jnp.exp(peak[...] - new_peak)
        weights = jnp.exp(scores - new_peak)
        total[...] = total[...] * shrink + weights.sum(_KEYS, keepdims=True)
        accumulated[...] = accumulated[...] * shrink + _dot(value, weights.astype(value.dtype), 0, 0)
        peak[...] = new_peak

    _when_live(live, cut.unmasked(i, j, *row), segments, meet)

    @pl.when(step == cut.key_steps - 1)
    def _():
        some = total[...] > 0.0
        sums = jnp.where(some, total[...], 1.0)
        out[0, 0] = (accumulated[...] / sums).T.astype(out.dtype)
        normalizers[0, 0] = jnp.where(some, peak[...] + jnp.log(sums), NO_KEYS)


def backward_queries_kernel(offset, start, end, q, k, v, normalizers, d_out, shift, segments, dq, accumulated, *, cut):
    """Gradient of a block of queries, summed over its blocks of keys."""
    b, i, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    row = offset[b], start[b], end[b]
    j, live = cut.key_block(i, step, *row)

    @pl.when(step == 0)
    def _():
        accumulated[...] = jnp.zeros_like(accumulated)

    def meet(masked: bool) -> None:
        # What the last block holds beyond the last query stays in its own columns, which are not written.
        key, value = _held(k, j, row, cut, masked), _held(v, j, row, cut, masked)
        scores, slope = _scores(key, q[0, 0], i, j, row, segments, cut, masked)
        weights = jnp.exp(scores - normalizers[0, 0])
        d_scores = _d_scores(weights, _dot(value, d_out[0, 0], 1, 1), shift[0, 0], slope, cut)
        accumulated[...] += _dot(key, d_scores.astype(key.dtype), 0, 0)

    _when_live(live, cut.unmasked(i, j, *row), segments, meet)

    @pl.when(step == cut.key_steps - 1)
    def _():
        dq[0, 0] = accumulated[...].T.astype(dq.dtype)


def backward_keys_kernel(
    offset, start, end, q, k, v, normalizers, d_out, shift, segments, dk, dv, key_sum, value_sum, *, cut
):
    """Gradients of a block of keys and values, summed over the heads of a group and their blocks of queries."""
    b, j, g, step = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.program_id(4)
    row = offset[b], start[b], end[b]
    i, live = cut.query_block(j, step, *row)
    groups = pl.num_programs(3)

    @pl.when((g == 0) & (step == 0))
    def _():
        key_sum[...] = jnp.zeros_like(key_sum)
        value_sum[...] = jnp.zeros_like(value_sum)

    def meet(masked: bool) -> None:
        key, value = _held(k, j, row, cut, masked), _held(v, j, row, cut, masked)
        query, own_d_out, own_normalizers, own_shift = q[0, 0], d_out[0, 0], normalizers[0, 0], shift[0, 0]
        if masked:
            # Beyond the last query a block holds anything, and the sums below run over queries.
            down = _index(i, cut.query_size, 0) < cut.T
            across = _index(i, cut.query_size, 1) < cut.T
            query, own_d_out = _keep(down, query), _keep(down, own_d_out)
            own_normalizers = jnp.where(across, own_normalizers, -HIDDEN)
            own_shift = jnp.where(across, own_shift, 0.0)
        scores, slope = _scores(key, query, i, j, row, segments, cut, masked)
        weights = jnp.exp(scores - own_normalizers)
        d_scores = _d_scores(weights, _dot(value, own_d_out, 1, 1), own_shift, slope, cut)
        value_sum[...] += _dot(weights.astype(own_d_out.dtype), own_d_out, 1, 0)
        key_sum[...] += _dot(d_scores.astype(query.dtype), query, 1, 0)

    _when_live(live, cut.unmasked(i, j, *row), segments, meet)

    @pl.when((g == groups - 1) & (step == cut.query_steps - 1))
    def _():
        dk[0, 0] = key_sum[...].astype(dk.dtype)
        dv[0, 0] = value_sum[...].astype(dv.dtype)


def _scores(key, query, i, j, row, segments, cut: Blocks, masked: bool) -> tuple[Array, Array | None]:
    """Transposed scores, `HIDDEN` where not seen, and the slope of the soft cap."""
    options, (offset, start, end) = cut.options, row
    scores = options.scale * _dot(key, query, 1, 1)
    slope = None
    if options.soft_cap is not None:
        bent = jnp.tanh(scores / options.soft_cap)
        scores, slope = options.soft_cap * bent, 1.0 - bent * bent
    if masked:
        columns, positions = _index(j, cut.key_size, _KEYS), offset + _index(i, cut.query_size, _QUERIES)
        seen = sees(options, positions, columns, start, end)
        scores = jnp.where(seen, scores, HIDDEN)
        if segments:
            query_segments, key_segments = segments
            scores = jnp.where(key_segments[0] == query_segments[0], scores, HIDDEN)
    return scores, slope


def _d_scores(weights, d_weights, shift, slope, cut: Blocks) -> Array:
    d_scores = cut.options.scale * weights * (d_weights - shift)
    return d_scores if slope is None else d_scores * slope


def _held(x, j, row, cut: Blocks, masked: bool) -> Array:
    """A block of keys or values, 0 where the row holds none: what stands there may be NaN."""
    if not masked:
        return x[0, 0]
    columns = _index(j, cut.key_size, 0)
    return _keep((columns >= row[1]) & (columns < row[2]), x[0, 0])


def _keep(kept: Array, x: Array) -> Array:
    # Selected in float32: masks are made for 32-bit tiles, and v5e has no 16-bit vector unit.
    return jnp.where(kept, x.astype(jnp.float32), 0.0).astype(x.dtype)


def _index(block: Any, size: int, axis: int) -> Array:
    """The index of each entry of a block, as a column or a row."""
    shape = (size, 1) if axis == 0 else (1, size)
    return block * size + jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """Contracts two blocks into float32; float32 factors are not rounded to bfloat16."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    contracted = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, contracted, precision=precision, preferred_element_type=jnp.float32)


def _when_live(live: Any, unmasked: Any, segments: tuple, meet: Callable[[bool], None]) -> None:
    """Runs ``meet`` with a mask only where one is needed."""
    if segments:
        pl.when(live)(functools.partial(meet, True))
    else:
        pl.when(live & unmasked)(functools.partial(meet, False))
        pl.when(live & ~unmasked)(functools.partial(meet, True))
