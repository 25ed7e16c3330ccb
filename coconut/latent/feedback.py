"""How a hidden state becomes the next thought."""

import dataclasses
import math
from typing import Any, Literal, Protocol, no_type_check, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coconut.errors import CoconutError, check_fields
from coconut.models.config import DecoderConfig
from coconut.models.decoder import Decoder

FeedbackKind = Literal["identity", "scale", "match_norm", "norm"]


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """The hidden state times a constant.

    Attributes:
      factor: the constant. Static.
    """

    factor: float = dataclasses.field(metadata={"static": True})

    def __call__(self, decoder: Decoder, hidden: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns ``factor * hidden``, in the dtype of ``hidden``."""
        del decoder
        return hidden * self.factor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MatchNorm:
    """The hidden state's direction at the norm of a token embedding.

    The norm is ``factor`` times the mean norm of the whole embedding table: a mean over the tokens of a batch would
    make a row depend on its neighbours. The mean is a constant to the gradient. Through it every row of the table
    would get a tiny gradient at every step, which Adam scales up like any other: tokens that the data never hold
    would drift.

    Attributes:
      factor: norm of a thought over the mean norm of the table's rows. Static.
    """

    factor: float = dataclasses.field(metadata={"static": True})

    def prepared(self, decoder: Decoder) -> "Norm":
        """The same with the norm of a thought known."""
        table = jax.lax.stop_gradient(decoder.tokens.embedding[...]).astype(decoder.config.accumulation_dtype)
        norm = self.factor * jnp.linalg.norm(table, axis=-1).mean()
        return Norm(scale=norm * table.shape[-1] ** -0.5)

    def __call__(self, decoder: Decoder, hidden: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns ``hidden`` at its new norm, in its dtype, computed in at least float32; zero where it is zero."""
        return self.prepared(decoder)(decoder, hidden)


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values, cotangents and shardings
@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm:
    """RMSNorm (Zhang and Sennrich 2019) with a scale that is learnt.

    Attributes:
      scale: factor on each component after its root mean square was made 1; one for all where it is a scalar.
    """

    scale: Float[Any, "*D"]

    def __call__(self, decoder: Decoder, hidden: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns the normed ``hidden`` in its dtype, computed in at least float32; zero where it is zero."""
        dtype = decoder.config.accumulation_dtype
        x = hidden.astype(dtype)
        # The epsilon keeps gradients finite at zero, which is what rows that only fill a batch feed back.
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-12)
        return (x * self.scale.astype(dtype)).astype(hidden.dtype)


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedbackConfig:
    """What is done to a hidden state before it is fed back. The default is Coconut's own: nothing.

    The others are for models whose hidden states and token embeddings differ much in norm (``thought_norm`` and
    ``token_norm`` in ``metrics.jsonl`` tell). They change the method, and the parameters of a model that was trained
    with one mean nothing under another. Methods without thoughts do not feed back.

    Attributes:
      kind: ``identity``; ``scale``, times ``factor``; ``match_norm``, each thought rescaled to ``factor`` times the
        mean norm of the token embeddings (`MatchNorm`); ``norm``, RMSNorm whose learnt scale starts at ``factor``
        (`Norm`), so that thoughts start with the norm ``factor * D ** 0.5``.
      factor: see ``kind``; must be 1 for ``identity``.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    kind: FeedbackKind = "identity"
    factor: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise CoconutError(f"FeedbackConfig.factor = {self.factor!r}: must be positive")
        if self.kind == "identity" and self.factor != 1.0:
            raise CoconutError(
                f"FeedbackConfig.factor = {self.factor!r}: kind = 'identity' has none (did you mean 'scale'?)"
            )


def make_feedback(config: FeedbackConfig, decoder: DecoderConfig) -> Feedback:
    """The feedback of a config, with the parameters it starts from (in the decoder's ``param_dtype``). Traceable."""
    if config.kind == "norm":
        return Norm(scale=jnp.full(decoder.embed_dim, config.factor, jnp.dtype(decoder.param_dtype)))
    if config.kind == "match_norm":
        return MatchNorm(factor=float(config.factor))
    return Scale(factor=float(config.factor)) if config.kind == "scale" else Identity()


def prepare(feedback: Feedback, decoder: Decoder) -> Feedback:
    """The feedback with whatever depends on the decoder alone computed once, where it has a method ``prepared``.

    Thoughts are made in a loop, from which XLA does not take a sum over the whole embedding table.
    """
    prepared = getattr(feedback, "prepared", None)
    return feedback if prepared is None else prepared(decoder)
