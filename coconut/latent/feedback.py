"""How a hidden state becomes the next thought."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float

from coconut.models.decoder import Decoder


@runtime_checkable
class Feedback(Protocol):
    """A map from a hidden state to the next input embedding.

    A feedback is a JAX pytree; its leaves are parameters and receive gradients, as the decoder's do.
    """

    def __call__(self, decoder: Decoder, hidden: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Makes the next input from the hidden state (after the final norm) of the column before it."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Identity:
    """The hidden state itself: Coconut (Hao et al. 2024, section 3)."""

    def __call__(self, decoder: Decoder, hidden: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns ``hidden``."""
        del decoder
        return hidden
