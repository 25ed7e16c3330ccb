"""How a product becomes a logit, and how precisely products are formed: the same in every op."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class LogitRule:
    """A product ``x`` of two vectors becomes ``cap * tanh(scale * x / cap)``, or ``scale * x``."""

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
