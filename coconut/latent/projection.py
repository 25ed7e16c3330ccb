"""A learnt map from a hidden state to the next thought: CODI's, and that of the methods that follow it."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

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
        axes = lambda *names: {"axes": names}
        uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.up = nnx.Linear(
            *(D, width),
            param_dtype=dtype,
            kernel_init=uniform,
            kernel_metadata=axes("embed", "mlp"),
            bias_metadata=axes("mlp"),
            rngs=rngs,
        )
        self.down = nnx.Linear(
            *(width, D),
            param_dtype=dtype,
            kernel_init=uniform,
            kernel_metadata=axes("mlp", "embed"),
            bias_metadata=axes("embed"),
            rngs=rngs,
        )
        self.norm = nnx.LayerNorm(
            D,
            epsilon=1e-5,
            param_dtype=dtype,
            use_fast_variance=False,
            scale_init=nnx.initializers.constant(factor),
            scale_metadata=axes("embed"),
            bias_metadata=axes("embed"),
            rngs=rngs,
        )

    def __call__(
        self, decoder: Decoder, hidden: Float[Array, "*B D"], *, keys: Key[Array, "*B"] | None = None
    ) -> Float[Array, "*B D"]:
        """Returns the projected state, in the dtype of ``hidden``; the norm is computed in at least float32."""
        del keys
        dtype = decoder.execution.compute_dtype
        apply = lambda linear, x: x.astype(dtype) @ linear.kernel[...].astype(dtype) + linear.bias[...].astype(dtype)
        projected = apply(self.down, jax.nn.gelu(apply(self.up, hidden), approximate=False))
        return self.norm(projected.astype(decoder.execution.accumulation_dtype)).astype(hidden.dtype)
