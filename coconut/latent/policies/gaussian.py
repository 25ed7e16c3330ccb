"""Policies that draw a thought from a normal distribution: around the model's own thought, or of a head of its own."""

import dataclasses
import math
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from coconut.errors import CoconutError, check_fields
from coconut.latent.feedback import Feedback
from coconut.latent.gaussian import GaussianHead
from coconut.latent.policies.policy import Over, Record, check_positive, combine, map_keys
from coconut.models.config import DecoderConfig
from coconut.models.decoder import Decoder


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianNoiseOptions:
    """Options of ``kind = "gaussian"``.

    Attributes:
      share: standard deviation of the noise, as a share of the root mean square of the thought. LatentTTS's 0.6 for
        Coconut on GPT-2 is about 0.08.
      learnt: whether the share is a parameter, which starts there.
      over: see `coconut.latent.policies.policy`.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    share: float = 0.1
    learnt: bool = False
    over: Over = "sum"

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive(self, "share")


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values, cotangents and shardings
@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianNoise:
    """Normal noise around the thought, ``z ~ N(f, s^2 I)`` with ``s`` a share of the root mean square of ``f``.

    The record is what was fed. VLPO's code (Monet, arXiv 2511.21395) scores its thoughts by this density, but feeds
    ``f`` itself: then the score is zero at first, and no policy gradient. Here the noise is drawn.

    Attributes:
      feedback: makes ``f`` of a hidden state.
      log_share: logarithm of the share, a number or a parameter.
      over: see `coconut.latent.policies.policy`. Static.
    """

    feedback: Feedback
    log_share: Any
    over: Over = dataclasses.field(metadata={"static": True})

    def distribution(
        self, decoder: Decoder, hidden: Float[Array, "*B D"]
    ) -> tuple[Float[Array, "*B D"], Float[Array, "*B 1"]]:
        """Mean and standard deviation, in at least float32."""
        mean = self.feedback(decoder, hidden).astype(decoder.execution.accumulation_dtype)
        # The least positive number keeps the logarithm finite where a row that only fills the batch thinks zero.
        size = jnp.sqrt(jnp.mean(jnp.square(mean), -1, keepdims=True) + jnp.finfo(mean.dtype).tiny)
        return mean, jnp.exp(jnp.asarray(self.log_share[...], mean.dtype)) * size

    def sample(
        self, decoder: Decoder, hidden: Float[Array, "*B D"], keys: Key[Array, "*B"]
    ) -> tuple[Float[Array, "*B D"], Record]:
        """Draws a thought; it is its own record."""
        mean, deviation = self.distribution(decoder, hidden)
        noise = map_keys(lambda key: jax.random.normal(key, mean.shape[-1:], mean.dtype), keys)
        thought = (mean + deviation * noise).astype(hidden.dtype)
        return thought, thought

    def inputs(self, decoder: Decoder, record: Record) -> Float[Array, "*B D"]:
        """The thoughts."""
        del decoder
        return record

    def log_prob(
        self,
        decoder: Decoder,
        hidden: Float[Array, "*B D"],
        record: Record,
        advantages: Float[Array, "*B"] | None = None,
    ) -> Float[Array, "*B"]:
        """Log-density of the thoughts."""
        del advantages
        return combine(normal_log_density(record, *self.distribution(decoder, hidden)), self.over)

    def entropy(self, decoder: Decoder, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        """Differential entropy of the thought."""
        _, deviation = self.distribution(decoder, hidden)
        return combine(jnp.broadcast_to(normal_entropy(deviation), hidden.shape), self.over)


def normal_log_density(
    x: Float[Array, "*B D"], mean: Float[Array, "*B D"], deviation: Float[Array, "*B _"]
) -> Float[Array, "*B D"]:
    """Log-density of each component, in the dtype of ``mean``."""
    distance = (x.astype(mean.dtype) - mean) / deviation
    return -0.5 * jnp.square(distance) - jnp.log(deviation) - 0.5 * math.log(2 * math.pi)


def normal_entropy(deviation: Float[Array, "*B _"]) -> Float[Array, "*B _"]:
    """Differential entropy of each component."""
    return jnp.log(deviation) + 0.5 * math.log(2 * math.pi * math.e)


def gaussian_noise_part(options: GaussianNoiseOptions, decoder: DecoderConfig, key: Key[Array, ""]) -> Any:
    """The logarithm of the share where it is learnt."""
    del key
    if not options.learnt:
        return None
    return {"log_share": nnx.Param(jnp.full((), math.log(options.share), jnp.dtype(decoder.param_dtype)), axes=())}


def make_gaussian_noise(
    options: GaussianNoiseOptions, feedback: Feedback, part: Any, vocab_size: int | None
) -> GaussianNoise:
    """The policy of its options."""
    del vocab_size
    log_share = jnp.asarray(math.log(options.share)) if part is None else part["log_share"]
    return GaussianNoise(feedback=feedback, log_share=log_share, over=options.over)


# --- A head of its own --------------------------------------------------------------------------------------------


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianHeadOptions:
    """Options of ``kind = "gaussian_head"``.

    Attributes:
      over: see `coconut.latent.policies.policy`; the mean is what CoLaR's code takes.
    """

    over: Over = "mean"

    def __post_init__(self) -> None:
        check_fields(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianHeadDraw:
    """A draw of the head that the model feeds back by: CoLaR's (Tan et al. 2025, section 3.3).

    The density is that of the thought in units of the head's ``factor``. The record is what was fed.

    Attributes:
      head: the head.
      over: see `coconut.latent.policies.policy`. Static.
    """

    head: GaussianHead
    over: Over = dataclasses.field(metadata={"static": True})

    def sample(
        self, decoder: Decoder, hidden: Float[Array, "*B D"], keys: Key[Array, "*B"]
    ) -> tuple[Float[Array, "*B D"], Record]:
        """Draws a thought; it is its own record."""
        thought = self.head(decoder, hidden, keys=keys)
        return thought, thought

    def inputs(self, decoder: Decoder, record: Record) -> Float[Array, "*B D"]:
        """The thoughts."""
        del decoder
        return record

    def log_prob(
        self,
        decoder: Decoder,
        hidden: Float[Array, "*B D"],
        record: Record,
        advantages: Float[Array, "*B"] | None = None,
    ) -> Float[Array, "*B"]:
        """Log-density of the thoughts."""
        del advantages
        mean, deviation = self.head.distribution(decoder, hidden)
        return combine(normal_log_density(record.astype(mean.dtype) / self.head.factor, mean, deviation), self.over)

    def entropy(self, decoder: Decoder, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        """Differential entropy of the thought."""
        _, deviation = self.head.distribution(decoder, hidden)
        return combine(normal_entropy(deviation), self.over)


def make_gaussian_head(
    options: GaussianHeadOptions, feedback: Feedback, part: Any, vocab_size: int | None
) -> GaussianHeadDraw:
    """The policy of its options.

    Raises:
      CoconutError: the model feeds back in another way.
    """
    del part, vocab_size
    if not isinstance(feedback, GaussianHead):
        raise CoconutError(
            "PolicyConfig.kind = 'gaussian_head': needs FeedbackConfig.kind = 'gaussian', and this model feeds back by "
            f"{type(feedback).__name__}"
        )
    return GaussianHeadDraw(head=feedback, over=options.over)
