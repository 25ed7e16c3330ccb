"""A Mosaic TPU kernel: the gradient of the matrices of a grouped product.

XLA's TPU compiler forms it as a dense product of all rows with each group. Here a step of the grid takes a block of
rows and one group that has rows in it, and adds their product to the group's in VMEM. A block in which groups meet is
taken once for each. The number of steps is data, so that rows of no group cost nothing.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.logits import precision
from pallas_kernels.platform import vary_over, varying_axes

Interpret = bool | pltpu.InterpretParams

ROWS = 512
WIDTHS = {"bfloat16": (1024, 768, 512), "float32": (512,)}
"""Columns of a block by dtype: what fits into the 16 MiB of VMEM of a v4. Larger ones of float32 compile slowly."""


def refusal(operand: Array) -> str | None:
    """Why this kernel does not take rows like these, if it does not."""
    return None if str(operand.dtype) in WIDTHS else f"{operand.dtype} rows: it takes {' and '.join(WIDTHS)}"


def matrix_gradient(
    rows: Float[Array, "N D"],
    cotangents: Float[Array, "N F"],
    sizes: Int[Array, " E"],
    interpret: Interpret = False,
    block_rows: int = ROWS,
) -> Float[Array, "E D F"]:
    """``rows^T cotangents`` over the rows of each group, summed in float32; 0 for a group without rows.

    Args:
      rows: those of the first group, of the second, and so on; behind the last group they may be anything.
      cotangents: of what the rows were multiplied to.
      sizes: how many rows each group has; in sum at most ``N``.
      interpret: run it step by step, anywhere.
      block_rows: rows of a block, a multiple of 16; all of them where there are fewer.
    """
    N, D, E, F = *rows.shape, len(sizes), cotangents.shape[1]
    if not N:
        return jnp.zeros((E, D, F), rows.dtype)
    axes = varying_axes(rows, cotangents, sizes)
    rows, cotangents, sizes = (vary_over(x, axes) for x in (rows, cotangents, sizes))
    block = min(block_rows, N)
    tall, wide = _width(D, rows.dtype), _width(F, rows.dtype)
    groups, blocks, starts, steps = _steps(sizes, N, block)
    moved = rows.size * pl.cdiv(F, wide) + cotangents.size * pl.cdiv(D, tall) + E * D * F
    return pl.pallas_call(
        functools.partial(_kernel, block=block),
        out_shape=jax.ShapeDtypeStruct((E, D, F), rows.dtype, manual_axis_type=jax.typeof(rows).manual_axis_type),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(D, tall), pl.cdiv(F, wide), steps),
            in_specs=[
                pl.BlockSpec((block, tall), lambda d, f, step, groups, blocks, starts: (blocks[step], d)),
                pl.BlockSpec((block, wide), lambda d, f, step, groups, blocks, starts: (blocks[step], f)),
            ],
            out_specs=pl.BlockSpec((None, tall, wide), lambda d, f, step, groups, *_: (groups[step], d, f)),
            scratch_shapes=[pltpu.VMEM((tall, wide), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        # As if all rows were in groups: how many are is data.
        cost_estimate=pl.CostEstimate(
            flops=2 * N * D * F, transcendentals=0, bytes_accessed=moved * rows.dtype.itemsize
        ),
        interpret=interpret,
    )(groups, blocks, starts, rows, cotangents)


def _width(size: int, dtype: jnp.dtype) -> int:
    """Columns of a block: all, or the largest of `WIDTHS` that leaves the least of the last block empty."""
    widths = WIDTHS[str(dtype)]
    return size if size <= widths[0] else min(widths, key=lambda width: pl.cdiv(size, width) * width)


def _steps(sizes: Array, rows: int, block: int) -> tuple[Array, Array, Array, Array]:
    """For each step its group and its block of rows; where groups start and end; how many steps there are.

    A group without rows has one step, too, in which its gradient becomes 0.
    """
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(sizes, dtype=jnp.int32)])
    first, last = starts[:-1] // block, (starts[1:] - 1) // block
    counts = jnp.where(sizes > 0, last - first + 1, 1).astype(jnp.int32)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    step = jnp.arange(pl.cdiv(rows, block) + len(sizes), dtype=jnp.int32)[:, None]
    mine = (step >= ends - counts) & (step < ends)
    groups = jnp.where(mine, jnp.arange(len(sizes), dtype=jnp.int32), 0).sum(1, dtype=jnp.int32)
    blocks = jnp.where(mine, first + step - (ends - counts), 0).sum(1, dtype=jnp.int32)
    # One without rows behind all others may start where no block does.
    return groups, jnp.minimum(blocks, pl.cdiv(rows, block) - 1), starts, ends[-1]


def _kernel(groups, blocks, starts, rows, cotangents, output, total, *, block: int):
    step, steps = pl.program_id(2), pl.num_programs(2)
    group = groups[step]
    first = (step == 0) | (groups[jnp.maximum(step - 1, 0)] != group)
    last = (step == steps - 1) | (groups[jnp.minimum(step + 1, steps - 1)] != group)

    @pl.when(first)
    def _():
        total[...] = jnp.zeros_like(total)

    @pl.when(starts[group] < starts[group + 1])
    def _():
        row = blocks[step] * block + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0)
        inside = (row >= starts[group]) & (row < starts[group + 1])
        # Both, since those of other groups, of none and behind the end may be anything, NaN included.
        left = jnp.where(inside, rows[...], jnp.zeros_like(rows))
        right = jnp.where(inside, cotangents[...], jnp.zeros_like(cotangents))
        total[...] += jax.lax.dot_general(
            left,
            right,
            (((0,), (0,)), ((), ())),
            precision=precision(left.dtype),
            preferred_element_type=jnp.float32,
        )

    @pl.when(last)
    def _():
        output[...] = total[...].astype(output.dtype)
