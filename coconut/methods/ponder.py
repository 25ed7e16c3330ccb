"""A stop head that learns when to answer: PonderNet's loss (Banino et al. 2021) over thoughts.

After each thought the head gives the probability that the block is over. The answer's loss after every number of
thoughts is weighed by the probability of stopping there, and the distribution is held near a prior: geometric as in
PonderNet, or uniform, which rewards entropy (as in the first stage of Ouro's exit gate: a geometric prior pulls towards
early exits). `PONDER` trains Coconut's last stage so, `PONDER_CODI` CODI.

The head reads the hidden state of the block's last thought; the public run on CODI reads what the projection makes of
it.

Trained from nothing it collapses (2-5 % on GSM8K-Aug in the one public run); start from a model that thinks already.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from coconut.errors import CoconutError, check_fields
from coconut.latent.halting import HaltingConfig, LinearHalt
from coconut.latent.thoughts import Past, Place, trunk
from coconut.losses import Loss, Ratio, Term, ratio, score_labels
from coconut.methods.coconut import write_final_stage
from coconut.methods.codi import CodiOptions, distilled, write_for_teacher
from coconut.methods.method import LossContext, Method, Views, imitate
from coconut.model import Model
from coconut.models.cache import Segment
from coconut.models.config import DecoderConfig
from coconut.pages import Placing
from coconut.types import IGNORED_LABEL, Batch, Language, Latent, ModelOutput


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class PonderOptions:
    """How a block learns to end.

    Attributes:
      prior: what the distribution of the number of thoughts is held near: ``geometric``, cut off at the last thought,
        or ``uniform``.
      prior_mean: mean of the geometric prior before it is cut off.
      prior_weight: factor of the Kullback-Leibler divergence from it. The public run takes 0.01 and finds 0.05 to 0.1
        best.
      threshold: a block ends where the probability of having stopped passes it.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    prior: Literal["geometric", "uniform"] = "geometric"
    prior_mean: float = 3.0
    prior_weight: float = 0.01
    threshold: float = 0.5

    def __post_init__(self) -> None:
        check_fields(self)
        if not 1 <= self.prior_mean < np.inf:
            raise CoconutError(f"{type(self).__name__}.prior_mean = {self.prior_mean!r}: must be at least 1")
        if not 0 <= self.prior_weight < np.inf:
            raise CoconutError(f"{type(self).__name__}.prior_weight = {self.prior_weight!r}: must be at least 0")
        if not 0 < self.threshold < 1:
            raise CoconutError(f"{type(self).__name__}.threshold = {self.threshold!r}: must be between 0 and 1")


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class PonderCodiOptions(PonderOptions, CodiOptions):
    """Options of `PONDER_CODI`: those of CODI and of the head."""

    def __post_init__(self) -> None:
        PonderOptions.__post_init__(self)
        CodiOptions.__post_init__(self)


def make_halt(options: PonderOptions, decoder: DecoderConfig, key: Key[Array, ""]) -> Mapping[str, Any]:
    """The head."""
    del options, key
    return {"halt": LinearHalt.fresh(decoder)}


# --- The distribution ---------------------------------------------------------------------------------------------


def stopping_distribution(logits: Float[Array, "B K"], counts: Int[Array, " B"]) -> Float[Array, "B K"]:
    """The probability of stopping after each thought (equation 1 of PonderNet).

    A row's last thought takes all that is left, those behind it nothing.

    Args:
      logits: of stopping after each thought, given that the block got there.
      counts: thoughts of each row.
    """
    number = jnp.arange(1, logits.shape[1] + 1)
    stay = jnp.where(number < counts[:, None], jax.nn.log_sigmoid(-logits), 0.0)
    arrived = jnp.cumsum(stay, 1) - stay
    stop = jnp.where(number < counts[:, None], jax.nn.log_sigmoid(logits), 0.0)
    return jnp.where(number <= counts[:, None], jnp.exp(arrived + stop), 0.0)


def prior_distribution(options: PonderOptions, most: int, counts: Int[Array, " B"]) -> Float[Array, "B K"]:
    """What the distribution is held near, over each row's thoughts."""
    number = jnp.arange(1, most + 1)
    within = number <= counts[:, None]
    if options.prior == "uniform":
        return within / jnp.maximum(counts[:, None], 1)
    rate = 1.0 / options.prior_mean
    left = (1 - rate) ** (number - 1.0)
    prior = jnp.where(number < counts[:, None], left * rate, left)
    return jnp.where(within, prior, 0.0)


def divergence(p: Float[Array, "B K"], q: Float[Array, "B K"]) -> Float[Array, " B"]:
    """Kullback-Leibler divergence of each row, in nats; probabilities below 1e-8 count as that."""
    log = lambda x: jnp.log(jnp.maximum(x, 1e-8))
    return jnp.sum(p * (log(p) - log(q)), 1)


# --- The answer after every number of thoughts --------------------------------------------------------------------


