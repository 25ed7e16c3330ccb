"""A thought as the mean embedding of the next token: what CoT2 calls a continuous token (arXiv 2505.23648)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from coconut.models.decoder import Decoder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """The mean of all token embeddings, weighed by how likely each token is next. It has no parameters.

    So what may be written next is thought all at once. Policies that draw tokens or mix them
    (`coconut.latent.policies.tokens`) make a draw of it. Each thought reads the whole table twice.

    Attributes:
      temperature: what logits are divided by. Static.
    """

    temperature: float = dataclasses.field(metadata={"static": True})

    def __call__(
        self, decoder: Decoder, hidden: Float[Array, "*B D"], *, keys: Key[Array, "*B"] | None = None
    ) -> Float[Array, "*B D"]:
        """Returns the mean, computed in at least float32, in the embeddings' dtype."""
        del keys
        return blend(decoder, jax.nn.softmax(decoder.unembed(hidden) / self.temperature))


def blend(decoder: Decoder, weights: Float[Array, "*B V"]) -> Float[Array, "*B D"]:
    """The weighted sum of the embeddings of the first ``V`` ids, accumulated in at least float32."""
    # As `Decoder.embed` reads them, so that all of the weight on one token gives what reading that token gives.
    table = decoder.embed(jnp.arange(weights.shape[-1]))
    blended = jnp.matmul(
        weights.astype(table.dtype), table, preferred_element_type=decoder.execution.accumulation_dtype
    )
    return blended.astype(table.dtype)
