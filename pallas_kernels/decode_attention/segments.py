"""Attention over several segments of keys, from the attention over each."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

NO_COLUMN = -(2.0**100)
"""The log-normalizer of a query that sees no column: far below any other, and finite, so that gradients are."""


def merge_segments(
    outputs: Sequence[Array] | Float[Array, "P *B D"], log_normalizers: Sequence[Array] | Float[Array, "P *B"]
) -> tuple[Float[Array, "*B D"], Float[Array, "*B"]]:
    """Output and log-normalizer over all segments of keys together: each counts by its share of the normalizer.

    Args:
      outputs: of every segment, ``[..., D]``.
      log_normalizers: of every segment, ``[...]`` float32, `NO_COLUMN` where a query sees none of it.
    """
    together = jnp.stack(tuple(log_normalizers))
    total = jax.nn.logsumexp(together, axis=0)
    stacked = jnp.stack(tuple(outputs))
    merged = jnp.sum(jnp.exp(together - total)[..., None] * stacked, 0)
    return merged.astype(stacked.dtype), total
