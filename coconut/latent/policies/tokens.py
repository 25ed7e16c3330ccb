"""Policies that make a thought of tokens: a noisy mixture of the likeliest, the mean of some drawn ones, a gate.

What is drawn from is the distribution of the next token that the state before the thought gives.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from coconut.errors import CoconutError, check_fields
from coconut.latent.feedback import Feedback
from coconut.latent.gated import Gate
from coconut.latent.halting import token_entropy
from coconut.latent.policies.policy import Over, Record, check_positive, combine, map_keys
from coconut.models.decoder import Decoder


def _log_probs(decoder: Decoder, hidden: Float[Array, "*B D"], temperature: float, vocab_size: int | None) -> Array:
    """Log-probabilities of the next token, in at least float32."""
    return jax.nn.log_softmax(decoder.unembed(hidden)[..., :vocab_size] / temperature)


def _embed(decoder: Decoder, ids: Int[Array, "*B X"]) -> Float[Array, "*B X D"]:
    rows = decoder.embed(ids.reshape(ids.shape[0], -1))
    return rows.reshape(*ids.shape, -1)


# --- A mixture with Gumbel noise ----------------------------------------------------------------------------------


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class GumbelMixtureOptions:
    """Options of ``kind = "gumbel"``. The defaults are an exact density; SofT-GRPO and Latent-GRPO differ as below.

    Attributes:
      temperature: what logits are divided by.
      top_k: the mixture is of the likeliest so many tokens.
      top_p: of these the fewest that hold this share of their probability.
      noise_temperature: what scores are divided by before their softmax makes weights; near 0 one token is drawn.
      scores: whether scores start from log-probabilities of the tokens ``kept`` (renormalised, SofT-GRPO) or of
        ``all`` of the vocabulary, and replay likewise (Latent-GRPO, which also replays without ``temperature``).
      least_noise: noise is cut off there; None for no bound.
      most_noise: likewise, above. SofT-GRPO cuts at -1.5 and 3, at replay as well.
      one_sided: noise is cut off and then shifted to start at 0 (Latent-GRPO; it needs ``least_noise``).
      bounded_gradient: where a sample's advantage is not positive and a score lies below its log-probability, the
        gradient is that of the mirrored score (Latent-GRPO). The paper has it turn the sign. In the released code it
        does not: the derivative goes from ``1 - e^-d`` to ``e^d - 1`` for ``d < 0``, of the same sign and bounded by 1.
        This is the code's.
      over: see `coconut.latent.policies.policy`; the mean is what both codes take.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    temperature: float = 1.0
    top_k: int = 5
    top_p: float = 1.0
    noise_temperature: float = 0.1
    scores: Literal["kept", "all"] = "kept"
    least_noise: float | None = None
    most_noise: float | None = None
    one_sided: bool = False
    bounded_gradient: bool = False
    over: Over = "sum"

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive(self, "temperature", "noise_temperature")

        def reject(field: str, why: str) -> None:
            raise CoconutError(f"GumbelMixtureOptions.{field} = {getattr(self, field)!r}: {why}")

        if self.top_k < 1:
            reject("top_k", "must be at least 1")
        if not 0 < self.top_p <= 1:
            reject("top_p", "must be above 0, and at most 1")
        if self.one_sided and self.least_noise is None:
            reject("one_sided", "needs least_noise, which is shifted to 0")
        if self.least_noise is not None and self.most_noise is not None and not self.least_noise < self.most_noise:
            reject("most_noise", f"must be above least_noise = {self.least_noise}")


