"""Losses as (sum, weight) pairs, divided once: globally, over microbatches and hosts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coconut.models.decoder import Decoder
from coconut.types import IGNORED_LABEL, Batch, Language, ModelOutput, Schedule


class Ratio(NamedTuple):
    """A mean that is not divided yet; ratios of parts add up to the ratio of the whole."""

    total: Float[Array, ""]
    weight: Float[Array, ""]

    def mean(self) -> Float[Array, ""]:
        """``total / weight``, 0 where nothing was weighed."""
        return self.total / jnp.maximum(self.weight, 1e-30)


def ratio(values: Float[Array, "..."], weights: Float[Array, "..."] | Bool[Array, "..."]) -> Ratio:
    """The weighted mean of ``values``, not divided yet; a value of weight 0 does not count, even if not finite."""
    weights = weights.astype(values.dtype)
    return Ratio(jnp.sum(jnp.where(weights > 0, values * weights, 0.0)), jnp.sum(weights))


def scored_columns(values: Array, schedule: Schedule) -> Array:
    """Selects the scored columns of ``[B, T]`` values: those that meet `ModelOutput.predictors`."""
    parts, start = [], 0
    for span in schedule:
        start += span.length
        if isinstance(span, Language) and span.scored:
            parts.append(values[:, start - span.scored : start])
    return jnp.concatenate(parts, 1) if parts else values[:, :0]


def token_losses(logits: Float[Array, "*B V"], labels: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """Cross-entropy of each label in nats; 0 where ignored."""
    known = labels != IGNORED_LABEL
    picked = jnp.take_along_axis(logits, jnp.where(known, labels, 0)[..., None], -1)[..., 0]
    return jnp.where(known, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)


def language_loss(decoder: Decoder, batch: Batch, output: ModelOutput) -> tuple[Ratio, dict[str, Ratio]]:
    """Cross-entropy over labelled tokens, the loss of Coconut and of every control (Hao et al. 2024, section 3).

    Returns:
      The loss, and metrics: ``loss`` and ``accuracy`` of all labelled tokens; ``first_loss`` and ``first_accuracy`` of
      the first thing written after the prompt or the thoughts; ``answer_loss`` of the answer's tokens, and
      ``answer_accuracy``, the share of rows whose answer tokens are all most likely given the ones before them.
    """
    labels, pieces, answers = (scored_columns(x, batch.schedule) for x in (batch.labels, batch.pieces, batch.answers))
    logits = decoder.unembed(output.predictors)
    losses = token_losses(logits, labels)
    labelled = labels != IGNORED_LABEL
    right = (jnp.argmax(logits, -1) == labels).astype(losses.dtype)
    loss = ratio(losses, labelled)
    answered = (labelled & answers).any(1)
    return loss, {
        "loss": loss,
        "accuracy": ratio(right, labelled),
        "first_loss": ratio(losses, labelled & (pieces == 0)),
        "first_accuracy": ratio(right, labelled & (pieces == 0)),
        "answer_loss": ratio(losses, labelled & answers),
        "answer_accuracy": ratio(jnp.where(answers & labelled, right, 1.0).min(1), answered),
    }
