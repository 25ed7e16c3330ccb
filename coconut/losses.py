"""Losses as (sum, weight) pairs, divided once: globally, over microbatches and hosts."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from coconut.models.config import KERNEL_DTYPES, DecoderConfig, ExecutionConfig, split_implementation
from coconut.models.decoder import Decoder
from coconut.sharding import fitting_partition
from coconut.types import IGNORED_LABEL, Batch, Language, Latent, ModelOutput, Schedule
from pallas_kernels.linear_cross_entropy import linear_cross_entropy


class Ratio(NamedTuple):
    """A mean that is not divided yet; ratios of parts add up to the ratio of the whole."""

    total: Float[Array, ""]
    weight: Float[Array, ""]

    def mean(self) -> Float[Array, ""]:
        """``total / weight``, 0 where nothing was weighed."""
        return jnp.where(self.weight > 0, self.total / jnp.where(self.weight > 0, self.weight, 1.0), 0.0)


class Term(NamedTuple):
    """One term of an objective: ``factor`` times the mean that ``ratio`` stands for.

    Attributes:
      ratio: its ``weight`` must come from the batch alone, never from the model: then the terms of microbatches and
        devices add up to those of the whole batch exactly, whatever each of them weighs.
      factor: of this term in the objective.
    """

    ratio: Ratio
    factor: float = 1.0


class Loss(NamedTuple):
    """What a method's loss returns.

    Attributes:
      terms: what is minimised, by name; their sum is the objective.
      metrics: what is logged.
    """

    terms: Mapping[str, Term]
    metrics: Mapping[str, Ratio]


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


LARGE_LOGITS = 2**28
"""Bytes of logits from which ``auto`` does not hold them."""


def choose_cross_entropy(config: DecoderConfig, execution: ExecutionConfig, rows: int) -> str:
    """What ``ExecutionConfig.cross_entropy`` means for ``rows`` scored columns over all devices.

    ``auto`` holds all logits where they are few: that is the faster way on a CPU (pallas_kernels/README.md). Larger
    ones are never made: by `linear_cross_entropy`'s own choice. But they are in dtypes that it does not take.
    """
    if execution.cross_entropy != "auto":
        return execution.cross_entropy
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.size
    few = 4 * rows * config.vocabulary // devices < LARGE_LOGITS
    return "full" if few or execution.dtype not in KERNEL_DTYPES else "auto"


def score_labels(
    decoder: Decoder, hidden: Float[Array, "B S D"], labels: Int[Array, "B S"]
) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
    """Cross-entropy in nats of each label given the state before it, 0 where ignored; and whether it is most likely."""
    B, S, D = hidden.shape
    implementation = choose_cross_entropy(decoder.config, decoder.execution, rows=B * S)
    if implementation == "full" or not S:
        logits = decoder.unembed(hidden)
        return token_losses(logits, labels), jnp.argmax(logits, -1) == labels
    name, interpret = split_implementation(implementation)
    split = fitting_partition(("vocabulary", "features"), (decoder.config.vocabulary, D))
    states = fitting_partition(("rows", "columns", "features"), hidden.shape)
    scored = PartitionSpec(*states[:2])

    def local(hidden: Array, vocabulary: Array, labels: Array) -> tuple[Array, Array]:
        found = linear_cross_entropy(
            *(hidden.reshape(-1, D), vocabulary, labels.reshape(-1)),
            ignored_label=IGNORED_LABEL,
            logit_scale=decoder.config.logit_scale,
            axis_name=split[0],
            implementation=name,
            interpret=interpret,
        )
        return found.losses.reshape(labels.shape), found.predictions.reshape(labels.shape)

    mesh = jax.sharding.get_abstract_mesh()
    if not (mesh.empty or mesh.size == 1):
        local = jax.shard_map(
            local,
            in_specs=(states, split, scored),
            out_specs=(scored, scored),
            # Interpreted kernels cannot say over which axes they differ.
            check_vma=not interpret,
        )
    losses, predictions = local(hidden.astype(decoder.execution.compute_dtype), decoder.output_matrix(), labels)
    return losses, predictions == labels


def language_loss(decoder: Decoder, batch: Batch, output: ModelOutput) -> tuple[Ratio, dict[str, Ratio]]:
    """Cross-entropy over labelled tokens, the loss of Coconut and of every control (Hao et al. 2024, section 3).

    Returns:
      The loss, and metrics: ``loss`` and ``accuracy`` of all labelled tokens; ``first_loss`` and ``first_accuracy`` of
      the first thing written after the prompt or the thoughts; ``answer_loss`` of the answer's tokens, and
      ``answer_accuracy``, the share of examples whose answer tokens are all most likely given the ones before them.
    """
    labels, pieces, answers = (scored_columns(x, batch.schedule) for x in (batch.labels, batch.pieces, batch.answers))
    losses, most_likely = score_labels(decoder, output.predictors, labels)
    labelled, right = labels != IGNORED_LABEL, most_likely.astype(losses.dtype)
    loss = ratio(losses, labelled)
    in_answer = labelled & answers
    right_ones = jnp.where(in_answer, right, 1.0)
    if batch.members is not None:
        assert batch.examples_per_row is not None
        own = scored_columns(batch.members, batch.schedule)[:, None] == jnp.arange(batch.examples_per_row)[:, None]
        in_answer, right_ones = in_answer[:, None] & own, jnp.where(own, right_ones[:, None], 1.0)
    return loss, {
        "loss": loss,
        "accuracy": ratio(right, labelled),
        "first_loss": ratio(losses, labelled & (pieces == 0)),
        "first_accuracy": ratio(right, labelled & (pieces == 0)),
        "answer_loss": ratio(losses, labelled & answers),
        "answer_accuracy": ratio(right_ones.min(-1), in_answer.any(-1)),
    }


def thought_metrics(decoder: Decoder, batch: Batch, output: ModelOutput) -> dict[str, Ratio]:
    """How long thoughts are beside token embeddings, and how alike they are, over the valid columns of a batch.

    They cost no pass: the rollout has made both already, and no gradient flows through them. Thoughts that collapse,
    ``thought_cosine`` towards 1, hold no more together than one of them does. SIM-CoT (Wei et al. 2025) sees their
    distances shrink where Coconut fails. `coconut.analysis.geometry` looks closer.

    Returns:
      ``thought_norm`` and ``token_norm``, and ``thought_cosine`` of each thought and the one before it in its block,
      in float32 at least; nothing where the schedule has no latent span.
    """
    if not output.thoughts:
        return {}
    latent = np.concatenate([np.full(span.length, isinstance(span, Latent)) for span in batch.schedule])
    thoughts, valid = _wide(jnp.concatenate(output.thoughts, 1)), batch.valid[:, latent]
    norms = jnp.linalg.norm(thoughts, axis=-1)
    # A thought's neighbour is the next one of its example. Thoughts of two blocks are none: what stands between them
    # parts them.
    next_ = batch.examples_per_row or 1
    starts = np.cumsum([0, *(block.shape[1] for block in output.thoughts)])[:-1]
    inside = ~np.isin(np.arange(next_, thoughts.shape[1]), starts[:, None] + np.arange(next_))
    products = jnp.einsum("bkd,bkd->bk", thoughts[:, :-next_], thoughts[:, next_:])
    lengths = jnp.maximum(norms[:, :-next_] * norms[:, next_:], jnp.finfo(norms.dtype).tiny)
    return {
        "thought_norm": ratio(norms, valid),
        "token_norm": ratio(jnp.linalg.norm(_wide(decoder.embed(batch.tokens)), axis=-1), batch.valid & ~latent),
        "thought_cosine": ratio(products / lengths, valid[:, :-next_] & valid[:, next_:] & inside),
    }


def _wide(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return jax.lax.stop_gradient(x).astype(jnp.promote_types(x.dtype, jnp.float32))
