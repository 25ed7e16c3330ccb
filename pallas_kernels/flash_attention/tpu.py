"""Attention as Mosaic TPU kernels: forward, gradient of the queries, gradient of keys and values.

All three hold the scores transposed, ``[keys, queries]``. What is one number a query (peak, sum, log-normalizer) is
then a row that broadcasts over sublanes, its reductions run over sublanes, and a head dimension below 128 wastes no
lanes of the accumulator, ``[D, queries]``.

The grid's last axis counts the blocks that a program may have to see, from the first it can see on. Which these are
follows from the row's offset, start and end, prefetched as scalars; steps beyond them compute nothing and name the
block that is already there, so that nothing is fetched. With a window, the grid is as short as the window. Only blocks
on an edge are masked.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.cost import estimate_cost
from pallas_kernels.flash_attention.tpu_blocks import cut_blocks, pad, pad_rows, walk_keys, walk_queries
from pallas_kernels.flash_attention.tpu_kernels import backward_keys_kernel, backward_queries_kernel, forward_kernel
from pallas_kernels.flash_attention.visibility import Options, Rows

# The grid's axes that only choose what to compute may run in any order; the others add up.
_WALK_KEYS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"))
_WALK_QUERIES = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary"))


def refusal(q: Array) -> str | None:
    """Why the kernels do not take such queries and keys, or None if they do."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"dtype {q.dtype} is neither float32 nor bfloat16"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"head dimension {q.shape[-1]} is not a multiple of 8 up to 256"
    return None


def forward(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B M S D"],
    v: Float[Array, "B M S D"],
    rows: Rows,
    options: Options,
    *,
    interpret: bool | pltpu.InterpretParams = False,
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
    cut = cut_blocks(T, S, options)
    q, k, v, rows = pad(q, cut.query_size, 2), pad(k, cut.key_size, 2), pad(v, cut.key_size, 2), pad_rows(rows, cut)
    query, key, per_query, segments, segment_specs = walk_keys(cut, rows, H // M, D)
    shaped = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(q).manual_axis_type)
    out_shape = [shaped(q.shape, q.dtype), shaped((B, H, 1, q.shape[2]), jnp.float32)]
    out, normalizers = pl.pallas_call(
        functools.partial(forward_kernel, cut=cut),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, H, cut.query_blocks, cut.key_steps),
            in_specs=[query, key, key, segment_specs],
            out_specs=[query, per_query],
            scratch_shapes=[
                pltpu.VMEM((D, cut.query_size), jnp.float32),
                pltpu.VMEM((1, cut.query_size), jnp.float32),
                pltpu.VMEM((1, cut.query_size), jnp.float32),
            ],
        ),
        out_shape=out_shape,
        cost_estimate=_cost((q, k, v, *out_shape), q, k, options, products=2),
        compiler_params=_WALK_KEYS,
        name="flash_attention_forward",
        interpret=interpret,
    )(rows.offset, rows.start, rows.end, q, k, v, segments)
    return out[:, :, :T], normalizers[:, :, 0, :T]


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
    interpret: bool | pltpu.InterpretParams = False,
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
    cut = cut_blocks(T, S, options)
    rows = pad_rows(rows, cut)
    q, d_out = pad(q, cut.query_size, 2), pad(d_out, cut.query_size, 2)
    k, v = pad(k, cut.key_size, 2), pad(v, cut.key_size, 2)
    normalizers, shift = (pad(x[:, :, None], cut.query_size, 3) for x in (normalizers, shift))
    arrays = (q, k, v, normalizers, d_out, shift)
    dq = _backward_queries(*arrays, rows, cut, options, interpret)
    dk, dv = _backward_keys(*arrays, rows, cut, options, interpret)
    return dq[:, :, :T], dk[:, :, :S], dv[:, :, :S]


def _backward_queries(q, k, v, normalizers, d_out, shift, rows, cut, options, interpret):
    (B, H, _, D), M = q.shape, k.shape[1]
    query, key, per_query, segments, segment_specs = walk_keys(cut, rows, H // M, D)
    shaped = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(q).manual_axis_type)
    return pl.pallas_call(
        functools.partial(backward_queries_kernel, cut=cut),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, H, cut.query_blocks, cut.key_steps),
            in_specs=[query, key, key, per_query, query, per_query, segment_specs],
            out_specs=query,
            scratch_shapes=[pltpu.VMEM((D, cut.query_size), jnp.float32)],
        ),
        out_shape=shaped(q.shape, q.dtype),
        compiler_params=_WALK_KEYS,
        cost_estimate=_cost((q, k, v, d_out, q), q, k, options, products=3),
        name="flash_attention_backward_queries",
        interpret=interpret,
    )(rows.offset, rows.start, rows.end, q, k, v, normalizers, d_out, shift, segments)


def _backward_keys(q, k, v, normalizers, d_out, shift, rows, cut, options, interpret):
    (B, H, _, D), M = q.shape, k.shape[1]
    query, key, per_query, segments, segment_specs = walk_queries(cut, rows, H // M, D)
    shaped = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(q).manual_axis_type)
    return pl.pallas_call(
        functools.partial(backward_keys_kernel, cut=cut),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, M, cut.key_blocks, H // M, cut.query_steps),
            in_specs=[query, key, key, per_query, query, per_query, segment_specs],
            out_specs=[key, key],
            scratch_shapes=[pltpu.VMEM((cut.key_size, D), jnp.float32)] * 2,
        ),
        out_shape=[shaped(x.shape, x.dtype) for x in (k, v)],
        compiler_params=_WALK_QUERIES,
        cost_estimate=_cost((q, k, v, d_out, k, v), q, k, options, products=4),
        name="flash_attention_backward_keys",
        interpret=interpret,
    )(rows.offset, rows.start, rows.end, q, k, v, normalizers, d_out, shift, segments)


def _cost(arrays, q, k, options, products):
    """Offsets are data: causal queries are taken for the last ones, in a row without padding."""
    (B, H, T, D), S = q.shape, k.shape[2]
    pairs = T * S
    if options.causal:
        pairs -= min(T, S) * (min(T, S) - 1) // 2
    if options.window is not None:
        pairs = min(pairs, T * options.window)
    return estimate_cost(arrays, pairs=B * H * pairs, features=D, products=products)
