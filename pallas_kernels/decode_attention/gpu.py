"""A Pallas kernel for NVIDIA GPUs, through Triton, for the forward pass; the backward pass is that of `xla`.

Why Triton, which JAX is retiring: decoding is bound by memory and not by matrix instructions, so what Mosaic GPU
(`plgpu.kernel`, Hopper and later) adds, warp specialisation and wider products, is not what is missing; and this is for
Ampere too, and lowers and is interpreted anywhere. On an H100 it reads a cache of 4,096 columns as fast as a copy does,
as cuDNN does, too (experiments/results/on_gpu).

A row's cache is split over programs, each of which visits only columns that the row sees; their outputs are merged by
log-normalizers, as segments are.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention import xla
from pallas_kernels.decode_attention.segments import NO_COLUMN, merge_segments
from pallas_kernels.logits import LogitRule, precision
from pallas_kernels.platform import vary_over, varying_axes

BLOCK = 64
MOST_QUERIES = 64
PROGRAMS = 256
"""Programs wanted at least, where the cache is long enough to be split."""
SHORTEST_PART = 4 * BLOCK


def refusal(queries: Array) -> str | None:
    """Why this kernel does not take grouped queries ``[B, KH, R, D]`` of this size, if it does not."""
    rows, features = queries.shape[2:]
    if rows > MOST_QUERIES:
        return f"{rows} queries share a head of keys, the kernel is for {MOST_QUERIES} at most"
    if features not in (16, 32, 64, 128, 256):
        return f"heads have {features} features, the kernel takes a power of two from 16 to 256"
    return None


def attend(
    queries: Float[Array, "B KH R D"],
    keys: Float[Array, "B KH S D"],
    values: Float[Array, "B KH S D"],
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    rule: LogitRule,
    interpret: bool = False,
) -> tuple[Float[Array, "B KH R D"], Float[Array, "B KH R"]]:
    """Outputs and log-normalizers of the queries of each head of keys."""
    batch, heads, rows, features = queries.shape
    columns = keys.shape[2]
    padded_rows = max(16, 2 ** math.ceil(math.log2(rows)))  # The least that a matrix instruction takes.
    parts = max(1, min(PROGRAMS // (batch * heads), columns // SHORTEST_PART))
    part = pl.cdiv(pl.cdiv(columns, parts), BLOCK) * BLOCK
    parts = pl.cdiv(columns, part)
    padded = jnp.pad(queries, ((0, 0), (0, 0), (0, padded_rows - rows), (0, 0)))
    axes = varying_axes(start, length, queries, keys, values)
    inputs = [vary_over(x, axes) for x in (start, length, padded, keys, values)]
    mesh_type = jax.typeof(inputs[0]).manual_axis_type
    outputs, log_normalizers = pl.pallas_call(
        functools.partial(_kernel, rule=rule, part=part),
        grid=(batch, heads, parts),
        out_specs=[
            pl.BlockSpec((None, None, None, padded_rows, features), lambda row, head, part: (part, row, head, 0, 0)),
            pl.BlockSpec((None, None, None, padded_rows), lambda row, head, part: (part, row, head, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((parts, *padded.shape), jnp.float32, manual_axis_type=mesh_type),
            jax.ShapeDtypeStruct((parts, *padded.shape[:3]), jnp.float32, manual_axis_type=mesh_type),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
    )(*inputs)
    merged, total = merge_segments(outputs, log_normalizers)
    return merged[:, :, :rows].astype(queries.dtype), total[:, :, :rows]


def gradients(*residuals, interpret: bool = False) -> tuple[Array, Array, Array]:
    """Those of `xla.gradients`, whose arguments these are."""
    del interpret
    return xla.gradients(*residuals)


def _kernel(start, length, queries, keys, values, outputs, log_normalizers, *, rule: LogitRule, part: int):
    """Queries of one head of keys over one part of the cache. An index behind its end is that of its last column."""
    rows, features = queries.shape[2:]
    columns = keys.shape[2]
    row, head, first = pl.program_id(0), pl.program_id(1), pl.program_id(2) * part
    begin = jnp.maximum(start[row], first)
    end = jnp.minimum(jnp.minimum(length[row], columns), first + part)
    feature = jnp.arange(features)[None, :]
    states = queries[row, head, jnp.arange(rows)[:, None], feature]

    def add_block(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        old_peak, total, sums = carry
        column = index * BLOCK + jnp.arange(BLOCK)
        seen = ((column >= begin) & (column < end))[None, :]
        inside = jnp.minimum(column, columns - 1)[:, None]
        scores = rule.logits(_product(states, keys[row, head, inside, feature], (1, 1)))
        scores = jnp.where(seen, scores, NO_COLUMN)
        peak = jnp.maximum(old_peak, jnp.max(scores, 1))
        weights = jnp.where(seen, jnp.exp(scores - peak[:, None]), 0.0)
        decay = jnp.exp(old_peak - peak)
        rows_of_values = values[row, head, inside, feature]
        added = _product(weights.astype(rows_of_values.dtype), rows_of_values, (1, 0))
        return peak, total * decay + jnp.sum(weights, 1), sums * decay[:, None] + added

    zeros = jnp.zeros((rows,), jnp.float32)
    carry = (zeros + NO_COLUMN, zeros, jnp.zeros((rows, features), jnp.float32))
    # None where the row sees nothing of this part: the upper bound is then not above the lower.
    last = jnp.where(begin < end, (end + BLOCK - 1) // BLOCK, 0)
    peak, total, sums = jax.lax.fori_loop(begin // BLOCK, last, add_block, carry)
    divisor = jnp.where(total == 0.0, 1.0, total)
    outputs[...] = sums / divisor[:, None]
    log_normalizers[...] = jnp.where(total == 0.0, NO_COLUMN, peak + jnp.log(divisor))


def _product(left: Array, right: Array, contracted: tuple[int, int]) -> Array:
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(
        left, right, dimensions, precision=precision(left.dtype), preferred_element_type=jnp.float32
    )
