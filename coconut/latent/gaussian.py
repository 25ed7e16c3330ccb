"""A head that draws the next thought from a normal distribution: CoLaR's (Tan et al. 2025, section 3.2)."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from coconut.latent.linear import apply_linear, make_uniform_linear
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

        linear = functools.partial(make_uniform_linear, dtype=dtype, rngs=rngs)
        self.factor = factor
        self.up, self.across = linear(D, width, ("embed", "mlp")), linear(width, width, ("embed", "mlp"))
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, param_dtype=dtype, use_fast_variance=False, rngs=rngs)
        self.mean, self.log_deviation = (linear(width, D, ("mlp", "embed")) for _ in range(2))

    def distribution(
        self, decoder: Decoder, hidden: Float[Array, "*B D"]
    ) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
        """Mean and standard deviation, in units of ``factor`` and in at least float32."""
        x = hidden.astype(decoder.execution.accumulation_dtype)
        hidden = apply_linear(self.across, jax.nn.gelu(apply_linear(self.up, x), approximate=False))
        x = self.norm(hidden).astype(x.dtype)
        return apply_linear(self.mean, x), jnp.exp(apply_linear(self.log_deviation, x))

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
