"""What every implementation shares: how a product becomes a logit, and what is kept of a row of logits."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NO_LABEL = -1
"""The label of a row that picks no logit: it is ignored, or another shard of the vocabulary holds its label."""


class Statistics(NamedTuple):
    """What is kept of the logits of each row, over one shard of the vocabulary.

    Attributes:
      log_normalizers: log of the sum of the exponentials, float32.
      picked: the logit of the row's label, 0 where that is `NO_LABEL`, float32.
      best: the largest logit, float32; not differentiated.
      predictions: the first id that has it, int32.
    """

    log_normalizers: Float[Array, " N"]
    picked: Float[Array, " N"]
    best: Float[Array, " N"]
    predictions: Int[Array, " N"]


@dataclasses.dataclass(frozen=True)
class LogitRule:
    """A product ``x`` of hidden state and vocabulary becomes ``cap * tanh(scale * x / cap)``, or ``scale * x``."""

    scale: float = 1.0
    soft_cap: float | None = None

    def logits(self, products: Array) -> Array:
        """The logits of float32 products."""
        scaled = products if self.scale == 1.0 else products * self.scale
        return scaled if self.soft_cap is None else self.soft_cap * jnp.tanh(scaled / self.soft_cap)

    def product_gradients(self, logits: Array, gradients: Array) -> Array:
        """Gradients of the products from those of the logits."""
        if self.soft_cap is not None:
            gradients = gradients * (1.0 - jnp.square(logits / self.soft_cap))
        return gradients if self.scale == 1.0 else gradients * self.scale


def precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """Float32 factors are multiplied as float32, where a TPU's default would round them to bfloat16 first."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
