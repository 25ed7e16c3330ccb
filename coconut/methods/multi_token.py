"""Multi-token prediction as a term of a method's loss (DeepSeek-V3, DeepSeek-AI 2024, section 2.2)."""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from coconut.errors import CoconutError, check_fields
from coconut.losses import Ratio, ratio, score_labels, scored_columns
from coconut.models.decoder import Decoder
from coconut.models.layers import take_columns
from coconut.models.multi_token import AtThoughts, MultiToken
from coconut.types import IGNORED_LABEL, Batch, Latent, ModelOutput


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiTokenConfig:
    """A term that trains the model to predict the token after the next, too, by a module beside the decoder.

    The module (`coconut.models.multi_token.MultiToken`) starts as the checkpoint's that a run starts from, where that
    has one (DeepSeek V3), else fresh. Exports keep it. It answers nothing: what it changes is what the decoder learns.

    Attributes:
      weight: factor of the term. DeepSeek-V3 took 0.3 for most of its training, then 0.1. With 0 there is no module,
        and the run is the one without this config.
      at_thoughts: the module reads of each column the input of the one behind it. Where that is a thought, ``masked``
        leaves the column out: it predicts nothing, and no other column of the module attends to it. ``thought`` reads
        the thought, through which the term then has a gradient.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    weight: float = 0.3
    at_thoughts: AtThoughts = "masked"

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.weight < float("inf"):
            raise CoconutError(f"MultiTokenConfig.weight = {self.weight!r}: must be at least 0 and finite")


def second_token_loss(
    decoder: Decoder, module: MultiToken, batch: Batch, output: ModelOutput
) -> tuple[Ratio, dict[str, Ratio]]:
    """Cross-entropy of each label given the state two columns before it, and the input of the one between.

    Columns are counted as a row has them: what it leaves out of the schedule lies between no two of them.

    Args:
      decoder: the decoder.
      module: the module.
      batch: the rows.
      output: their rollout, with the hidden states of all columns.

    Returns:
      The loss, and metrics: ``second_token_loss`` and ``second_token_accuracy`` of the labels that have two columns
      before them, and none of these left out.
    """
    assert output.hidden is not None
    T, valid = batch.tokens.shape[1], jnp.asarray(batch.valid)
    latent = np.concatenate([np.full(span.length, isinstance(span, Latent)) for span in batch.schedule])
    inputs = decoder.embed(batch.tokens)
    if output.thoughts:
        inputs = inputs.at[:, np.flatnonzero(latent)].set(jnp.concatenate(output.thoughts, 1).astype(inputs.dtype))
    following = _next_valid(valid)
    used = valid & (following < T)
    behind = jnp.minimum(following, T - 1)
    if module.at_thoughts == "masked":
        used &= ~jnp.asarray(latent)[behind]
    # The columns that are used, side by side: then nothing lies between two of them.
    order = jnp.argsort(~used, axis=1, stable=True)
    behind = jnp.take_along_axis(behind, order, axis=1)
    states = module(
        take_columns(output.hidden, order),
        take_columns(inputs, behind),
        positions=take_columns(jnp.asarray(batch.positions), behind),
        valid=jnp.arange(T) < used.sum(1, keepdims=True),
    )
    before = _last_valid(valid)
    asked = jnp.where(before < 0, -1, jnp.take_along_axis(before, jnp.maximum(before, 0), axis=1))
    asked, labels = (scored_columns(x, batch.schedule) for x in (asked, jnp.asarray(batch.labels)))
    there = jnp.maximum(asked, 0)
    counted = (labels != IGNORED_LABEL) & (asked >= 0) & jnp.take_along_axis(used, there, axis=1)
    place = jnp.take_along_axis(jnp.maximum(jnp.cumsum(used, 1) - 1, 0), there, axis=1)
    losses, right = score_labels(decoder, take_columns(states, place), jnp.where(counted, labels, IGNORED_LABEL))
    loss = ratio(losses, counted)
    return loss, {"second_token_loss": loss, "second_token_accuracy": ratio(right.astype(losses.dtype), counted)}


def _next_valid(valid: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """The next valid column behind each; ``T`` where there is none."""
    T = valid.shape[1]
    from_here = jax.lax.cummin(jnp.where(valid, jnp.arange(T), T), axis=1, reverse=True)
    return jnp.pad(from_here, ((0, 0), (0, 1)), constant_values=T)[:, 1:]


def _last_valid(valid: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """The last valid column before each; -1 where there is none."""
    to_here = jax.lax.cummax(jnp.where(valid, jnp.arange(valid.shape[1]), -1), axis=1)
    return jnp.pad(to_here, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
