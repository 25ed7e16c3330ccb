"""A token and a soft state through a gate: HRPO's thought (Yue et al. 2025, arXiv 2505.18454)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from coconut.latent.linear import apply_linear, make_uniform_linear
from coconut.models.config import DecoderConfig
from coconut.models.decoder import Decoder

_SHARPNESS = 8.0


class Gate(nnx.Module):
    """How much of the next token's embedding, and of the mean of what else it could be, a component is fed.

    ``a = exp(-8 softplus(-lambda) r)`` with ``r = sigmoid(W_r e + b_r)``; the thought is ``a e + sqrt(1 - a^2) i s``
    with ``i = sigmoid(W_i e + b_i)``, for the embedding ``e`` of the likeliest token and the soft state ``s``. At the
    start ``a`` is near plain tokens. `coconut.latent.policies.tokens.GatedToken` draws the token.

    Args:
      config: of the decoder.
      temperature: what logits are divided by. Static.
      rngs: for the parameters' start.
    """

    def __init__(self, config: DecoderConfig, *, temperature: float, rngs: nnx.Rngs):
        D, dtype = config.embed_dim, jnp.dtype(config.param_dtype)
        self.temperature = temperature
        self.reset, self.input = (make_uniform_linear(D, D, ("embed", "mlp"), dtype=dtype, rngs=rngs) for _ in range(2))
        # In float32: what is left of 1 here is less than bfloat16 can tell from 0.
        kept = jax.random.uniform(rngs.params(), (D,), jnp.float32, 0.99, 0.999)
        self.decay = nnx.Param(-jnp.log(jnp.expm1(-jnp.log(kept) / _SHARPNESS)).astype(dtype), axes=("embed",))

    def soft_state(self, decoder: Decoder, shares: Float[Array, "*B V"]) -> Float[Array, "*B D"]:
        """The mean embedding under the probabilities, over their norm: HRPO's code, which so keeps an embedding's size.

        The paper has the mean itself.
        """
        table = decoder.embed(jnp.arange(shares.shape[-1])).astype(shares.dtype)
        return shares @ table / jnp.linalg.norm(shares, axis=-1, keepdims=True)

    def mix(self, embedded: Float[Array, "*B D"], soft: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """What a column is fed, in the dtype of the embedding."""
        wide = embedded.astype(soft.dtype)
        reset = jax.nn.sigmoid(apply_linear(self.reset, wide))
        kept = jnp.exp(-_SHARPNESS * jax.nn.softplus(-self.decay[...].astype(soft.dtype)) * reset)
        added = jnp.sqrt(1 - jnp.square(kept) + 1e-8) * jax.nn.sigmoid(apply_linear(self.input, wide))
        return (kept * wide + added * soft).astype(embedded.dtype)

    def __call__(
        self, decoder: Decoder, hidden: Float[Array, "*B D"], *, keys: Key[Array, "*B"] | None = None
    ) -> Float[Array, "*B D"]:
        """The thought of the likeliest token; its choice has no gradient."""
        del keys
        shares = jax.nn.softmax(decoder.unembed(hidden) / self.temperature)
        likeliest = decoder.embed(jnp.argmax(shares, -1).astype(jnp.int32))
        return self.mix(likeliest, self.soft_state(decoder, shares))
