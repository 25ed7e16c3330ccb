"""Policies on thoughts: what a latent column is fed becomes a draw, whose probability is known.

All samples of a question think the same thoughts where a thought is a function of the state before it. A policy makes
it a draw. It is what test-time sampling and learning from rewards need of a method, and all that they need:

* `Policy.sample` draws what a column is fed, and returns it beside a *record* of the draw, whose shapes are fixed;
* `Policy.inputs` makes of the record what the column was fed;
* `Policy.log_prob` is the record's log-probability given the state before, under any parameters.

So a trajectory is replayed in one parallel pass: the inputs of all its columns are known beforehand. Two policies draw
no thought of their own (`coconut.latent.policies.own_thoughts`): the thoughts are made again, one after the other, with
exact gradients (`coconut.latent.thoughts`), and only what is written behind them has a probability.

A log-probability of several components, the ``D`` of a vector or the ``k`` tokens of a mixture, is their sum, or their
mean where a policy's ``over`` says so. The sum is the joint density, and makes a policy gradient. The mean tempers the
importance ratio by the number of components, as CoLaR's and SofT-GRPO's code does; its score has mean zero as well.

When a block ends may be drawn, too (`coconut.latent.policies.stopping`).
"""

import math
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from coconut.errors import CoconutError
from coconut.models.decoder import Decoder

Record = Any
"""What is kept of a draw: a pytree of arrays ``[*B, ...]`` of fixed shapes."""
Over = Literal["sum", "mean"]
"""What is made of the log-probabilities of a draw's components."""


@runtime_checkable
class Policy(Protocol):
    """A distribution over what a latent column is fed. A JAX pytree: its leaves are parameters.

    It is a `DrawingPolicy`, or one of `coconut.latent.policies.own_thoughts`.
    """

    def sample(
        self, decoder: Decoder, hidden: Float[Array, "*B D"], keys: Key[Array, "*B"]
    ) -> tuple[Float[Array, "*B D"], Record]:
        """Draws what the next column is fed, given the hidden state (after the final norm) of the one before."""
        ...


@runtime_checkable
class DrawingPolicy(Policy, Protocol):
    """A policy that draws thoughts, whose probability is known."""

    def inputs(self, decoder: Decoder, record: Record) -> Float[Array, "*B D"]:
        """What the columns of some draws were fed. What it is made of gets gradients, the record none."""
        ...

    def log_prob(
        self,
        decoder: Decoder,
        hidden: Float[Array, "*B D"],
        record: Record,
        advantages: Float[Array, "*B"] | None = None,
    ) -> Float[Array, "*B"]:
        """Log-probability (or density) of draws, in nats, in at least float32.

        Args:
          decoder: the decoder.
          hidden: the states before the columns.
          record: of the draws.
          advantages: of the samples that they belong to, for policies whose published gradient depends on their sign.
        """
        ...

    def entropy(self, decoder: Decoder, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        """Entropy of the draw, in nats; each policy says of what."""
        ...


def combine(parts: Float[Array, "*B X"], over: Over, counted: Bool[Array, "*B X"] | None = None) -> Float[Array, "*B"]:
    """The log-probability of draws whose components have log-probabilities ``parts``; those not counted have none."""
    if counted is None:
        return parts.sum(-1) if over == "sum" else parts.mean(-1)
    total = jnp.where(counted, parts, 0.0).sum(-1)
    return total if over == "sum" else total / jnp.maximum(counted.sum(-1), 1)


def map_keys(draw: Callable[[Key[Array, ""]], Any], keys: Key[Array, "*B"]) -> Any:
    """A draw for each key."""
    for _ in keys.shape:
        draw = jax.vmap(draw)
    return draw(keys)


def check_positive(owner: Any, *fields: str) -> None:
    """Looks whether fields of a config are positive and finite.

    Raises:
      CoconutError: one is not; the message names it and its value.
    """
    for field in fields:
        value = getattr(owner, field)
        if not 0 < value < math.inf:
            raise CoconutError(f"{type(owner).__name__}.{field} = {value!r}: must be positive")
