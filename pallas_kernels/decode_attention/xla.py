"""The portable form, with grouped heads as further queries, so that no key is repeated.

Scores are ``[B, H, T, S]`` float32: with a few queries no more than the cache itself, so they are not split. The
backward pass forms them again.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention.reference import visible
from pallas_kernels.decode_attention.segments import NO_COLUMN
from pallas_kernels.logits import LogitRule, precision


def attend(
    queries: Float[Array, "B KH R D"],
    keys: Float[Array, "B KH S D"],
    values: Float[Array, "B KH S D"],
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    rule: LogitRule,
) -> tuple[Float[Array, "B KH R D"], Float[Array, "B KH R"]]:
    """Outputs and log-normalizers of the queries of each head of keys."""
    seen = visible(keys.shape[2], start, length)
    scores = jnp.where(seen, rule.logits(_product("bkrd,bksd->bkrs", queries, keys)), NO_COLUMN)
    peak = jnp.max(scores, -1, keepdims=True)
    weights = jnp.where(seen, jnp.exp(scores - peak), 0.0)
    total = jnp.sum(weights, -1, keepdims=True)
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    outputs = _product("bkrs,bksd->bkrd", weights.astype(values.dtype), values) / total
    return outputs.astype(queries.dtype), jnp.where(empty, NO_COLUMN, peak + jnp.log(total))[..., 0]


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
) -> tuple[Float[Array, "B KH R D"], Float[Array, "B KH S D"], Float[Array, "B KH S D"]]:
    """Gradients of queries, keys and values.

    ``log_normalizers`` are those of `attend` and ``of_outputs`` the gradients of its outputs; ``shift`` is output times
    gradient, summed over features, less the gradient of the log-normalizer (Dao 2023, section 3.2, extended by it).
    """
    dtype = keys.dtype
    scores = rule.logits(_product("bkrd,bksd->bkrs", queries, keys))
    seen = visible(keys.shape[2], start, length)
    weights = jnp.where(seen, jnp.exp(scores - log_normalizers[..., None]), 0.0)
    of_scores = weights * (_product("bkrd,bksd->bkrs", of_outputs, values) - shift[..., None])
    of_products = rule.product_gradients(scores, of_scores).astype(dtype)
    return (
        _product("bkrs,bksd->bkrd", of_products, keys).astype(dtype),
        _product("bkrs,bkrd->bksd", of_products, queries).astype(dtype),
        _product("bkrs,bkrd->bksd", weights.astype(dtype), of_outputs).astype(dtype),
    )


def _product(equation: str, left: Array, right: Array) -> Array:
    return jnp.einsum(equation, left, right, precision=precision(left.dtype), preferred_element_type=jnp.float32)
