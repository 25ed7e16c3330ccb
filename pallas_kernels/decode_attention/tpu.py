"""Mosaic TPU kernels: the cache streams through VMEM once, a block of columns at a time.

All queries that share a head of keys are the rows of one block, padded to the hardware's tile. Blocks that a row does
not see are neither copied nor computed: their index is that of the nearest block it sees, which is in VMEM already. A
core works on one block at a time, so a long cache is split over blocks but not over programs, as it is on a GPU; two
cores share the rows of the batch.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.cost import estimate_cost
from pallas_kernels.decode_attention.segments import NO_COLUMN
from pallas_kernels.logits import LogitRule, precision
from pallas_kernels.platform import vary_over, varying_axes

Interpret = bool | pltpu.InterpretParams

BLOCK_BYTES = 2**19
"""Bytes of a block of keys: copying it takes longer than a step of the grid, and a dozen of them fit into VMEM."""
LARGEST_BLOCK = 2_048
MOST_QUERIES = 256
LANES = 128


def refusal(queries: Array) -> str | None:
    """Why these kernels do not take grouped queries ``[B, KH, R, D]`` of this size, if they do not."""
    if queries.shape[2] > MOST_QUERIES:
        return f"{queries.shape[2]} queries share a head of keys, the kernel is for {MOST_QUERIES} at most"
    if queries.shape[3] > 512:
        return f"heads have {queries.shape[3]} features, the kernel is for 512 at most"
    return None


def block_columns(columns: int, features: int, itemsize: int) -> int:
    """Columns of the cache in a block."""
    wanted = BLOCK_BYTES // (pl.cdiv(features, LANES) * LANES * itemsize) // LANES * LANES
    return min(wanted, LARGEST_BLOCK, pl.cdiv(columns, LANES) * LANES)


def attend(
    queries: Float[Array, "B KH R D"],
    keys: Float[Array, "B KH S D"],
    values: Float[Array, "B KH S D"],
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    rule: LogitRule,
    interpret: Interpret = False,
) -> tuple[Float[Array, "B KH R D"], Float[Array, "B KH R"]]:
    """Outputs and log-normalizers of the queries of each head of keys."""
    rows = queries.shape[2]
    padded = _pad_rows(queries)
    outputs, log_normalizers = _call(
        functools.partial(_forward_kernel, rule=rule, columns=keys.shape[2]),
        (start, length),
        (padded, keys, values),
        out_shapes=[(padded.shape, queries.dtype), ((*padded.shape[:3], LANES), jnp.float32)],
        scratch_shapes=[(padded.shape[2], LANES), (padded.shape[2], LANES), padded.shape[2:]],
        products=2,
        interpret=interpret,
    )
    return outputs[:, :, :rows], log_normalizers[:, :, :rows, 0]


def gradients(
    queries: Float[Array, "B KH R D"],
    keys: Float[Array, "B KH S D"],
    values: Float[Array, "B KH S D"],
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    log_normalizers: Float[Array, "B KH R"],
    of_outputs: Float[Array, "B KH R D"],
    shift: Float[Array, "B KH R"],
    rule: LogitRule,
    interpret: Interpret = False,
) -> tuple[Float[Array, "B KH R D"], Float[Array, "B KH S D"], Float[Array, "B KH S D"]]:
    """Gradients of queries, keys and values, see `xla.gradients`; one pass over the cache."""
    rows = queries.shape[2]
    padded = _pad_rows(queries)
    of_queries, of_keys, of_values = _call(
        functools.partial(_backward_kernel, rule=rule, columns=keys.shape[2]),
        (start, length),
        (
            padded,
            keys,
            values,
            _pad_rows(of_outputs),
            *(jnp.broadcast_to(_pad_rows(x[..., None]), (*padded.shape[:3], LANES)) for x in (log_normalizers, shift)),
        ),
        out_shapes=[(x.shape, x.dtype) for x in (padded, keys, values)],
        scratch_shapes=[padded.shape[2:]],
        products=5,
        interpret=interpret,
    )
    return of_queries[:, :, :rows], of_keys, of_values


def _pad_rows(array: Array) -> Array:
    """Adds rows of zeros up to a multiple of 16, the tile of bfloat16; they take part and contribute nothing."""
    return jnp.pad(array, ((0, 0), (0, 0), (0, -array.shape[2] % 16), (0, 0)))


def _call(
    kernel: Callable[..., None],
    bounds: tuple[Array, Array],
    inputs: tuple[Array, ...],
    *,
    out_shapes: list[tuple[tuple[int, ...], DTypeLike]],
    scratch_shapes: list[tuple[int, ...]],
    products: int,
    interpret: Interpret,
) -> list[Array]:
    """Runs a kernel over rows, heads and blocks of columns, by which keys, values and their gradients are split."""
    batch, heads, columns, features = inputs[1].shape
    block = block_columns(columns, features, inputs[1].dtype.itemsize)
    blocks = pl.cdiv(columns, block)

    def nearest(row, head, step, start, length):
        first = jnp.clip(start[row] // block, 0, blocks - 1)
        last = jnp.clip((length[row] - 1) // block, first, blocks - 1)
        return row, head, jnp.clip(step, first, last), 0

    def whole(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape[2:]), lambda row, head, *_: (row, head, 0, 0))

    cached = (None, None, block, features)
    written = pl.BlockSpec(cached, lambda row, head, step, *_: (row, head, step, 0))
    axes = varying_axes(*bounds, *inputs)
    arguments = [vary_over(x, axes) for x in (*bounds, *inputs)]
    mesh_type = jax.typeof(arguments[0]).manual_axis_type
    out_shape = [jax.ShapeDtypeStruct(*x, manual_axis_type=mesh_type) for x in out_shapes]
    return list(
        pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(batch, heads, blocks),
                in_specs=[
                    pl.BlockSpec(cached, nearest) if i in (1, 2) else whole(x.shape) for i, x in enumerate(inputs)
                ],
                out_specs=[
                    written if i in (1, 2) and len(out_shapes) == 3 else whole(x[0]) for i, x in enumerate(out_shapes)
                ],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch_shapes],
            ),
            out_shape=out_shape,
            cost_estimate=estimate_cost(
                (*inputs, *out_shape),
                pairs=batch * heads * inputs[0].shape[2] * columns,
                features=features,
                products=products,
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            interpret=interpret,
        )(*arguments)
    )


def _forward_kernel(
    start, length, queries, keys, values, outputs, log_normalizers, peak, total, sums, *, rule: LogitRule, columns: int
):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        peak[...] = jnp.full_like(peak, NO_COLUMN)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    block = keys.shape[0]
    begin, end = _bounds(start, length, columns)

    @pl.when((step * block < end) & ((step + 1) * block > begin))
    def _():
        seen = _seen(begin, end, step, (queries.shape[0], block), 1)
        scores = jnp.where(seen, rule.logits(_product(queries[...], keys[...], (1, 1))), NO_COLUMN)
        old_peak = peak[:, :1]
        new_peak = jnp.maximum(old_peak, jnp.max(scores, 1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(scores - new_peak), 0.0)
        decay = jnp.exp(old_peak - new_peak)
        rows = values[...]
        if columns % block:
            rows = jnp.where(_seen(begin, end, step, rows.shape, 0), rows, 0)
        total[...] = total[...] * decay + jnp.sum(weights, 1, keepdims=True)
        sums[...] = sums[...] * decay + _product(weights.astype(rows.dtype), rows, (1, 0))
        peak[...] = jnp.broadcast_to(new_peak, peak.shape)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        empty = total[...] == 0.0
        divisor = jnp.where(empty, 1.0, total[...])
        log_normalizers[...] = jnp.where(empty, NO_COLUMN, peak[...] + jnp.log(divisor))
        outputs[...] = (sums[...] / divisor[:, :1]).astype(outputs.dtype)


def _backward_kernel(
    start, length, queries, keys, values, of_outputs, log_normalizers, shift, of_queries, of_keys, of_values, sums,
    *, rule: LogitRule, columns: int,
):  # fmt: skip
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)

    block = keys.shape[0]
    begin, end = _bounds(start, length, columns)
    live = (step * block < end) & ((step + 1) * block > begin)

    @pl.when(live)
    def _():
        seen = _seen(begin, end, step, (queries.shape[0], block), 1)
        scores = rule.logits(_product(queries[...], keys[...], (1, 1)))
        weights = jnp.where(seen, jnp.exp(scores - log_normalizers[:, :1]), 0.0)
        of_scores = weights * (_product(of_outputs[...], values[...], (1, 1)) - shift[:, :1])
        of_products = jnp.where(seen, rule.product_gradients(scores, of_scores), 0.0).astype(keys.dtype)
        rows = keys[...]
        if columns % block:
            rows = jnp.where(_seen(begin, end, step, rows.shape, 0), rows, 0)
        sums[...] += _product(of_products, rows, (1, 0))
        of_keys[...] = _product(of_products, queries[...], (0, 0)).astype(of_keys.dtype)
        of_values[...] = _product(weights.astype(keys.dtype), of_outputs[...], (0, 0)).astype(of_values.dtype)

    @pl.when(jnp.logical_not(live))
    def _():
        of_keys[...] = jnp.zeros_like(of_keys)
        of_values[...] = jnp.zeros_like(of_values)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        of_queries[...] = sums[...].astype(of_queries.dtype)


def _bounds(start, length, columns: int) -> tuple[Array, Array]:
    """The first column that the row of this step sees and the one behind its last; the same where it sees none."""
    row = pl.program_id(0)
    begin = jnp.maximum(start[row], 0)
    return begin, jnp.maximum(jnp.minimum(length[row], columns), begin)


def _seen(begin: Array, end: Array, step: Array, shape: tuple[int, ...], dimension: int) -> Array:
    column = step * shape[dimension] + jax.lax.broadcasted_iota(jnp.int32, shape, dimension)
    return (column >= begin) & (column < end)


def _product(left: Array, right: Array, contracted: tuple[int, int]) -> Array:
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(
        left, right, dimensions, precision=precision(left.dtype), preferred_element_type=jnp.float32
    )
