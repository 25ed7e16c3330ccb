"""A learnt map from a hidden state to the next thought: CODI's, and that of the methods that follow it."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from coconut.latent.linear import apply_linear, make_uniform_linear
from coconut.models.config import DecoderConfig
from coconut.models.decoder import Decoder


class Projection(nnx.Module):
    """Two matrices with a GELU between them and LayerNorm behind them (Shen et al. 2025, section 3.1).

    The GELU is the exact one and the LayerNorm's epsilon 1e-5, as in the original code; the text names neither.

    Args:
      config: of the decoder.
      width: of the hidden layer.
      factor: what the LayerNorm's scale starts at: thoughts start with the norm ``factor * D ** 0.5``.
      rngs: for the parameters' start: matrices uniform between ``+-1 / sqrt(inputs)``, as PyTorch draws them.
    """

    def __init__(self, config: DecoderConfig, width: int, *, factor: float = 1.0, rngs: nnx.Rngs):
        D, dtype = config.embed_dim, jnp.dtype(config.param_dtype)
        linear = functools.partial(make_uniform_linear, dtype=dtype, rngs=rngs)
        self.up, self.down = linear(D, width, ("embed", "mlp")), linear(width, D, ("mlp", "embed"))
        self.norm = nnx.LayerNorm(
            D,
            epsilon=1e-5,
            param_dtype=dtype,
            use_fast_variance=False,
            scale_init=nnx.initializers.constant(factor),
            scale_metadata={"axes": ("embed",)},
            bias_metadata={"axes": ("embed",)},
            rngs=rngs,
        )

    def __call__(
        self, decoder: Decoder, hidden: Float[Array, "*B D"], *, keys: Key[Array, "*B"] | None = None
    ) -> Float[Array, "*B D"]:
        """Returns the projected state, in the dtype of ``hidden``; the norm is computed in at least float32."""
        del keys
        x = hidden.astype(decoder.execution.compute_dtype)
        projected = apply_linear(self.down, jax.nn.gelu(apply_linear(self.up, x), approximate=False))
        return self.norm(projected.astype(decoder.execution.accumulation_dtype)).astype(hidden.dtype)
