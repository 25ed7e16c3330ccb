"""Attention as it is defined, in float32 (or wider), with all scores held at once. Slow; what the others must equal."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.flash_attention.visibility import HIDDEN, NO_KEYS, Options, Rows, sees


def attend(
    q: Float[Array, "B H T D"], k: Float[Array, "B M S D"], v: Float[Array, "B M S D"], rows: Rows, options: Options
) -> tuple[Float[Array, "B H T D"], Float[Array, "B H T"]]:
    """The weighted values in the dtype of ``q``, and the log-normalizers; differentiable as it stands."""
    (B, H, T, D), (M, S) = q.shape, k.shape[1:3]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    column = jnp.arange(S, dtype=jnp.int32)
    held = (column >= rows.start[:, None]) & (column < rows.end[:, None])
    key, value = (jnp.where(held[:, None, :, None], x.astype(wide), 0.0) for x in (k, v))
    query = q.astype(wide).reshape(B, M, H // M, T, D)

    scores = options.scale * jnp.einsum("bmgtd,bmsd->bmgts", query, key, precision="highest")
    if options.soft_cap is not None:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
    position = rows.offset[:, None] + jnp.arange(T, dtype=jnp.int32)
    seen = sees(
        options, position[:, :, None], column[None, None, :], rows.start[:, None, None], rows.end[:, None, None]
    )
    if rows.query_segments is not None:
        seen &= rows.query_segments[:, :, None] == rows.key_segments[:, None, :]
    scores = jnp.where(seen[:, None, None], scores, HIDDEN)

    peak = jax.lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), NO_KEYS))
    weights = jnp.exp(scores - peak)
    total = weights.sum(-1, keepdims=True)
    some = total > 0.0
    total = jnp.where(some, total, 1.0)
    out = jnp.einsum("bmgts,bmsd->bmgtd", weights / total, value, precision="highest")
    normalizers = jnp.where(some, peak + jnp.log(total), NO_KEYS)
    return out.reshape(B, H, T, D).astype(q.dtype), normalizers.reshape(B, H, T)
