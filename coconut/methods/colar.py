"""CoLaR (Tan et al. 2025, arXiv 2505.16552): written steps compressed in groups, and a head that draws what follows.

In training the embeddings of ``r`` tokens of the chain become one input, in parallel: nothing is fed back. The head
learns to draw the next group from the state of the one before, and the output layer to write one token of it. At test
time the head's draws are fed back until the end marker is the most likely token. This is the supervised stage;
`coconut.latent.gaussian.GaussianHead` is the head.
"""

import dataclasses
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from coconut.errors import CoconutError, check_fields
from coconut.latent.gaussian import GaussianHead
from coconut.latent.halting import HaltingConfig
from coconut.losses import Loss, Ratio, Term, ratio, score_labels
from coconut.methods.method import LossContext, Method, Views
from coconut.model import Model
from coconut.models.decoder import Decoder
from coconut.pages import Page, Placing, Text, Thoughts
from coconut.tokenizers import TokenizedExample
from coconut.types import IGNORED_LABEL, Batch, Think


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class ColarOptions:
    """Options of `COLAR`.

    Attributes:
      most_compressed: tokens of a group at most; each batch draws their number, from 1 on.
      latent: factor of the head's loss.
      most_thoughts: thoughts of an answer at most.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    most_compressed: int = 5
    latent: float = 1.0
    most_thoughts: int = 64

    def __post_init__(self) -> None:
        check_fields(self)
        for field in ("most_compressed", "most_thoughts"):
            if getattr(self, field) < 1:
                raise CoconutError(f"ColarOptions.{field} = {getattr(self, field)!r}: must be at least 1")
        if not 0 <= self.latent < np.inf:
            raise CoconutError(f"ColarOptions.latent = {self.latent!r}: must be at least 0")


def write_to_compress(example: TokenizedExample, placing: Placing) -> Page:
    """``question <start> steps <end> answer``; to be answered it is ``question <start> thoughts <end>``.

    The end marker is written by the model itself: it is how the thoughts end.
    """
    markers = placing.markers
    front = (Text(example.question), markers.start_text)
    if placing.answering:
        end = (Thoughts(placing.options.most_thoughts), markers.end_text)
        return (*front, *end, Text(example.answer, True, 0, True, example.answer_prefix))
    steps = [step for step in example.steps if not isinstance(step, Think)]
    chain = np.concatenate([np.zeros(0, np.int32), *steps])
    return (
        *front,
        Text(chain, True, 0),
        Text(markers.end_text.ids, True, 1),
        Text(example.answer, True, 2, True, example.answer_prefix),
    )


class Compressed(NamedTuple):
    """A batch whose chains were compressed, in as many columns as before.

    Attributes:
      inputs: what the decoder reads.
      positions: of each column in its row.
      valid: columns that belong to the row.
      labels: the token that each column's predecessor has to write: for a group one of its tokens.
      thoughts: columns whose predecessor has to draw them: those of groups, and of the end marker behind them.
      answers: columns of the answer.
    """

    inputs: Float[Array, "B T D"]
    positions: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    labels: Int[Array, "B T"]
    thoughts: Bool[Array, "B T"]
    answers: Bool[Array, "B T"]


def compress_chains(decoder: Decoder, batch: Batch, size: Int[Array, ""], key: Key[Array, ""] | None) -> Compressed:
    """Makes each ``size`` tokens of a chain one input: their embeddings' sum over the root of their number.

    The root keeps the variance of independent embeddings. The last group of a row may be smaller. Rows are packed to
    the left, so a row's own columns follow each other.

    Args:
      decoder: whose embeddings they are.
      batch: pages of `write_to_compress`.
      size: tokens of a group.
      key: draws the token of each group that has to be written; None takes its first.
    """
    T = batch.tokens.shape[1]
    valid, chain, end = jnp.asarray(batch.valid), batch.pieces == 0, batch.pieces == 1
    number, within = chain.sum(1, keepdims=True), jnp.cumsum(chain, 1) - 1
    place = jnp.cumsum(valid, 1) - 1  # before compression
    first = jnp.sum(valid & (batch.pieces < 0), 1, keepdims=True)
    groups = -(-number // size)
    place = jnp.where(chain, first + within // size, jnp.where(batch.pieces > 0, place - number + groups, place))
    place = jnp.where(valid, place, T)  # dropped
    rows = jnp.arange(len(place))[:, None]
    count = jnp.zeros((len(place), T), jnp.int32).at[rows, place].add(1, mode="drop")
    embedded = decoder.embed(batch.tokens)
    summed = jnp.zeros_like(embedded).at[rows, place].add(embedded, mode="drop")
    inputs = summed / jnp.sqrt(jnp.maximum(count, 1)).astype(summed.dtype)[..., None]
    chosen = jnp.zeros(count.shape, jnp.int32)
    if key is not None:
        chosen = jnp.floor(jax.random.uniform(key, count.shape) * count).astype(jnp.int32)
    # The token of a group that is its ``chosen``-th.
    rank = jnp.where(chain, within % size, 0)
    picked = valid & (rank == jnp.take_along_axis(chosen, jnp.minimum(place, T - 1), 1))
    put = lambda x, filling: jnp.full(count.shape, filling).at[rows, jnp.where(picked, place, T)].set(x, mode="drop")
    return Compressed(
        inputs=inputs,
        positions=jnp.where(count > 0, jnp.arange(T), 0),
        valid=count > 0,
        labels=put(batch.labels, IGNORED_LABEL),
        thoughts=put(chain | end, False),
        answers=put(batch.answers, False),
    )


def colar_loss(model: Model, views: Views, context: LossContext) -> Loss:
    """Cross-entropy of a token of the next group and of the answer, and the head's squared error.

    The error is that of a draw against the next input in units of the head's ``factor``; without a key, of the mean
    against it. The last group's state has to draw the end marker. Each row counts alike, since how many columns its
    chain leaves is drawn; the original's mean is over the columns of a batch.
    """
    head = model.feedback
    if not isinstance(head, GaussianHead):
        raise CoconutError(
            "RunConfig.method = 'colar' needs FeedbackConfig.kind = 'gaussian', and this run feeds back by "
            f"{type(head).__name__}"
        )
    options, batch, key = context.options, views["main"], context.key
    size, draw, pick = jnp.asarray(1), None, None
    if key is not None:
        size_key, draw, pick = (jax.random.fold_in(key, index) for index in (2, 3, 4))
        size = jax.random.randint(size_key, (), 1, options.most_compressed + 1)
    packed = compress_chains(model.decoder, batch, size, pick)
    T = packed.inputs.shape[1]
    dropout = context.dropout(model.decoder, jnp.arange(T), T)
    hidden, _ = model.decoder.trunk(packed.inputs, positions=packed.positions, valid=packed.valid, dropout=dropout)
    before, labels = hidden[:, :-1], packed.labels[:, 1:]
    losses, right = score_labels(model.decoder, before, labels)
    known, answers = labels != IGNORED_LABEL, packed.answers[:, 1:]
    rows = (batch.labels != IGNORED_LABEL).any(1)
    accuracy = lambda counted: ratio(right.astype(losses.dtype), counted)
    whole = ratio(jnp.where(answers & known, right, True).all(1).astype(losses.dtype), (answers & known).any(1))
    metrics: dict[str, Ratio] = {
        "loss": ratio(losses, known),
        "accuracy": accuracy(known),
        "answer_loss": ratio(losses, known & answers),
        "answer_accuracy": whole,
    }
    terms = {"language": Term(ratio(_row_means(losses, known), rows))}
    if options.latent:
        mean, deviation = head.distribution(model.decoder, before)
        if draw is not None:
            mean = mean + deviation * jax.random.normal(draw, mean.shape, mean.dtype)
        target = jax.lax.stop_gradient(packed.inputs[:, 1:]).astype(mean.dtype) / head.factor
        errors = _row_means(jnp.square(mean - target).mean(-1), packed.thoughts[:, 1:])
        terms["latent"] = Term(ratio(errors, rows), options.latent)
    return Loss(terms, metrics)


def _row_means(values: Float[Array, "B T"], counted: Bool[Array, "B T"]) -> Float[Array, " B"]:
    return jnp.sum(jnp.where(counted, values, 0.0), 1) / jnp.maximum(counted.sum(1), 1)


def halt_by_marker(placing: Placing) -> HaltingConfig | None:
    """The thoughts end where the end marker is the most likely token."""
    most = placing.options.most_thoughts
    return HaltingConfig(stop="token", tokens=("end",), least=1, most=most, room=most)


COLAR = Method(
    name="colar",
    pages={"main": write_to_compress},
    options=ColarOptions,
    halting=halt_by_marker,
    ends_blocks=True,
    needs_steps=True,
    reads_pages=False,
    loss=colar_loss,
)
