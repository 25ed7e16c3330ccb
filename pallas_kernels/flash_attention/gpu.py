"""Attention as Pallas kernels for NVIDIA GPUs, through the Triton backend.

Why Triton and not Mosaic GPU, which JAX 0.11 prefers: ours must run on Ampere, take float32, any length and a range of
keys per row. Mosaic GPU is written for Hopper's and Blackwell's tensor cores and copy engine, wants whole tiles in
shared memory, and only a device can show that its barriers are right. Triton code runs on Ampere, Ada, Hopper and
Blackwell alike, masks its loads, and what it computes is checked here by interpretation and by lowering to CUDA. On an
H100 it is faster than XLA, at 192 columns than cuDNN, too, and at 2,048 it has a third of cuDNN's speed
(experiments/results/on_gpu); JAX 0.11 announces the end of this backend.

A program holds one block of queries and walks over the blocks of keys that it can see, or, for the gradients of keys
and values, one block of keys and walks over the queries of all heads that read it. No atomics: results repeat bitwise.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.flash_attention.visibility import (
    HIDDEN,
    NO_KEYS,
    Options,
    Rows,
    blocks,
    keys_seen,
    queries_seeing,
    sees,
)

BLOCK = 64
"""Queries and keys of a block."""


def refusal(q: Array) -> str | None:
    """Why the kernels do not take such queries and keys, or None if they do."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"dtype {q.dtype} is neither float32 nor bfloat16"
    if q.shape[-1] not in (16, 32, 64, 128):
        return f"head dimension {q.shape[-1]} is not a power of two from 16 to 128"
    return None


