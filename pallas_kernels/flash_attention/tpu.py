"""Attention as Mosaic TPU kernels: forward, gradient of the queries, gradient of keys and values.

All three hold the scores transposed, ``[keys, queries]``. What is one number a query (peak, sum, log-normalizer) is
then a row that broadcasts over sublanes, its reductions run over sublanes, and a head dimension below 128 wastes no
lanes of the accumulator, ``[D, queries]``.

The grid's last axis counts the blocks that a program may have to see, from the first it can see on. Which these are
follows from the row's offset, start and end, prefetched as scalars; steps beyond them compute nothing and name the
block that is already there, so that nothing is fetched. With a window, the grid is as short as the window. Only blocks
on an edge are masked.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.flash_attention.visibility import (
    HIDDEN,
    NO_KEYS,
    Options,
    Rows,
    all_seen,
    blocks,
    keys_seen,
    queries_seeing,
    sees,
)

BLOCK = 512
"""Most queries and keys of a block."""

_LANES = 128
_SUBLANES = 16  # Rows of a bfloat16 tile; float32 has 8.
_KEYS, _QUERIES = 0, 1  # Axes of the transposed scores.
# The grid's axes that only choose what to compute may run in any order; the others add up.
_WALK_KEYS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"))
_WALK_QUERIES = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary"))


def why_not(q: Array, k: Array) -> str | None:
    """Why the kernels do not take these queries and keys, or None if they do."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"dtype {q.dtype} is neither float32 nor bfloat16"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"head dimension {q.shape[-1]} is not a multiple of 8 up to 256"
    return None


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """How queries and keys are cut, and which blocks meet. ``T`` and ``S`` count real queries and keys."""

    options: Options
    T: int
    S: int
    query_size: int
    key_size: int

    @property
    def queries(self) -> int:
        return pl.cdiv(self.T, self.query_size)

    @property
    def keys(self) -> int:
        return pl.cdiv(self.S, self.key_size)

    @property
    def key_steps(self) -> int:
        """Most blocks of keys that a block of queries sees."""
        return self._steps(self.keys, self.key_size, self.query_size)

    @property
    def query_steps(self) -> int:
        """Most blocks of queries that see a block of keys."""
        return self._steps(self.queries, self.query_size, self.key_size)

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
        return _at_step(*blocks(low, high, self.key_size, self.keys), step)

    def query_block(self, j: Any, step: Any, offset: Any, start: Any, end: Any) -> tuple[Any, Any]:
        """The block of queries that keys ``j`` meet at a step, and whether it sees any of them."""
        first, last = self.key_columns(j)
        first, last = jnp.maximum(first, start), jnp.minimum(last, end - 1)
        low, high = queries_seeing(self.options, first, last, offset, self.T)
        high = jnp.where(first <= last, high, 0)
        return _at_step(*blocks(low, high, self.query_size, self.queries), step)

    def unmasked(self, i: Any, j: Any, offset: Any, start: Any, end: Any) -> Any:
        """Whether blocks ``i`` and ``j`` need no mask, neither of keys nor of queries beyond the last."""
        seen = all_seen(self.options, self.query_columns(i, offset), self.key_columns(j), start, end)
        return seen & ((i + 1) * self.query_size <= self.T)


def _at_step(first: Any, last: Any, step: Any) -> tuple[Any, Any]:
    return jnp.clip(first + step, 0, jnp.maximum(last - 1, 0)), first + step < last


def forward(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B M S D"],
    v: Float[Array, "B M S D"],
    rows: Rows,
    options: Options,
    *,
    interpret: Any = False,
) -> tuple[Float[Array, "B H T D"], Float[Array, "B H T"]]:
    """The weighted values in the dtype of ``q``, and the log-normalizers.

    Args:
      q: queries.
      k: keys.
      v: values.
      rows: what differs between rows.
      options: what is static.
      interpret: True or `pltpu.InterpretParams` to run without a TPU.
    """
    (B, H, T, D), (M, S) = q.shape, k.shape[1:3]
    cut = _cut(T, S, options)
    q, k, v, rows = _pad(q, cut.query_size, 2), _pad(k, cut.key_size, 2), _pad(v, cut.key_size, 2), _pad_rows(rows, cut)
    query, key, per_query, segments, segment_specs = _walk_keys(cut, rows, H // M, D)
    out, normalizers = pl.pallas_call(
        functools.partial(_forward_kernel, cut=cut),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, H, cut.queries, cut.key_steps),
            in_specs=[query, key, key, segment_specs],
            out_specs=[query, per_query],
            scratch_shapes=[
                pltpu.VMEM((D, cut.query_size), jnp.float32),
                pltpu.VMEM((1, cut.query_size), jnp.float32),
                pltpu.VMEM((1, cut.query_size), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, H, 1, q.shape[2]), jnp.float32),
        ],
        compiler_params=_WALK_KEYS,
        name="flash_attention_forward",
        interpret=interpret,
    )(rows.offset, rows.start, rows.end, q, k, v, segments)
    return out[:, :, :T], normalizers[:, :, 0, :T]


def _forward_kernel(offset, start, end, q, k, v, segments, out, normalizers, accumulated, peak, total, *, cut):
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


