"""How a hidden state becomes the next thought. Feedbacks have a register: somebody's own is one more entry."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, no_type_check, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from coconut.errors import CoconutError, check_fields
from coconut.latent.gated import Gate
from coconut.latent.gaussian import GaussianHead
from coconut.latent.mixture import Mixture
from coconut.latent.projection import Projection
from coconut.models.config import DecoderConfig
from coconut.models.decoder import Decoder


@runtime_checkable
class Feedback(Protocol):
    """A map from a hidden state to the next input embedding.

    A feedback is a JAX pytree; its leaves are parameters and receive gradients, as the decoder's do. A leaf that is an
    `nnx.Param` may say its logical axes (``nnx.Param(value, axes=("embed",))``, see `coconut.sharding.RULES`); others
    lie whole on every device.

    A feedback that draws says so by an attribute ``draws = True`` of its class; others are given no keys.

    A feedback may be called twice for a thought, with the same arguments: in training once alone and once beside its
    neighbours. It must treat every column alike, so that both give the same.
    """

    def __call__(
        self, decoder: Decoder, hidden: Float[Array, "*B D"], *, keys: Key[Array, "*B"] | None = None
    ) -> Float[Array, "*B D"]:
        """Makes the next input from the hidden state (after the final norm) of the column before it.

        Args:
          decoder: the decoder; what it would write next are the logits ``decoder.unembed(hidden)``.
          hidden: the states.
          keys: a key for each of them, which depends on its row and its position there alone; None where nothing is
            drawn.
        """
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Identity:
    """The hidden state itself: Coconut (Hao et al. 2024, section 3)."""

    def __call__(
        self, decoder: Decoder, hidden: Float[Array, "*B D"], *, keys: Key[Array, "*B"] | None = None
    ) -> Float[Array, "*B D"]:
        """Returns ``hidden``."""
        del decoder, keys
        return hidden


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """The hidden state times a constant.

    Attributes:
      factor: the constant. Static.
    """

    factor: float = dataclasses.field(metadata={"static": True})

    def __call__(
        self, decoder: Decoder, hidden: Float[Array, "*B D"], *, keys: Key[Array, "*B"] | None = None
    ) -> Float[Array, "*B D"]:
        """Returns ``factor * hidden``, in the dtype of ``hidden``."""
        del decoder, keys
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

    def with_constants(self, decoder: Decoder) -> "Norm":
        """The same with the norm of a thought known."""
        table = jax.lax.stop_gradient(decoder.input_table(decoder.execution.accumulation_dtype))
        norm = self.factor * jnp.linalg.norm(table, axis=-1).mean()
        return Norm(scale=norm * table.shape[-1] ** -0.5)

    def __call__(
        self, decoder: Decoder, hidden: Float[Array, "*B D"], *, keys: Key[Array, "*B"] | None = None
    ) -> Float[Array, "*B D"]:
        """Returns ``hidden`` at its new norm, in its dtype, computed in at least float32; zero where it is zero."""
        return self.with_constants(decoder)(decoder, hidden, keys=keys)


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values, cotangents and shardings
@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm:
    """RMSNorm (Zhang and Sennrich 2019) with a scale that is learnt.

    Attributes:
      scale: factor on each component after its root mean square was made 1, a parameter; or one for all, a scalar.
    """

    scale: Any

    def __call__(
        self, decoder: Decoder, hidden: Float[Array, "*B D"], *, keys: Key[Array, "*B"] | None = None
    ) -> Float[Array, "*B D"]:
        """Returns the normed ``hidden`` in its dtype, computed in at least float32; zero where it is zero."""
        del keys
        dtype = decoder.execution.accumulation_dtype
        x = hidden.astype(dtype)
        # The epsilon keeps gradients finite at zero, which is what rows that only fill a batch feed back.
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-12)
        return (x * self.scale[...].astype(dtype)).astype(hidden.dtype)


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
        (`Norm`), so that thoughts start with the norm ``factor * D ** 0.5``; ``projection``, two matrices and LayerNorm
        whose learnt scale starts at ``factor`` (`coconut.latent.projection.Projection`), CODI's; ``gaussian``, a draw
        in units of ``factor`` (`coconut.latent.gaussian.GaussianHead`), CoLaR's; ``mixture``, the mean embedding of the
        next token at the temperature ``factor`` (`coconut.latent.mixture.Mixture`), CoT2's; ``gated``, that and the
        likeliest token through a gate (`coconut.latent.gated.Gate`), HRPO's; or one of `register_feedback`.
      factor: see ``kind``; must be 1 for ``identity``.
      options: what a feedback is told besides, by name: ``width`` of the hidden layers of ``projection`` and
        ``gaussian`` (``D`` if it is not given), and whatever one of your own takes.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    kind: str = "identity"
    factor: float = 1.0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kind not in FEEDBACKS:
            nearest = difflib.get_close_matches(self.kind, FEEDBACKS, 1, 0.0)[0]
            raise CoconutError(
                f"FeedbackConfig.kind = {self.kind!r}: did you mean {nearest!r}? Known: {', '.join(FEEDBACKS)}"
            )
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise CoconutError(f"FeedbackConfig.factor = {self.factor!r}: must be positive")
        if self.kind == "identity" and self.factor != 1.0:
            raise CoconutError(
                f"FeedbackConfig.factor = {self.factor!r}: kind = 'identity' has none (did you mean 'scale'?)"
            )
        known = _OWN_OPTIONS.get(FEEDBACKS[self.kind])
        if known is not None and (unknown := sorted(set(self.options) - set(known))):
            names = ", ".join(known) or "none"
            raise CoconutError(
                f"FeedbackConfig.options = {dict(self.options)!r}: kind = {self.kind!r} has no {unknown[0]!r}; it has: "
                f"{names}"
            )
        width = self.options.get("width", 1) if known else 1
        if type(width) is not int or width < 1:
            raise CoconutError(f"FeedbackConfig.options: width = {width!r}: must be an integer of at least 1")


MakeFeedback = Callable[[FeedbackConfig, DecoderConfig, Key[Array, ""]], Feedback]
"""(config, the decoder's config, key) -> a feedback with the parameters it starts from. Traceable by JAX."""


def _identity(config: FeedbackConfig, decoder: DecoderConfig, key: Key[Array, ""]) -> Feedback:
    del config, decoder, key
    return Identity()


def _scale(config: FeedbackConfig, decoder: DecoderConfig, key: Key[Array, ""]) -> Feedback:
    del decoder, key
    return Scale(factor=float(config.factor))


def _match_norm(config: FeedbackConfig, decoder: DecoderConfig, key: Key[Array, ""]) -> Feedback:
    del decoder, key
    return MatchNorm(factor=float(config.factor))


def _norm(config: FeedbackConfig, decoder: DecoderConfig, key: Key[Array, ""]) -> Feedback:
    del key
    scale = jnp.full(decoder.embed_dim, config.factor, jnp.dtype(decoder.param_dtype))
    return Norm(scale=nnx.Param(scale, axes=("embed",)))


def _projection(config: FeedbackConfig, decoder: DecoderConfig, key: Key[Array, ""]) -> Feedback:
    width = config.options.get("width", decoder.embed_dim)
    return Projection(decoder, width, factor=float(config.factor), rngs=nnx.Rngs(key))


def _gaussian(config: FeedbackConfig, decoder: DecoderConfig, key: Key[Array, ""]) -> Feedback:
    width = config.options.get("width", decoder.embed_dim)
    return GaussianHead(decoder, width, factor=float(config.factor), rngs=nnx.Rngs(key))


def _mixture(config: FeedbackConfig, decoder: DecoderConfig, key: Key[Array, ""]) -> Feedback:
    del decoder, key
    return Mixture(temperature=float(config.factor))


def _gated(config: FeedbackConfig, decoder: DecoderConfig, key: Key[Array, ""]) -> Feedback:
    return Gate(decoder, temperature=float(config.factor), rngs=nnx.Rngs(key))


_OWN_OPTIONS: Mapping[Any, tuple[str, ...]] = {
    _identity: (),
    _scale: (),
    _match_norm: (),
    _norm: (),
    _projection: ("width",),
    _gaussian: ("width",),
    _mixture: (),
    _gated: (),
}
"""The options of each feedback of ours."""

FEEDBACKS: dict[str, MakeFeedback] = {
    "identity": _identity,
    "scale": _scale,
    "match_norm": _match_norm,
    "norm": _norm,
    "projection": _projection,
    "gaussian": _gaussian,
    "mixture": _mixture,
    "gated": _gated,
}
"""Feedbacks by the ``kind`` of their config."""


def register_feedback(name: str, make: MakeFeedback) -> None:
    """Adds a feedback: ``FeedbackConfig.kind = name`` chooses it.

    Raises:
      CoconutError: there is another one of that name.
    """
    if FEEDBACKS.get(name, make) is not make:
        raise CoconutError(f"a feedback named {name!r} is registered already")
    FEEDBACKS[name] = make


def make_feedback(config: FeedbackConfig, decoder: DecoderConfig, key: Key[Array, ""]) -> Feedback:
    """The feedback of a config, with the parameters it starts from (in the decoder's ``param_dtype``). Traceable."""
    return FEEDBACKS[config.kind](config, decoder, key)


def draws(feedback: Feedback) -> bool:
    """Whether a feedback draws, and needs keys."""
    return bool(getattr(feedback, "draws", False))


def with_constants(feedback: Feedback, decoder: Decoder) -> Feedback:
    """The feedback with whatever depends on the decoder alone computed once, where it has a method ``with_constants``.

    Thoughts are made in a loop, from which XLA does not take a sum over the whole embedding table.
    """
    own = getattr(feedback, "with_constants", None)
    return feedback if own is None else own(decoder)