def forward(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B M S D"],
    v: Float[Array, "B M S D"],
    rows: Rows,
    options: Options,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B H T D"], Float[Array, "B H T"]]:
    """The weighted values in the dtype of ``q``, and the log-normalizers.

    Args:
      q: queries.
      k: keys.
      v: values.
      rows: what differs between rows.
      options: what is static.
      interpret: True to run without a GPU.
    """
    (B, H, T, _), M = q.shape, k.shape[1]
    query, key, per_query, row_specs = _specs(q, k, rows, H // M)
    shaped = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(q).manual_axis_type)
    return pl.pallas_call(
        functools.partial(_forward_kernel, options=options),
        grid=(pl.cdiv(T, BLOCK), H, B),
        in_specs=[row_specs, query, key, key],
        out_specs=[query, per_query],
        out_shape=[shaped(q.shape, q.dtype), shaped((B, H, T), jnp.float32)],
        compiler_params=_compiler_params(q, stages=2 if q.dtype == jnp.bfloat16 else 1),
        name="flash_attention_forward",
        interpret=interpret,
    )(rows, q, k, v)


def _forward_kernel(rows, q, k, v, out, normalizers, *, options: Options):
    i = pl.program_id(0)
    (T, D), S = q.shape, k.shape[0]
    offset, start, end = rows.offset[0], rows.start[0], rows.end[0]
    query = _load(q, i, 0, T)

    def step(j: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        accumulated, peak, total = carry
        key, value = _load(k, j, start, end), _load(v, j, start, end)
        scores, _ = _scores(query, key, i, j, rows, (T, S), options)
        new_peak = jnp.maximum(peak, scores.max(1))
        shrink = jnp.exp(peak - new_peak)
        weights = jnp.exp(scores - new_peak[:, None])
        accumulated = accumulated * shrink[:, None] + _dot(weights.astype(value.dtype), value)
        return accumulated, new_peak, total * shrink + weights.sum(1)

    start_values = (
        jnp.zeros((BLOCK, D), jnp.float32),
        jnp.full((BLOCK,), NO_KEYS, jnp.float32),
        jnp.zeros((BLOCK,), jnp.float32),
    )
    accumulated, peak, total = jax.lax.fori_loop(*_keys_of(i, offset, start, end, S, options), step, start_values)
    some = total > 0.0
    total = jnp.where(some, total, 1.0)
    _store(out, i, T, accumulated / total[:, None])
    _store(normalizers, i, T, jnp.where(some, peak + jnp.log(total), NO_KEYS))


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
    interpret: bool = False,
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
      interpret: True to run without a GPU.
    """
    (B, H, T, D), (M, S) = q.shape, k.shape[1:3]
    query, key, per_query, row_specs = _specs(q, k, rows, H // M)
    shaped = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(q).manual_axis_type)
    dq = pl.pallas_call(
        functools.partial(_backward_queries_kernel, options=options),
        grid=(pl.cdiv(T, BLOCK), H, B),
        in_specs=[row_specs, query, key, key, per_query, query, per_query],
        out_specs=query,
        out_shape=shaped(q.shape, q.dtype),
        name="flash_attention_backward_queries",
        compiler_params=_compiler_params(q, stages=1),
        interpret=interpret,
    )(rows, q, k, v, normalizers, d_out, shift)

    # Queries grouped by the head of the keys they read: a program walks over the whole group.
    per_group = (B, M, H // M, T)
    grouped = pl.BlockSpec((None, None, H // M, T, D), lambda j, m, b: (b, m, 0, 0, 0))
    per_grouped = pl.BlockSpec((None, None, H // M, T), lambda j, m, b: (b, m, 0, 0))
    key = pl.BlockSpec((None, None, S, D), lambda j, m, b: (b, m, 0, 0))
    dk, dv = pl.pallas_call(
        functools.partial(_backward_keys_kernel, options=options),
        grid=(pl.cdiv(S, BLOCK), M, B),
        in_specs=[row_specs, grouped, key, key, per_grouped, grouped, per_grouped],
        out_specs=[key, key],
        out_shape=[shaped(x.shape, x.dtype) for x in (k, v)],
        name="flash_attention_backward_keys",
        compiler_params=_compiler_params(q, stages=1),
        interpret=interpret,
    )(
        rows,
        q.reshape(*per_group, D),
        k,
        v,
        normalizers.reshape(per_group),
        d_out.reshape(*per_group, D),
        shift.reshape(per_group),
    )
    return dq, dk, dv


def _backward_queries_kernel(rows, q, k, v, normalizers, d_out, shift, dq, *, options: Options):
    i = pl.program_id(0)
    (T, D), S = q.shape, k.shape[0]
    offset, start, end = rows.offset[0], rows.start[0], rows.end[0]
    query, own_d_out = _load(q, i, 0, T), _load(d_out, i, 0, T)
    own_normalizers, own_shift = _load(normalizers, i, 0, T)[:, None], _load(shift, i, 0, T)[:, None]

    def step(j: Any, accumulated: Array) -> Array:
        key, value = _load(k, j, start, end), _load(v, j, start, end)
        scores, slope = _scores(query, key, i, j, rows, (T, S), options)
        weights = jnp.exp(scores - own_normalizers)
        d_scores = options.scale * slope * weights * (_dot(own_d_out, value.T) - own_shift)
        return accumulated + _dot(d_scores.astype(key.dtype), key)

    bounds = _keys_of(i, offset, start, end, S, options)
    _store(dq, i, T, jax.lax.fori_loop(*bounds, step, jnp.zeros((BLOCK, D), jnp.float32)))


def _backward_keys_kernel(rows, q, k, v, normalizers, d_out, shift, dk, dv, *, options: Options):
    j = pl.program_id(0)
    (G, T, D), S = q.shape, k.shape[0]
    offset, start, end = rows.offset[0], rows.start[0], rows.end[0]
    key, value = _load(k, j, start, end), _load(v, j, start, end)
    first, last = jnp.maximum(j * BLOCK, start), jnp.minimum((j + 1) * BLOCK, end) - 1
    low, high = queries_seeing(options, first, last, offset, T)
    low, high = blocks(low, jnp.where(first <= last, high, 0), BLOCK, pl.cdiv(T, BLOCK))

    def of_head(g: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        def step(i: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            key_sum, value_sum = carry
            query, own_d_out = _load(q, i, 0, T, g), _load(d_out, i, 0, T, g)
            own_normalizers, own_shift = _load(normalizers, i, 0, T, g), _load(shift, i, 0, T, g)
            scores, slope = _scores(query, key, i, j, rows, (T, S), options)
            weights = jnp.exp(scores - own_normalizers[:, None])
            d_scores = options.scale * slope * weights * (_dot(own_d_out, value.T) - own_shift[:, None])
            value_sum += _dot(weights.astype(own_d_out.dtype).T, own_d_out)
            return key_sum + _dot(d_scores.astype(query.dtype).T, query), value_sum

        return jax.lax.fori_loop(low, high, step, carry)

    zeros = jnp.zeros((BLOCK, D), jnp.float32)
    key_sum, value_sum = jax.lax.fori_loop(jnp.int32(0), jnp.int32(G), of_head, (zeros, zeros))
    _store(dk, j, S, key_sum)
    _store(dv, j, S, value_sum)


def _specs(q: Array, k: Array, rows: Rows, group: int) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec, Rows]:
    """Whole rows and heads for a grid of (block, head, row): blocks are cut in the kernel, where loads are masked."""
    (_, _, T, D), S = q.shape, k.shape[2]

    def per_row(length: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, length), lambda i, h, b: (b, 0))

    scalar = pl.BlockSpec((1,), lambda i, h, b: (b,))
    some = rows.query_segments is not None
    return (
        pl.BlockSpec((None, None, T, D), lambda i, h, b: (b, h, 0, 0)),
        pl.BlockSpec((None, None, S, D), lambda i, h, b: (b, h // group, 0, 0)),
        pl.BlockSpec((None, None, T), lambda i, h, b: (b, h, 0)),
        Rows(scalar, scalar, scalar, *([per_row(T), per_row(S)] if some else [None, None])),
    )


def _compiler_params(q: Array, *, stages: int) -> plgpu.CompilerParams:
    """More stages keep more blocks in shared memory, of which float32 or a backward leave little on Ampere."""
    return plgpu.CompilerParams(num_warps=4 if q.shape[-1] <= 64 else 8, num_stages=stages)


def _keys_of(i: Any, offset: Any, start: Any, end: Any, S: int, options: Options) -> tuple[Any, Any]:
    """Blocks of keys that block ``i`` of the queries sees."""
    first = offset + i * BLOCK
    return blocks(*keys_seen(options, first, first + BLOCK - 1, start, end), BLOCK, pl.cdiv(S, BLOCK))


def _index(block: Any) -> Array:
    return block * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)


def _whole(x: Any) -> Any:
    """The whole last axis; a bare slice would start at an int64 beside our int32, where 64 bits are enabled."""
    return pl.ds(jnp.int32(0), x.shape[-1])


def _load(x: Any, block: Any, start: Any, end: Any, *head: Any) -> Array:
    """A block along the axis after ``head``, 0 outside ``[start, end)``, which is not read."""
    index = _index(block)
    kept, at = (index >= start) & (index < end), (*head, pl.ds(block * BLOCK, BLOCK))
    if len(x.shape) == len(at):
        return plgpu.load(x.at[at], mask=kept, other=0)
    return plgpu.load(x.at[*at, _whole(x)], mask=jnp.broadcast_to(kept[:, None], (BLOCK, x.shape[-1])), other=0)


def _store(x: Any, block: Any, end: int, value: Array) -> None:
    kept = _index(block) < end
    value = value.astype(x.dtype)
    if len(x.shape) == 1:
        plgpu.store(x.at[pl.ds(block * BLOCK, BLOCK)], value, mask=kept)
    else:
        kept = jnp.broadcast_to(kept[:, None], value.shape)
        plgpu.store(x.at[pl.ds(block * BLOCK, BLOCK), _whole(x)], value, mask=kept)


def _scores(
    query: Array, key: Array, i: Any, j: Any, rows: Rows, lengths: tuple[int, int], options: Options
) -> tuple[Array, Any]:
    """Scores of a block of queries and one of keys, `HIDDEN` where not seen, and the slope of the soft cap."""
    (T, S), slope = lengths, 1.0
    scores = options.scale * _dot(query, key.T)
    if options.soft_cap is not None:
        bent = jnp.tanh(scores / options.soft_cap)
        scores, slope = options.soft_cap * bent, 1.0 - bent * bent
    positions, columns = rows.offset[0] + _index(i), _index(j)
    seen = sees(options, positions[:, None], columns[None, :], rows.start[0], rows.end[0])
    if rows.query_segments is not None:
        seen &= _load(rows.query_segments, i, 0, T)[:, None] == _load(rows.key_segments, j, 0, S)[None, :]
    return jnp.where(seen, scores, HIDDEN), slope


def _dot(x: Array, y: Array) -> Array:
    """Float32 factors are not rounded to TensorFloat-32."""
    return plgpu.dot(x, y, precision="highest" if x.dtype == jnp.float32 else None)
