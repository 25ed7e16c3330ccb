"""Mosaic TPU kernels: a block of logits is formed in VMEM and never leaves it.

Blocks hold ``W h^T``, a column for each row of hidden states: what is kept of a row then lies along lanes, and sums
over the vocabulary run along sublanes, where they are cheap. The backward pass forms every block twice, once to sum
over the vocabulary and once over the rows: five matrix products where full logits take three, and no block in HBM.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.cost import estimate_cost
from pallas_kernels.linear_cross_entropy.statistics import Statistics
from pallas_kernels.logits import LogitRule, precision
from pallas_kernels.platform import vary_over, varying_axes

Interpret = bool | pltpu.InterpretParams

BLOCKS = (512, 256, 128)
VMEM_BUDGET = 32 * 2**20
"""What blocks are chosen to fit into; a core of every generation from v4 on has at least twice as much."""
VMEM_LIMIT = 48 * 2**20


def block_size(features: int, dtype: jnp.dtype) -> int | None:
    """Rows and columns of a block of logits, the largest that fits into VMEM; none where even the smallest does not."""
    width = _tiled(features)
    for block in BLOCKS:
        factors = 2 * 2 * block * width * dtype.itemsize  # Of both inputs, and the next ones on their way.
        gradients = block * width * (4 + 2 * dtype.itemsize)
        if factors + gradients + 6 * block * block * 4 <= VMEM_BUDGET:
            return block
    return None


def refusal(hidden: Array) -> str | None:
    """Why these kernels do not take hidden states of this size, if they do not."""
    features = hidden.shape[1]
    if block_size(features, hidden.dtype) is None:
        return f"blocks of {BLOCKS[-1]} states of {features} {hidden.dtype} features do not fit into VMEM"
    return None


def statistics(
    hidden: Float[Array, "N D"],
    vocabulary: Float[Array, "V D"],
    labels: Int[Array, " N"],
    rule: LogitRule,
    interpret: Interpret = False,
) -> Statistics:
    """`Statistics` in one pass over the vocabulary for each block of rows."""
    call = _Call(hidden, vocabulary, labels, interpret)
    row = call.row(by=0)
    outputs = call(
        functools.partial(_statistics_kernel, rule=rule, columns=call.columns),
        grid=(call.row_blocks, call.column_blocks),
        inputs=[labels[None], hidden, vocabulary],
        in_specs=[row, call.hidden(by=0), call.vocabulary(by=1)],
        products=1,
        out_specs=[row] * 4,
        out_shapes=[((1, call.rows), dtype) for dtype in (jnp.float32, jnp.float32, jnp.float32, jnp.int32)],
    )
    return Statistics(*(x[0] for x in outputs))


def gradients(
    hidden: Float[Array, "N D"],
    vocabulary: Float[Array, "V D"],
    labels: Int[Array, " N"],
    log_normalizers: Float[Array, " N"],
    normalizer_gradients: Float[Array, " N"],
    picked_gradients: Float[Array, " N"],
    rule: LogitRule,
    interpret: Interpret = False,
) -> tuple[Float[Array, "N D"], Float[Array, "V D"]]:
    """Gradients of hidden states and vocabulary, a kernel for each."""
    call = _Call(hidden, vocabulary, labels, interpret)
    rows = [x[None] for x in (labels, log_normalizers, normalizer_gradients, picked_gradients)]
    (of_hidden,) = call(
        functools.partial(_hidden_kernel, rule=rule, columns=call.columns),
        grid=(call.row_blocks, call.column_blocks),
        inputs=[*rows, hidden, vocabulary],
        in_specs=[call.row(by=0)] * 4 + [call.hidden(by=0), call.vocabulary(by=1)],
        products=2,
        out_specs=[call.hidden(by=0)],
        out_shapes=[(hidden.shape, hidden.dtype)],
        total_rows=call.row_block,
    )
    (of_vocabulary,) = call(
        functools.partial(_vocabulary_kernel, rule=rule, rows=call.rows),
        grid=(call.column_blocks, call.row_blocks),
        inputs=[*rows, hidden, vocabulary],
        in_specs=[call.row(by=1)] * 4 + [call.hidden(by=1), call.vocabulary(by=0)],
        products=2,
        out_specs=[call.vocabulary(by=0)],
        out_shapes=[(vocabulary.shape, vocabulary.dtype)],
        total_rows=call.column_block,
    )
    return of_hidden, of_vocabulary


def _statistics_kernel(
    labels, hidden, vocabulary, log_normalizers, picked, best, predictions, *, rule: LogitRule, columns: int
):
    """Sums over blocks of the vocabulary, the inner dimension of the grid; ``log_normalizers`` holds their total."""
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        log_normalizers[...] = jnp.zeros_like(log_normalizers)
        picked[...] = jnp.zeros_like(picked)
        best[...] = jnp.full_like(best, -jnp.inf)
        predictions[...] = jnp.zeros_like(predictions)

    logits = _logits(hidden, vocabulary, rule)
    ids = _ids(step, logits.shape, 0)
    if columns % logits.shape[0]:
        logits = jnp.where(ids < columns, logits, -jnp.inf)
    picked[...] += jnp.sum(jnp.where(ids == labels[...], logits, 0.0), 0, keepdims=True)
    block_best = jnp.max(logits, 0, keepdims=True)
    prediction = jnp.min(jnp.where(logits == block_best, ids, columns), 0, keepdims=True)
    old_best = best[...]
    predictions[...] = jnp.where(block_best > old_best, prediction, predictions[...])
    new_best = jnp.maximum(old_best, block_best)
    total = jnp.sum(jnp.exp(logits - new_best), 0, keepdims=True)
    log_normalizers[...] = log_normalizers[...] * jnp.exp(old_best - new_best) + total
    best[...] = new_best

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        log_normalizers[...] = best[...] + jnp.log(log_normalizers[...])


def _hidden_kernel(
    labels, log_normalizers, of_normalizers, of_picked, hidden, vocabulary, output, total, *, rule, columns
):
    """Sums over blocks of the vocabulary. What lies behind its end may be anything, NaN included."""
    of_products = _product_gradients(
        labels, log_normalizers, of_normalizers, of_picked, hidden, vocabulary, rule, pl.program_id(1)
    )
    weights = vocabulary[...]
    if columns % weights.shape[0]:
        of_products = jnp.where(_ids(pl.program_id(1), of_products.shape, 0) < columns, of_products, 0)
        weights = jnp.where(_ids(pl.program_id(1), weights.shape, 0) < columns, weights, 0)
    _add(total, output, of_products, weights, 0)


def _vocabulary_kernel(
    labels, log_normalizers, of_normalizers, of_picked, hidden, vocabulary, output, total, *, rule, rows
):
    """Sums over blocks of rows. What lies behind the last one may be anything, NaN included."""
    of_products = _product_gradients(
        labels, log_normalizers, of_normalizers, of_picked, hidden, vocabulary, rule, pl.program_id(0)
    )
    states = hidden[...]
    if rows % states.shape[0]:
        of_products = jnp.where(_ids(pl.program_id(1), of_products.shape, 1) < rows, of_products, 0)
        states = jnp.where(_ids(pl.program_id(1), states.shape, 0) < rows, states, 0)
    _add(total, output, of_products, states, 1)


def _logits(hidden, vocabulary, rule: LogitRule) -> Array:
    return rule.logits(_product(vocabulary[...], hidden[...], (1, 1)))


def _product_gradients(labels, log_normalizers, of_normalizers, of_picked, hidden, vocabulary, rule, block) -> Array:
    logits = _logits(hidden, vocabulary, rule)
    gradients = of_normalizers[...] * jnp.exp(logits - log_normalizers[...])
    gradients += jnp.where(_ids(block, logits.shape, 0) == labels[...], of_picked[...], 0.0)
    return rule.product_gradients(logits, gradients)


def _ids(block: Array, shape: tuple[int, ...], dimension: int) -> Array:
    return block * shape[dimension] + jax.lax.broadcasted_iota(jnp.int32, shape, dimension)


def _add(total, output, of_products: Array, factors: Array, contracted: int) -> None:
    """Adds a product to the total, which goes out with the last step of the grid's inner dimension."""

    @pl.when(pl.program_id(1) == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    total[...] += _product(of_products.astype(factors.dtype), factors, (contracted, 0))

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        output[...] = total[...].astype(output.dtype)


def _product(left: Array, right: Array, contracted: tuple[int, int]) -> Array:
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(
        left, right, dimensions, precision=precision(left.dtype), preferred_element_type=jnp.float32
    )


class _Call:
    """What the three calls have in common: sizes, blocks, and where each block lies."""

    def __init__(self, hidden: Array, vocabulary: Array, labels: Array, interpret: Interpret) -> None:
        self.rows, self.features = hidden.shape
        self.columns = vocabulary.shape[0]
        block = block_size(self.features, hidden.dtype)
        if block is None:
            raise ValueError(refusal(hidden))
        self.row_block, self.column_block = (min(block, _tiled(size)) for size in (self.rows, self.columns))
        self.row_blocks = pl.cdiv(self.rows, self.row_block)
        self.column_blocks = pl.cdiv(self.columns, self.column_block)
        self.axes = varying_axes(hidden, vocabulary, labels)
        self.interpret = interpret

    def row(self, *, by: int) -> pl.BlockSpec:
        """Of an array ``[1, N]``, the block numbered by a dimension of the grid."""
        return pl.BlockSpec((1, self.row_block), lambda *step: (0, step[by]))

    def hidden(self, *, by: int) -> pl.BlockSpec:
        """The same of an array ``[N, D]``."""
        return pl.BlockSpec((self.row_block, self.features), lambda *step: (step[by], 0))

    def vocabulary(self, *, by: int) -> pl.BlockSpec:
        """The same of an array ``[V, D]``."""
        return pl.BlockSpec((self.column_block, self.features), lambda *step: (step[by], 0))

    def __call__(
        self, kernel, *, grid, inputs, in_specs, products, out_specs, out_shapes, total_rows=None
    ) -> Sequence[Array]:
        inputs = [vary_over(x, self.axes) for x in inputs]
        mesh_type = jax.typeof(inputs[0]).manual_axis_type
        out_shape = [jax.ShapeDtypeStruct(*x, manual_axis_type=mesh_type) for x in out_shapes]
        return pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            cost_estimate=estimate_cost(
                (*inputs, *out_shape), pairs=self.rows * self.columns, features=self.features, products=products
            ),
            scratch_shapes=[pltpu.VMEM((total_rows, self.features), jnp.float32)] if total_rows else [],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
            ),
            interpret=self.interpret,
        )(*inputs)


def _tiled(size: int) -> int:
    return pl.cdiv(size, 128) * 128
