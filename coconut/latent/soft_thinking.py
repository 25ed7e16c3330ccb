"""Soft Thinking (Zhang et al. 2025, arXiv 2505.15778): a thought is a mixture of token embeddings. Nothing is trained.

In the place of a written chain of thought the model is fed, step by step, the embeddings of the likeliest next tokens,
weighted by their probabilities. It goes on so until the token that ends its thinking is the likeliest one, or until it
has been sure of its next token for so long that nothing new is to be expected (the *cold stop*); then it writes.

With one token in the mixture, ``top_k = 1`` or a temperature near 0, this is greedy decoding.
"""

import dataclasses
import math
from typing import Literal, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from coconut.errors import CoconutError, check_fields
from coconut.latent.halting import HaltingConfig
from coconut.latent.mixture import blend
from coconut.models.decoder import Decoder


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftThinkingConfig:
    """How a model thinks softly where it would write its reasoning. The defaults are those published with the method.

    Attributes:
      temperature: what logits are divided by, for the mixture and for the cold stop.
      top_k: the mixture is of the likeliest so many tokens; None for all.
      top_p: of these the fewest that hold this share of their probability.
      min_p: of these the ones at least so likely as this share of the likeliest one.
      keep: of these at most so many, renormalised; None for all.
      noise: ``gumbel`` draws the weights: the softmax of the logarithms of the probabilities, each with Gumbel noise
        added, over ``noise_temperature``. Each row then has draws of its own.
      noise_temperature: see ``noise``.
      cold_entropy: the cold stop's bound on the entropy of the next token, in nats; None for no cold stop.
      cold_patience: for how many steps in a row the entropy has to be below it.
      most: steps of thinking at most.
      start: text that is read behind the question, to begin to think: ``<think>`` for a model that has it.
      end: text of one token that ends the thinking, and is read then: ``</think>``. Empty for a model that has none:
        then thinking ends where the likeliest token is EOS or one of ``stop_at``, and the model writes on with it.
      stop_at: texts of one token each that end the thinking, such as the mark of an answer.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    temperature: float = 0.6
    top_k: int | None = 30
    top_p: float = 0.95
    min_p: float = 0.001
    keep: int | None = 10
    noise: Literal["none", "gumbel"] = "none"
    noise_temperature: float = 0.5
    cold_entropy: float | None = 0.01
    cold_patience: int = 256
    most: int = 1024
    start: str = ""
    end: str = ""
    stop_at: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)

        def reject(field: str, why: str) -> None:
            raise CoconutError(f"SoftThinkingConfig.{field} = {getattr(self, field)!r}: {why}")

        for field in ("temperature", "noise_temperature"):
            if not 0 < getattr(self, field) < math.inf:
                reject(field, "must be positive")
        for field in ("top_k", "keep"):
            value = getattr(self, field)
            if value is not None and value < 1:
                reject(field, "must be None or at least 1")
        if not 0 < self.top_p <= 1:
            reject("top_p", "must be above 0, and at most 1")
        if not 0 <= self.min_p <= 1:
            reject("min_p", "must be between 0 and 1")
        if self.cold_entropy is not None and not 0 < self.cold_entropy < math.inf:
            reject("cold_entropy", "must be None or positive")
        for field in ("cold_patience", "most"):
            if getattr(self, field) < 1:
                reject(field, "must be at least 1")

    @property
    def halting(self) -> HaltingConfig:
        """When the thinking is over."""
        tokens = ("end", "eos") if self.end else ("eos",)
        common = {"least": 0, "most": self.most, "room": self.most, "tokens": tokens, "texts": self.stop_at}
        if self.cold_entropy is None:
            return HaltingConfig(stop="token", **common)
        return HaltingConfig(
            stop="entropy",
            threshold=self.cold_entropy,
            patience=self.cold_patience,
            temperature=self.temperature,
            **common,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftThinking:
    """The feedback of Soft Thinking; it has no parameters.

    Attributes:
      config: how the mixture is made. Static.
      vocab_size: ids that may be in it, from 0; None for every row of the embedding. Static.
    """

    config: SoftThinkingConfig = dataclasses.field(metadata={"static": True})
    vocab_size: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def draws(self) -> bool:
        """Whether keys are needed."""
        return self.config.noise != "none"

    def __call__(
        self, decoder: Decoder, hidden: Float[Array, "*B D"], *, keys: Key[Array, "*B"] | None = None
    ) -> Float[Array, "*B D"]:
        """Returns the mean of the embeddings of the mixture's tokens, computed in at least float32, in their dtype."""
        weights, tokens = mixture(decoder.unembed(hidden)[..., : self.vocab_size], self.config, keys)
        if tokens is None:
            return blend(decoder, weights)
        rows = decoder.embed(tokens.reshape(*tokens.shape[:1], -1)).reshape(*tokens.shape, -1)
        return jnp.einsum("...k,...kd->...d", weights, rows.astype(weights.dtype)).astype(rows.dtype)


def mixture(
    logits: Float[Array, "*B V"], config: SoftThinkingConfig, keys: Key[Array, "*B"] | None = None
) -> tuple[Float[Array, "*B K"], Int[Array, "*B K"] | None]:
    """The weights of a mixture and its tokens, likeliest first; of the whole vocabulary in its order where it is None.

    Each step keeps some of the tokens that the step before has left, and renormalises: the likeliest ``top_k``, those
    of ``top_p`` (nucleus sampling's, Holtzman et al. 2020), those of ``min_p``, and ``keep``. What is dropped weighs
    nothing.
    """
    shares = jax.nn.softmax(logits / config.temperature)
    if config.top_k is None and config.top_p == 1.0 and not config.min_p and config.keep is None:
        return _perturbed(shares, config, keys), None
    shares, tokens = jax.lax.top_k(shares, min(config.top_k or logits.shape[-1], logits.shape[-1]))
    shares /= shares.sum(-1, keepdims=True)
    # The token that crosses the bound is kept, and so the first one always is.
    shares = _only(shares, jnp.cumsum(shares, -1) - shares < config.top_p)
    shares = _only(shares, shares >= config.min_p * shares[..., :1])
    shares, tokens = shares[..., : config.keep], tokens[..., : config.keep]
    return _perturbed(shares / shares.sum(-1, keepdims=True), config, keys), tokens


def _only(shares: Float[Array, "*B K"], kept: Array) -> Float[Array, "*B K"]:
    shares = jnp.where(kept, shares, 0.0)
    return shares / shares.sum(-1, keepdims=True)


def _perturbed(
    shares: Float[Array, "*B K"], config: SoftThinkingConfig, keys: Key[Array, "*B"] | None
) -> Float[Array, "*B K"]:
    """The weights with the config's noise; what weighs nothing stays so."""
    if config.noise == "none":
        return shares
    if keys is None:
        raise CoconutError(f"SoftThinkingConfig.noise = {config.noise!r}: draws, and was given no keys")
    draw = lambda key: jax.random.gumbel(key, shares.shape[-1:], shares.dtype)
    noise = jax.vmap(draw)(keys.reshape(-1)).reshape(shares.shape)
    return jax.nn.softmax((jnp.log(shares) + noise) / config.noise_temperature)
