"""The portable form: a scan over blocks of the vocabulary, of which one is in memory at a time."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.linear_cross_entropy.statistics import Statistics
from pallas_kernels.logits import LogitRule, precision
from pallas_kernels.platform import vary_over, varying_axes

BLOCK_LOGITS = 2**23
"""Logits of a block: 32 MiB of float32. Smaller ones are slower on a CPU, larger ones no faster."""

NARROWEST_BLOCK = 128
"""Columns a block has at least: with more rows than `BLOCK_LOGITS` allows, it is about as large as their states."""


def block_columns(rows: int, columns: int) -> int:
    """Columns of the vocabulary in a block."""
    wanted = BLOCK_LOGITS // max(rows, 1) // NARROWEST_BLOCK * NARROWEST_BLOCK
    return min(columns, max(wanted, NARROWEST_BLOCK))


def statistics(
    hidden: Float[Array, "N D"], vocabulary: Float[Array, "V D"], labels: Int[Array, " N"], rule: LogitRule
) -> Statistics:
    """`Statistics` in one pass over the vocabulary, by the running maximum of Milakov and Gimelshein (2018)."""
    (rows, _), columns = hidden.shape, vocabulary.shape[0]
    block = block_columns(rows, columns)

    def step(carry: tuple[Array, ...], first: Array) -> tuple[tuple[Array, ...], None]:
        best, total, picked, predictions = carry
        start, weights = _block(vocabulary, first, block)
        logits = rule.logits(_products(hidden, weights))
        here = (labels >= first) & (labels < start + block)
        column = jnp.clip(labels - start, 0, block - 1)
        picked = jnp.where(here, jnp.take_along_axis(logits, column[:, None], 1)[:, 0], picked)
        ids = start + jnp.arange(block, dtype=jnp.int32)
        if columns % block:
            logits = jnp.where(ids >= first, logits, -jnp.inf)
        block_best = jnp.max(logits, 1)
        prediction = jnp.min(jnp.where(logits == block_best[:, None], ids, columns), 1)
        predictions = jnp.where(block_best > best, prediction, predictions)
        new_best = jnp.maximum(best, block_best)
        total = total * jnp.exp(best - new_best) + jnp.sum(jnp.exp(logits - new_best[:, None]), 1)
        return (new_best, total, picked, predictions), None

    zeros = vary_over(jnp.zeros(rows, jnp.float32), varying_axes(hidden, vocabulary, labels))
    start = (zeros - jnp.inf, zeros, zeros, zeros.astype(jnp.int32))
    (best, total, picked, predictions), _ = jax.lax.scan(step, start, jnp.arange(0, columns, block, dtype=jnp.int32))
    return Statistics(best + jnp.log(total), picked, best, predictions)


def gradients(
    hidden: Float[Array, "N D"],
    vocabulary: Float[Array, "V D"],
    labels: Int[Array, " N"],
    log_normalizers: Float[Array, " N"],
    normalizer_gradients: Float[Array, " N"],
    picked_gradients: Float[Array, " N"],
    rule: LogitRule,
) -> tuple[Float[Array, "N D"], Float[Array, "V D"]]:
    """Gradients of hidden states and vocabulary; every block of logits is formed once more."""
    columns = vocabulary.shape[0]
    block = block_columns(hidden.shape[0], columns)
    axes = varying_axes(hidden, vocabulary, labels)

    def step(carry: tuple[Array, Array], first: Array) -> tuple[tuple[Array, Array], None]:
        of_hidden, of_vocabulary = carry
        start, weights = _block(vocabulary, first, block)
        logits = rule.logits(_products(hidden, weights))
        ids = start + jnp.arange(block, dtype=jnp.int32)
        of_logits = normalizer_gradients[:, None] * jnp.exp(logits - log_normalizers[:, None])
        of_logits += jnp.where(labels[:, None] == ids, picked_gradients[:, None], 0.0)
        of_products = rule.product_gradients(logits, of_logits).astype(hidden.dtype)
        # The last block overlaps the one before: the same gradients are written again, but must not be added again.
        if columns % block:
            weights = jnp.where(ids[:, None] >= first, weights, 0)
        of_hidden += _product("nv,vd->nd", of_products, weights)
        of_weights = _product("nv,nd->vd", of_products, hidden).astype(vocabulary.dtype)
        return (of_hidden, jax.lax.dynamic_update_slice_in_dim(of_vocabulary, of_weights, start, 0)), None

    zeros = vary_over(jnp.zeros(hidden.shape, jnp.float32), axes), vary_over(jnp.zeros_like(vocabulary), axes)
    (of_hidden, of_vocabulary), _ = jax.lax.scan(step, zeros, jnp.arange(0, columns, block, dtype=jnp.int32))
    return of_hidden.astype(hidden.dtype), of_vocabulary


def _block(vocabulary: Array, first: Array, block: int) -> tuple[Array, Array]:
    """A block of the vocabulary and its first id: before ``first`` in the last block, which ends with the vocabulary.

    So no vocabulary is padded, which would take a copy of it.
    """
    start = jnp.minimum(first, vocabulary.shape[0] - block)
    return start, jax.lax.dynamic_slice_in_dim(vocabulary, start, block)


def _products(hidden: Array, weights: Array) -> Array:
    return _product("nd,vd->nv", hidden, weights)


def _product(equation: str, left: Array, right: Array) -> Array:
    return jnp.einsum(equation, left, right, precision=precision(left.dtype), preferred_element_type=jnp.float32)
