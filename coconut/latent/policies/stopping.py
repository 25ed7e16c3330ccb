"""When a block ends, as a draw: a stop head decides before each thought."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def stop_log_probs(
    logits: Float[Array, "B J"], counts: Int[Array, " B"], least: int, most: Int[Array, " B"] | int
) -> tuple[Float[Array, "B J"], Bool[Array, "B J"]]:
    """Log-probabilities of the decisions that ended blocks where they ended.

    Before each thought a head decides whether the block is over: ``j`` thoughts after its beginning it may be, from
    ``least`` on, and at ``most`` it is without a decision.

    Args:
      logits: of being over after ``j = 0, 1, ..`` thoughts.
      counts: thoughts of each row.
      least: thoughts before the first decision.
      most: thoughts behind the last one.

    Returns:
      The log-probability of each decision, 0 where there was none; and where there was one.
    """
    number = jnp.arange(logits.shape[1])
    decided = (number >= least) & (number <= counts[:, None]) & (number < jnp.reshape(most, (-1, 1)))
    chosen = jnp.where(number == counts[:, None], jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits))
    return jnp.where(decided, chosen, 0.0), decided


def bernoulli_entropy(logits: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Entropy of a decision of a given logit, in nats."""
    share = jax.nn.sigmoid(logits)
    return -(share * jax.nn.log_sigmoid(logits) + (1 - share) * jax.nn.log_sigmoid(-logits))
