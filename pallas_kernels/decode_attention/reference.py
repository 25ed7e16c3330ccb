"""The obvious form: all scores at once, in float32, differentiated by JAX."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention.segments import NO_COLUMN
from pallas_kernels.logits import LogitRule


def attend(
    queries: Float[Array, "B KH R D"],
    keys: Float[Array, "B KH S D"],
    values: Float[Array, "B KH S D"],
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    rule: LogitRule,
) -> tuple[Float[Array, "B KH R D"], Float[Array, "B KH R"]]:
    """Outputs and log-normalizers of the queries of each head of keys."""
    q, k, v = (x.astype(jnp.float32) for x in (queries, keys, values))
    seen = visible(keys.shape[2], start, length)
    scores = rule.logits(jnp.einsum("bkrd,bksd->bkrs", q, k, precision="highest"))
    scores = jnp.where(seen, scores, NO_COLUMN)
    # With no column at all, every one counts the same here: as nothing.
    peak = jnp.max(scores, -1, keepdims=True)
    weights = jnp.where(seen, jnp.exp(scores - peak), 0.0)
    total = jnp.sum(weights, -1, keepdims=True)
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    outputs = jnp.einsum("bkrs,bksd->bkrd", weights / total, v, precision="highest")
    log_normalizers = jnp.where(empty, NO_COLUMN, peak + jnp.log(total))
    return outputs.astype(queries.dtype), log_normalizers[..., 0]


def visible(columns: int, start: Int[Array, " B"], length: Int[Array, " B"]) -> Array:
    """Which columns a row's queries see, as bool ``[B, 1, 1, S]``."""
    column = jnp.arange(columns)
    return ((column >= start[:, None]) & (column < length[:, None]))[:, None, None]
