"""A head that draws the next thought from a normal distribution: CoLaR's (Tan et al. 2025, section 3.2)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from coconut.models.config import DecoderConfig
from coconut.models.decoder import Decoder


class GaussianHead(nnx.Module):
    """From a hidden state to the mean and the standard deviation of each component of the next thought.

    Two matrices with a GELU between them and LayerNorm behind them, and one matrix each for the mean and the logarithm
    of the deviation. Both are in units of ``factor``, the standard deviation of the decoder's token embeddings.

    Args:
      config: of the decoder.
      width: of the hidden layers.
      factor: see above. Static.
      rngs: for the parameters' start.
    """

    draws = True

    def __init__(self, config: DecoderConfig, width: int, *, factor: float, rngs: nnx.Rngs):
        D, dtype = config.embed_dim, jnp.dtype(config.param_dtype)

        def linear(inputs: int, outputs: int, axes: tuple[str, str]) -> nnx.Linear:
            return nnx.Linear(
                inputs,
                outputs,
                param_dtype=dtype,
                kernel_init=nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
                kernel_metadata={"axes": axes},
                bias_metadata={"axes": axes[1:]},
                rngs=rngs,
            )

        self.factor = factor
        self.up, self.across = linear(D, width, ("embed", "mlp")), linear(width, width, ("embed", "mlp"))
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, param_dtype=dtype, use_fast_variance=False, rngs=rngs)
        self.mean, self.log_deviation = (linear(width, D, ("mlp", "embed")) for _ in range(2))

    def distribution(
        self, decoder: Decoder, hidden: Float[Array, "*B D"]
    ) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
        """Mean and standard deviation, in units of ``factor`` and in at least float32."""
        x = hidden.astype(decoder.execution.accumulation_dtype)
        apply = lambda linear, x: x @ linear.kernel[...].astype(x.dtype) + linear.bias[...].astype(x.dtype)
        x = self.norm(apply(self.across, jax.nn.gelu(apply(self.up, x), approximate=False))).astype(x.dtype)
        return apply(self.mean, x), jnp.exp(apply(self.log_deviation, x))

    def __call__(
        self, decoder: Decoder, hidden: Float[Array, "*B D"], *, keys: Key[Array, "*B"] | None = None
    ) -> Float[Array, "*B D"]:
        """Draws a thought for each key; without keys it is the mean."""
        mean, deviation = self.distribution(decoder, hidden)
        if keys is not None:
            draw = lambda key: jax.random.normal(key, mean.shape[-1:], mean.dtype)
            for _ in keys.shape:
                draw = jax.vmap(draw)
            mean = mean + deviation * draw(keys)
        return (mean * self.factor).astype(hidden.dtype)