class Scored(NamedTuple):
    """The record of a `GumbelMixture`.

    Attributes:
      ids: the likeliest tokens, likeliest first.
      scores: log-probability and noise of each; ``-inf`` for those that ``top_p`` left out.
    """

    ids: Int[Array, "*B k"]
    scores: Float[Array, "*B k"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GumbelMixture:
    """The mean embedding of the likeliest tokens, weighed by their log-probabilities with Gumbel noise.

    ``score_i = log p_i + g_i`` with ``g_i ~ Gumbel(0, 1)``, weights ``softmax(score / noise_temperature)``. A score has
    the density ``exp(-d - e^-d)`` with ``d = score - log p``. SofT-GRPO (arXiv 2511.06411), Latent-GRPO (arXiv
    2604.27998). Noise that is cut off, or one-sided, has another density than that by which it is scored: then the
    score does not have mean zero, and what is ascended is not the expected reward. The defaults cut nothing.

    Attributes:
      options: how. Static.
      vocab_size: ids that may be in the mixture, from 0; None for every row of the embedding. Static.
    """

    options: GumbelMixtureOptions = dataclasses.field(metadata={"static": True})
    vocab_size: int | None = dataclasses.field(default=None, metadata={"static": True})

    def _likeliest(
        self, decoder: Decoder, hidden: Float[Array, "*B D"]
    ) -> tuple[Float[Array, "*B k"], Int[Array, "*B k"], Bool[Array, "*B k"]]:
        """Log-probabilities of the likeliest tokens before they are renormalised, the tokens, and which are kept."""
        likely = _log_probs(decoder, hidden, self.options.temperature, self.vocab_size)
        likely, ids = jax.lax.top_k(likely, min(self.options.top_k, likely.shape[-1]))
        shares = jax.nn.softmax(likely)
        # The token that crosses the bound is kept, and so the first one always is.
        return likely, ids, jnp.cumsum(shares, -1) - shares < self.options.top_p

    def sample(
        self, decoder: Decoder, hidden: Float[Array, "*B D"], keys: Key[Array, "*B"]
    ) -> tuple[Float[Array, "*B D"], Record]:
        """Draws a mixture."""
        options = self.options
        likely, ids, kept = self._likeliest(decoder, hidden)
        if options.scores == "all":
            likely = jnp.take_along_axis(_log_probs(decoder, hidden, 1.0, self.vocab_size), ids, -1)
        else:
            likely = _renormalised(likely, kept)
        noise = map_keys(lambda key: jax.random.gumbel(key, ids.shape[-1:], likely.dtype), keys)
        noise = jnp.clip(noise, options.least_noise, options.most_noise)
        if options.one_sided:
            assert options.least_noise is not None
            noise = noise - options.least_noise
        record = Scored(ids, jnp.where(kept, likely + noise, -jnp.inf))
        return self.inputs(decoder, record), record

    def inputs(self, decoder: Decoder, record: Record) -> Float[Array, "*B D"]:
        """The mixtures."""
        weights = jax.nn.softmax(record.scores / self.options.noise_temperature)
        rows = _embed(decoder, record.ids)
        return jnp.einsum("...k,...kd->...d", weights, rows.astype(weights.dtype)).astype(rows.dtype)

    def log_prob(
        self,
        decoder: Decoder,
        hidden: Float[Array, "*B D"],
        record: Record,
        advantages: Float[Array, "*B"] | None = None,
    ) -> Float[Array, "*B"]:
        """Log-density of the scores."""
        options, kept = self.options, jnp.isfinite(record.scores)
        temperature = options.temperature if options.scores == "kept" else 1.0
        likely = jnp.take_along_axis(_log_probs(decoder, hidden, temperature, self.vocab_size), record.ids, -1)
        if options.scores == "kept":
            likely = _renormalised(likely, kept)
        distance = jnp.where(kept, record.scores - likely, 0.0)
        if not options.one_sided:
            distance = jnp.clip(distance, options.least_noise, options.most_noise)
        density = -distance - jnp.exp(-distance)
        if options.bounded_gradient and advantages is not None:
            mirrored = distance - jnp.exp(distance)
            proxy = jnp.where((advantages[..., None] <= 0) & (distance < 0), mirrored, density)
            density = jax.lax.stop_gradient(density) + proxy - jax.lax.stop_gradient(proxy)
        return combine(density, options.over, kept)

    def entropy(self, decoder: Decoder, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        """Entropy of one token drawn among those kept; that of the noise is a constant."""
        likely, _, kept = self._likeliest(decoder, hidden)
        likely = _renormalised(likely, kept)
        return -jnp.sum(jnp.where(kept, jnp.exp(likely) * likely, 0.0), -1)


def _renormalised(log_probs: Float[Array, "*B k"], kept: Bool[Array, "*B k"]) -> Float[Array, "*B k"]:
    """Log-probabilities among those kept; whatever in the others."""
    return log_probs - jax.nn.logsumexp(log_probs, -1, where=kept, keepdims=True)


def make_gumbel_mixture(
    options: GumbelMixtureOptions, feedback: Feedback, part: Any, vocab_size: int | None
) -> GumbelMixture:
    """The policy of its options."""
    del feedback, part
    return GumbelMixture(options=options, vocab_size=vocab_size)


# --- The mean of drawn tokens -------------------------------------------------------------------------------------


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawnTokensOptions:
    """Options of ``kind = "drawn_tokens"``.

    Attributes:
      count: tokens drawn for a thought, with replacement.
      temperature: what logits are divided by.
      over: see `coconut.latent.policies.policy`; the sum is what Multiplex's and CoT2's codes take.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    count: int = 3
    temperature: float = 1.0
    over: Over = "sum"

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive(self, "temperature")
        if self.count < 1:
            raise CoconutError(f"DrawnTokensOptions.count = {self.count!r}: must be at least 1")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawnTokens:
    """The mean embedding of some drawn tokens: Multiplex (arXiv 2601.08808), CoT2's MTS (arXiv 2505.23648).

    The record are their ids. With one token this is a written chain of thought that nobody sees.

    Attributes:
      options: how. Static.
      vocab_size: ids that may be drawn, from 0; None for every row of the embedding. Static.
    """

    options: DrawnTokensOptions = dataclasses.field(metadata={"static": True})
    vocab_size: int | None = dataclasses.field(default=None, metadata={"static": True})

    def sample(
        self, decoder: Decoder, hidden: Float[Array, "*B D"], keys: Key[Array, "*B"]
    ) -> tuple[Float[Array, "*B D"], Record]:
        """Draws the tokens."""
        likely = _log_probs(decoder, hidden, self.options.temperature, self.vocab_size)
        noise = map_keys(lambda key: jax.random.gumbel(key, (self.options.count, likely.shape[-1]), likely.dtype), keys)
        ids = jnp.argmax(likely[..., None, :] + noise, -1).astype(jnp.int32)
        return self.inputs(decoder, ids), ids

    def inputs(self, decoder: Decoder, record: Record) -> Float[Array, "*B D"]:
        """The means."""
        rows = _embed(decoder, record)
        return rows.astype(decoder.execution.accumulation_dtype).mean(-2).astype(rows.dtype)

    def log_prob(
        self,
        decoder: Decoder,
        hidden: Float[Array, "*B D"],
        record: Record,
        advantages: Float[Array, "*B"] | None = None,
    ) -> Float[Array, "*B"]:
        """Log-probability of the tokens in their order."""
        del advantages
        likely = _log_probs(decoder, hidden, self.options.temperature, self.vocab_size)
        return combine(jnp.take_along_axis(likely, record, -1), self.options.over)

    def entropy(self, decoder: Decoder, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        """Entropy of the draw."""
        own = token_entropy(decoder.unembed(hidden)[..., : self.vocab_size], self.options.temperature)
        return own * self.options.count if self.options.over == "sum" else own


def make_drawn_tokens(
    options: DrawnTokensOptions, feedback: Feedback, part: Any, vocab_size: int | None
) -> DrawnTokens:
    """The policy of its options."""
    del feedback, part
    return DrawnTokens(options=options, vocab_size=vocab_size)


# --- A token and a soft state through a gate ----------------------------------------------------------------------


class Gated(NamedTuple):
    """The record of a `GatedToken`.

    Attributes:
      ids: the tokens drawn.
      soft: the soft states; constants to the gradient.
    """

    ids: Int[Array, "*B"]
    soft: Float[Array, "*B D"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedToken:
    """A drawn token, and through a gate the mean embedding of the distribution it was drawn from: HRPO.

    Attributes:
      gate: what the model feeds back by; it takes the likeliest token where nothing is drawn.
      vocab_size: ids that may be drawn, from 0; None for every row of the embedding. Static.
    """

    gate: Gate
    vocab_size: int | None = dataclasses.field(default=None, metadata={"static": True})

    def sample(
        self, decoder: Decoder, hidden: Float[Array, "*B D"], keys: Key[Array, "*B"]
    ) -> tuple[Float[Array, "*B D"], Record]:
        """Draws a token."""
        likely = _log_probs(decoder, hidden, self.gate.temperature, self.vocab_size)
        noise = map_keys(lambda key: jax.random.gumbel(key, likely.shape[-1:], likely.dtype), keys)
        soft = jax.lax.stop_gradient(self.gate.soft_state(decoder, jnp.exp(likely)))
        record = Gated(jnp.argmax(likely + noise, -1).astype(jnp.int32), soft)
        return self.inputs(decoder, record), record

    def inputs(self, decoder: Decoder, record: Record) -> Float[Array, "*B D"]:
        """What the gate lets through; the gate gets gradients."""
        return self.gate.mix(decoder.embed(record.ids), record.soft)

    def log_prob(
        self,
        decoder: Decoder,
        hidden: Float[Array, "*B D"],
        record: Record,
        advantages: Float[Array, "*B"] | None = None,
    ) -> Float[Array, "*B"]:
        """Log-probability of the tokens."""
        del advantages
        likely = _log_probs(decoder, hidden, self.gate.temperature, self.vocab_size)
        return jnp.take_along_axis(likely, record.ids[..., None], -1)[..., 0]

    def entropy(self, decoder: Decoder, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        """Entropy of the token."""
        return token_entropy(decoder.unembed(hidden)[..., : self.vocab_size], self.gate.temperature)


def make_gated_token(options: Any, feedback: Feedback, part: Any, vocab_size: int | None) -> GatedToken:
    """The policy.

    Raises:
      CoconutError: the model feeds back in another way.
    """
    del options, part
    if not isinstance(feedback, Gate):
        raise CoconutError(
            "PolicyConfig.kind = 'gated_token': needs FeedbackConfig.kind = 'gated', and this model feeds back by "
            f"{type(feedback).__name__}"
        )
    return GatedToken(gate=feedback, vocab_size=vocab_size)
