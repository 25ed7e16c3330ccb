"""A Pallas kernel for NVIDIA GPUs, through Triton, for the forward pass; the backward pass is that of `xla`.

Why Triton, which JAX is retiring: Mosaic GPU (`plgpu.kernel`) is the successor, but its matrix instructions begin with
Hopper, and a kernel in it says which warps copy and which multiply, by layouts that only the hardware checks. This one
is of the portable sort: for Ampere and later, lowered and interpreted anywhere. On an H100 it takes 0.87 of the time
of `xla` and 0.62 of that of full logits (experiments/results/on_gpu).

Why half: with all features of a block's states and weights, the sums of the backward pass do not fit into registers,
and atomic additions would make gradients differ from run to run. In `xla` they are matrix products of large blocks,
which is what cuBLAS is for.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.linear_cross_entropy import xla
from pallas_kernels.linear_cross_entropy.statistics import Statistics
from pallas_kernels.logits import LogitRule, precision
from pallas_kernels.platform import vary_over, varying_axes

ROWS, COLUMNS = 64, 128
PROGRAMS = 256
"""Programs wanted at least: few rows are spread over the device by splitting the vocabulary."""


def refusal(hidden: Array) -> str | None:
    """Why this kernel does not take these hidden states: it takes all."""
    del hidden
    return None


def statistics(
    hidden: Float[Array, "N D"],
    vocabulary: Float[Array, "V D"],
    labels: Int[Array, " N"],
    rule: LogitRule,
    interpret: bool = False,
) -> Statistics:
    """`Statistics` of parts of the vocabulary by the kernel, then of the whole."""
    rows, columns = hidden.shape[0], vocabulary.shape[0]
    row_blocks = pl.cdiv(rows, ROWS)
    wanted = max(1, PROGRAMS // row_blocks)
    part = pl.cdiv(pl.cdiv(columns, wanted), COLUMNS) * COLUMNS
    parts = pl.cdiv(columns, part)
    axes = varying_axes(hidden, vocabulary, labels)
    inputs = [vary_over(x, axes) for x in (labels, hidden, vocabulary)]
    mesh_type = jax.typeof(inputs[0]).manual_axis_type
    outputs = pl.pallas_call(
        functools.partial(_kernel, rule=rule, part=part),
        grid=(row_blocks, parts),
        out_specs=[pl.BlockSpec((None, ROWS), lambda row, part: (part, row))] * 4,
        out_shape=[
            jax.ShapeDtypeStruct((parts, row_blocks * ROWS), dtype, manual_axis_type=mesh_type)
            for dtype in (jnp.float32, jnp.float32, jnp.float32, jnp.int32)
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
    )(*inputs)
    log_normalizers, picked, best, predictions = (x[:, :rows] for x in outputs)
    first_best = jnp.argmax(best, 0)[None]
    return Statistics(
        log_normalizers=jax.nn.logsumexp(log_normalizers, 0),
        picked=jnp.sum(picked, 0),
        best=jnp.max(best, 0),
        predictions=jnp.take_along_axis(predictions, first_best, 0)[0],
    )


def gradients(*residuals, interpret: bool = False) -> tuple[Float[Array, "N D"], Float[Array, "V D"]]:
    """Those of `xla.gradients`, whose arguments these are."""
    del interpret
    return xla.gradients(*residuals)


def _kernel(labels, hidden, vocabulary, log_normalizers, picked, best, predictions, *, rule: LogitRule, part: int):
    """One block of rows over one part of the vocabulary. Indices behind an end are those of the last element."""
    (rows, features), columns = hidden.shape, vocabulary.shape[0]
    chunk = 32 if hidden.dtype == jnp.float32 else 64
    row = jnp.minimum(pl.program_id(0) * ROWS + jnp.arange(ROWS, dtype=jnp.int32), rows - 1)
    label = labels[row]
    start = pl.program_id(1) * part

    def add_features(ids: Array, index: Array, products: Array) -> Array:
        feature = index * chunk + jnp.arange(chunk, dtype=jnp.int32)
        inside = feature < features
        if features % chunk:
            feature = jnp.minimum(feature, features - 1)
        states, weights = hidden[row[:, None], feature[None, :]], vocabulary[ids[:, None], feature[None, :]]
        if features % chunk:
            states, weights = (jnp.where(inside[None, :], x, 0) for x in (states, weights))
        return products + jax.lax.dot_general(
            states,
            weights,
            (((1,), (1,)), ((), ())),
            precision=precision(states.dtype),
            preferred_element_type=jnp.float32,
        )

    def add_block(index: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        old_best, total, picked, prediction = carry
        ids = start + index * COLUMNS + jnp.arange(COLUMNS, dtype=jnp.int32)
        products = jax.lax.fori_loop(
            0,
            pl.cdiv(features, chunk),
            functools.partial(add_features, jnp.minimum(ids, columns - 1)),
            jnp.zeros((ROWS, COLUMNS), jnp.float32),
        )
        logits = rule.logits(products)
        if columns % COLUMNS:
            logits = jnp.where(ids[None, :] < columns, logits, -jnp.inf)
        picked += jnp.sum(jnp.where(label[:, None] == ids[None, :], logits, 0.0), 1)
        block_best = jnp.max(logits, 1)
        block_prediction = jnp.min(jnp.where(logits == block_best[:, None], ids[None, :], columns), 1)
        new_best = jnp.maximum(old_best, block_best)
        total = total * jnp.exp(old_best - new_best) + jnp.sum(jnp.exp(logits - new_best[:, None]), 1)
        return new_best, total, picked, jnp.where(block_best > old_best, block_prediction, prediction)

    zeros = jnp.zeros(ROWS, jnp.float32)
    # Not pl.cdiv, which divides an int32 by an int64 where 64 bits are enabled.
    blocks = (jnp.minimum(part, columns - start) + COLUMNS - 1) // COLUMNS
    carry = (jnp.full(ROWS, -jnp.inf, jnp.float32), zeros, zeros, jnp.zeros(ROWS, jnp.int32))
    best[...], total, picked[...], predictions[...] = jax.lax.fori_loop(0, blocks, add_block, carry)
    log_normalizers[...] = best[...] + jnp.log(total)