def backward(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B M S D"],
    v: Float[Array, "B M S D"],
    rows: Rows,
    options: Options,
    normalizers: Float[Array, "B H T"],
    d_out: Float[Array, "B H T D"],
    shift: Float[Array, "B H T"],
    *,
    interpret: Any = False,
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
      interpret: True or `pltpu.InterpretParams` to run without a TPU.
    """
    T, S = q.shape[2], k.shape[2]
    cut = _cut(T, S, options)
    rows = _pad_rows(rows, cut)
    q, d_out = _pad(q, cut.query_size, 2), _pad(d_out, cut.query_size, 2)
    k, v = _pad(k, cut.key_size, 2), _pad(v, cut.key_size, 2)
    normalizers, shift = (_pad(x[:, :, None], cut.query_size, 3) for x in (normalizers, shift))
    arrays = (q, k, v, normalizers, d_out, shift)
    dq = _backward_queries(*arrays, rows, cut, interpret)
    dk, dv = _backward_keys(*arrays, rows, cut, interpret)
    return dq[:, :, :T], dk[:, :, :S], dv[:, :, :S]


def _backward_queries(q, k, v, normalizers, d_out, shift, rows, cut, interpret):
    (B, H, _, D), M = q.shape, k.shape[1]
    query, key, per_query, segments, segment_specs = _walk_keys(cut, rows, H // M, D)
    return pl.pallas_call(
        functools.partial(_backward_queries_kernel, cut=cut),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, H, cut.queries, cut.key_steps),
            in_specs=[query, key, key, per_query, query, per_query, segment_specs],
            out_specs=query,
            scratch_shapes=[pltpu.VMEM((D, cut.query_size), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=_WALK_KEYS,
        name="flash_attention_backward_queries",
        interpret=interpret,
    )(rows.offset, rows.start, rows.end, q, k, v, normalizers, d_out, shift, segments)


def _backward_queries_kernel(offset, start, end, q, k, v, normalizers, d_out, shift, segments, dq, accumulated, *, cut):
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


def _backward_keys(q, k, v, normalizers, d_out, shift, rows, cut, interpret):
    (B, H, _, D), M = q.shape, k.shape[1]
    query, key, per_query, segments, segment_specs = _walk_queries(cut, rows, H // M, D)
    return pl.pallas_call(
        functools.partial(_backward_keys_kernel, cut=cut),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, M, cut.keys, H // M, cut.query_steps),
            in_specs=[query, key, key, per_query, query, per_query, segment_specs],
            out_specs=[key, key],
            scratch_shapes=[pltpu.VMEM((cut.key_size, D), jnp.float32)] * 2,
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        compiler_params=_WALK_QUERIES,
        name="flash_attention_backward_keys",
        interpret=interpret,
    )(rows.offset, rows.start, rows.end, q, k, v, normalizers, d_out, shift, segments)


def _backward_keys_kernel(
    offset, start, end, q, k, v, normalizers, d_out, shift, segments, dk, dv, key_sum, value_sum, *, cut
):
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


def _scores(key, query, i, j, row, segments, cut: _Blocks, masked: bool) -> tuple[Array, Array | None]:
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


def _d_scores(weights, d_weights, shift, slope, cut: _Blocks) -> Array:
    d_scores = cut.options.scale * weights * (d_weights - shift)
    return d_scores if slope is None else d_scores * slope


def _held(x, j, row, cut: _Blocks, masked: bool) -> Array:
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


def _cut(T: int, S: int, options: Options) -> _Blocks:
    return _Blocks(options, T, S, _block_size(T), _block_size(S))


def _block_size(length: int) -> int:
    """Equal blocks of whole tiles, at most `BLOCK`: 640 is two of 384, not one of 512 and a rest of 128."""
    size = pl.cdiv(length, pl.cdiv(length, BLOCK))
    tile = _SUBLANES if length < _LANES else _LANES
    return pl.cdiv(size, tile) * tile


def _pad(x: Array, size: int, axis: int) -> Array:
    """Fills up a block larger than the whole array, which Mosaic does not take; longer arrays are not copied."""
    missing = max(0, size - x.shape[axis])
    return jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)]) if missing else x


def _pad_rows(rows: Rows, cut: _Blocks) -> Rows:
    if rows.query_segments is None:
        return rows
    return rows._replace(
        query_segments=_pad(rows.query_segments, cut.query_size, 1),
        key_segments=_pad(rows.key_segments, cut.key_size, 1),
    )


def _walk_keys(cut: _Blocks, rows: Rows, group: int, D: int) -> tuple:
    """Specs for a grid of (row, query head, block of queries, step over keys).

    Returns:
      The specs of queries, of keys and of one number a query, the arrays of segments, and their specs.
    """

    def queries(b, h, i, step, *_):
        return b, h, i

    def keys(b, h, i, step, offset, start, end):
        return b, h // group, cut.key_block(i, step, offset[b], start[b], end[b])[0]

    return _specs(cut, rows, D, queries, keys)


def _walk_queries(cut: _Blocks, rows: Rows, group: int, D: int) -> tuple:
    """As `_walk_keys`, for a grid of (row, key head, block of keys, query head of the group, step over queries)."""

    def queries(b, m, j, g, step, offset, start, end):
        return b, m * group + g, cut.query_block(j, step, offset[b], start[b], end[b])[0]

    def keys(b, m, j, *_):
        return b, m, j

    return _specs(cut, rows, D, queries, keys)


def _specs(cut: _Blocks, rows: Rows, D: int, queries: Callable, keys: Callable) -> tuple:
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
