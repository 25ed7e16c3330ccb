"""The obvious form: all logits at once, in float32, differentiated by JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.linear_cross_entropy.statistics import NO_LABEL, Statistics
from pallas_kernels.logits import LogitRule


def statistics(
    hidden: Float[Array, "N D"], vocabulary: Float[Array, "V D"], labels: Int[Array, " N"], rule: LogitRule
) -> Statistics:
    """Statistics of ``[N, V]`` logits, which are formed and kept for the backward pass."""
    factors = (x.astype(jnp.float32) for x in (hidden, vocabulary))
    logits = rule.logits(jnp.einsum("nd,vd->nv", *factors, precision="highest"))
    known = labels != NO_LABEL
    picked = jnp.take_along_axis(logits, jnp.where(known, labels, 0)[:, None], 1)[:, 0]
    return Statistics(
        log_normalizers=jax.nn.logsumexp(logits, axis=1),
        picked=jnp.where(known, picked, 0.0),
        best=jax.lax.stop_gradient(jnp.max(logits, 1)),
        predictions=jnp.argmax(logits, 1).astype(jnp.int32),
    )