def losses_by_count(
    model: Model,
    batch: Batch,
    output: ModelOutput,
    context: LossContext = LossContext(),  # noqa: B008 - immutable
) -> Float[Array, "B K"]:
    """The mean cross-entropy of each row's scored text if it had stopped after each number of its thoughts.

    The thoughts are made once; only what follows them is run again, on fewer of them and at the positions that follow.

    Args:
      model: the model.
      batch: rows with one block of thoughts, and text right behind it.
      output: their rollout.
      context: of the loss, for dropout.
    """
    first, block, last = _three_spans(batch)
    start, end = first.length, first.length + block.length
    past, text = _before(output, end), slice(end, None)
    latent = batch.valid[:, start:end]
    counts, embedded = latent.sum(1), model.decoder.embed(batch.tokens[:, text])
    labels, valid, columns = batch.labels[:, text], batch.valid[:, text], jnp.arange(end, end + last.length)

    dropout = context.dropout(model.decoder, columns, batch.tokens.shape[1])

    def after(kept: Array) -> Array:
        skipped = jnp.maximum(counts - kept, 0)
        positions = jnp.where(valid, batch.positions[:, text] - skipped[:, None], 0)
        seen = tuple(
            dataclasses.replace(segment, valid=segment.valid & (segment.columns < start + kept)) for segment in past
        )
        hidden, _ = trunk(model.decoder, embedded, Place(positions, valid, columns, dropout), seen)
        losses, _ = score_labels(model.decoder, hidden[:, :-1], labels[:, 1:])
        return losses.sum(1) / jnp.maximum((labels[:, 1:] != IGNORED_LABEL).sum(1), 1)

    return jax.lax.map(jax.checkpoint(after), jnp.arange(1, block.length + 1)).T


def _three_spans(batch: Batch) -> tuple[Language, Latent, Language]:
    if len(batch.schedule) == 3:
        first, block, last = batch.schedule
        if isinstance(first, Language) and isinstance(block, Latent) and isinstance(last, Language):
            return first, block, last
    raise CoconutError(
        f"a stop head learns from a question, one block of thoughts and text behind it, not from {batch.schedule}"
    )


def _before(output: ModelOutput, end: int) -> Past:
    """The segments of a rollout's columns before ``end``."""
    found, start = [], 0
    for segment in output.past:
        own = min(end - start, segment.valid.shape[1])
        start += segment.valid.shape[1]
        if own > 0:
            key_values = jax.tree.map(lambda x, own=own: x[..., :own, :], segment.key_values)
            found.append(Segment(key_values, segment.valid[:, :own], segment.columns[:own]))
    return tuple(found)


def pondered(model: Model, batch: Batch, output: ModelOutput, loss: Loss, context: LossContext) -> Loss:
    """The loss with its ``language`` term weighed over the numbers of thoughts, and the ``prior``'s term.

    Each row counts alike, whatever the length of its text (the weighing is a row's own).
    """
    options: PonderOptions = context.options
    first, block, _ = _three_spans(batch)
    latent = batch.valid[:, first.length : first.length + block.length]
    counts = latent.sum(1)
    assert output.hidden is not None
    hidden = output.hidden[:, first.length : first.length + block.length]
    p = stopping_distribution(model.parts["halt"](model.decoder, hidden), counts)
    losses = losses_by_count(model, batch, output, context)
    rows = (batch.labels != IGNORED_LABEL).any(1)
    expected = ratio(jnp.sum(p * losses.astype(p.dtype), 1), rows)
    far = ratio(divergence(p, prior_distribution(options, block.length, counts)), rows)
    mean_count = ratio(jnp.sum(p * jnp.arange(1, block.length + 1), 1), rows)
    terms: dict[str, Term] = {**loss.terms, "language": Term(expected)}
    if options.prior_weight:
        terms["prior"] = Term(far, options.prior_weight)
    metrics: dict[str, Ratio] = {**loss.metrics, "expected_thoughts": mean_count}
    return Loss(terms, metrics)


def ponder_loss(model: Model, views: Views, context: LossContext) -> Loss:
    """Coconut's loss in its last stage, weighed."""
    loss, output = imitate(model, views["main"], context, every_hidden=True)
    return pondered(model, views["main"], output, loss, context)


def ponder_codi_loss(model: Model, views: Views, context: LossContext) -> Loss:
    """CODI's loss, the student's part of it weighed."""
    loss, output, _ = distilled(model, views, context, every_hidden=True)
    return pondered(model, views["main"], output, loss, context)


def halt_by_head(placing: Placing) -> HaltingConfig | None:
    """A block ends where the head says."""
    most = max(placing.curriculum.max_thoughts, 1)
    return HaltingConfig(stop="cumulative", threshold=placing.options.threshold, least=1, most=most, room=most)


PONDER = Method(
    name="ponder",
    pages={"main": write_final_stage},
    options=PonderOptions,
    parts=make_halt,
    halting=halt_by_head,
    ends_blocks=True,
    loss=ponder_loss,
)

PONDER_CODI = Method(
    name="ponder_codi",
    pages={"main": write_final_stage, "teacher": write_for_teacher},
    options=PonderCodiOptions,
    parts=make_halt,
    halting=halt_by_head,
    ends_blocks=True,
    needs_steps=True,
    loss=ponder_codi_loss,
)
