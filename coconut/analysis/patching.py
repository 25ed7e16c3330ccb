"""Activation patching: which states, of which thoughts and layers, carry the answer.

A question is run clean, and corrupted so that the right answer gets less likely. Then it is run corrupted once more
with one state put back to what it was in the clean run. If the answer comes back, that state carried it (Vig et al.
2020, arXiv 2004.12265; Meng et al. 2022, "Locating and editing factual associations in GPT", section 2). All runs read
the same columns, which differ in the question and in what follows from it.

A restored state reaches the answer in two ways: columns behind it look back on it, and thoughts behind it are made of
states that did. With a feedback given both count; without one the later thoughts stay those of the corrupted run, and
only the first way does.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from coconut.analysis.intervals import Means, means_of_questions
from coconut.analysis.traces import Rows, batches, place_thoughts, run_layers, trace
from coconut.errors import CoconutError
from coconut.latent.feedback import Feedback, draws, with_constants
from coconut.models.decoder import Decoder


class Patching(NamedTuple):
    """What restoring single states does.

    Attributes:
      effect: ``[L + 1, K]``: mean of ``(patched - corrupted) / (clean - corrupted)``, over the questions that count and
        have the thought. 0 where the state carries nothing, 1 where it carries all that the corruption took.
      clean: log-probability of each question's answer, in nats.
      corrupted: the same, with the question corrupted.
      patched: the same, with one state restored; NaN where a question has no such thought.
      counted: questions whose clean answer is more likely than the corrupted one by the threshold at least.
    """

    effect: Means
    clean: Float[np.ndarray, " Q"]
    corrupted: Float[np.ndarray, " Q"]
    patched: Float[np.ndarray, "Q _ K"]
    counted: Bool[np.ndarray, " Q"]


def with_other_questions(rows: Rows, *, seed: int = 0) -> tuple[Int[np.ndarray, " C"], Rows]:
    """Corrupts questions by giving them the question, and the thoughts, of another row.

    Args:
      rows: the clean rows.
      seed: of the partners.

    Returns:
      Which rows have a partner, another row with as many tokens and thoughts in the same columns, and another question;
      and these rows, corrupted. Their text is their own: that of the clean row's answer among it.
    """
    rng, taken, partners = np.random.default_rng(seed), [], []
    for row in range(len(rows)):
        alike = (rows.valid == rows.valid[row]).all(1) & (rows.question == rows.question[row]).all(1)
        alike &= (rows.thoughts == rows.thoughts[row]).all(1)
        asked = rows.question[row]
        alike &= (rows.tokens[:, asked] != rows.tokens[row, asked]).any(1)
        if alike.any():
            taken.append(row)
            partners.append(int(rng.choice(np.flatnonzero(alike))))
    own, other = rows.take(np.asarray(taken, int)), rows.take(np.asarray(partners, int))
    tokens = np.where(own.question, other.tokens, own.tokens)
    return np.asarray(taken, int), dataclasses.replace(own, tokens=tokens, inputs=other.inputs)


def noise_of_questions(
    decoder: Decoder, rows: Rows, *, factor: float = 1.0, seed: int = 0
) -> Float[np.ndarray, "Q T D"]:
    """Gaussian noise for the embeddings of questions, zero in all other columns.

    Args:
      decoder: the decoder.
      rows: the rows.
      factor: standard deviation of the noise, in units of that of all numbers of the embedding table.
      seed: of the noise.

    Raises:
      CoconutError: ``factor`` is not positive.
    """
    if not factor > 0:
        raise CoconutError(f"factor = {factor}: must be positive")
    table = np.asarray(decoder.input_table(jnp.dtype(jnp.float32)))
    drawn = np.random.default_rng(seed).normal(size=(*rows.tokens.shape, table.shape[1]))
    return (factor * table.std() * drawn * rows.question[..., None]).astype(table.dtype)


def think_again(
    decoder: Decoder, feedback: Feedback, rows: Rows, noise: Float[np.ndarray, "Q T D"], *, batch_size: int = 32
) -> Rows:
    """The rows with the thoughts that the model has when noise is added to its question.

    Thoughts are made one by one, each by a pass over the whole row: slow, and plain.

    Args:
      decoder: the decoder.
      feedback: how a hidden state becomes the next thought. One that draws has no place here.
      rows: the rows, with thoughts.
      noise: added to the embeddings (`noise_of_questions`).
      batch_size: rows run together.

    Raises:
      CoconutError: the rows hold pause tokens, or the feedback draws; see also `coconut.analysis.traces.trace`.
    """
    _check_feedback(feedback, rows)
    parts = [
        np.asarray(_think_again(decoder, feedback, *batch, added))[:number]
        for batch, number, (added,) in batches(decoder, rows, batch_size, noise)
    ]
    return dataclasses.replace(rows, inputs=np.concatenate(parts))


def patch_thoughts(
    decoder: Decoder,
    clean: Rows,
    corrupted: Rows,
    answer: Bool[np.ndarray, "Q T"],
    *,
    feedback: Feedback | None = None,
    noise: Float[np.ndarray, "Q T D"] | None = None,
    threshold: float = 0.5,
    vocab_size: int | None = None,
    batch_size: int = 32,
    resamples: int = 1000,
    seed: int = 0,
) -> Patching:
    """Restores the clean state of each layer and thought in the corrupted run, one at a time.

    It takes ``(L + 1) K`` runs of each question, and with a feedback on average ``K / 2`` times as many passes.

    Args:
      decoder: the decoder.
      clean: whole rows, up to their right answer.
      corrupted: the same rows, corrupted (`with_other_questions`, or `think_again` on noise): questions and thoughts
        differ, columns do not.
      answer: the columns that hold the answer's tokens, which are the same in both.
      feedback: makes the thoughts behind a restored state again, of thinkers one by one
        (`coconut.latent.thinkers.OneByOne`); None keeps those of the corrupted run.
      noise: added to the embeddings of the corrupted rows; None for none.
      threshold: the least difference between clean and corrupted log-probability, in nats, for a question to count: the
        effect is divided by it, and where nothing was lost nothing can come back. At 0.5 the corrupted answer is 0.61
        times as likely as the clean one.
      vocab_size: ids that are tokens, from 0; None for every row of the embedding.
      batch_size: rows run together.
      resamples: of the bootstrap.
      seed: of its draws.

    Raises:
      CoconutError: the rows do not stand in the same columns or have different answers; a row has no thought or no
        answer; ``threshold`` is not positive; or see `think_again` and `coconut.analysis.traces.trace`.
    """
    for field in ("valid", "positions", "thoughts"):
        if not np.array_equal(getattr(clean, field), getattr(corrupted, field)):
            raise CoconutError(f"corrupted.{field}: differs from that of the clean rows, whose columns it must have")
    if answer.shape != clean.tokens.shape or not (answer & clean.text).any(1).all() or (answer & ~clean.text).any():
        raise CoconutError("answer: must name columns of text, at least one of each row")
    if (answer & (clean.tokens != corrupted.tokens)).any():
        raise CoconutError("corrupted.tokens: the answer differs from that of the clean rows")
    if not threshold > 0:
        raise CoconutError(f"threshold = {threshold}: must be positive")
    if feedback is not None:
        _check_feedback(feedback, clean)
    noise = np.zeros((*clean.tokens.shape, 1), np.float32) if noise is None else noise
    columns = np.full((len(answer), answer.sum(1).max()), -1)
    for row, own in enumerate(answer):
        columns[row, : own.sum()] = np.flatnonzero(own)
    size = decoder.config.vocabulary if vocab_size is None else vocab_size
    states = [one.states for one in trace(decoder, clean, with_weights=False, batch_size=batch_size)]
    K, L = clean.thoughts.shape[1], decoder.config.num_layers

    def score(rows: Rows, noise: np.ndarray, restored: tuple[int, int] | None) -> np.ndarray:
        scores = []
        each = batches(decoder, rows, batch_size, noise, columns)
        for (batch, number, (added, scored)), own in zip(each, states, strict=True):
            layer, thought = (-1, 0) if restored is None else restored
            put = np.zeros((len(scored), own.shape[-1]), own.dtype)
            put[:number] = own[layer, :, thought]
            found = _score(decoder, feedback, *batch, added, scored, put, layer, thought, size)
            scores.append(np.asarray(found)[:number])
        return np.concatenate(scores)

    clean_score = score(clean, np.zeros_like(noise), None)
    corrupted_score = score(corrupted, noise, None)
    patched = np.stack([[score(corrupted, noise, (layer, k)) for k in range(K)] for layer in range(L + 1)])
    patched = np.where(clean.thoughts[:, None] >= 0, patched.transpose(2, 0, 1), np.nan)
    lost = clean_score - corrupted_score
    counted = lost >= threshold
    effects = np.where(counted[:, None, None], patched - corrupted_score[:, None, None], np.nan)
    effects /= np.where(counted, lost, np.nan)[:, None, None]
    effect = means_of_questions(effects, resamples=resamples, seed=seed)
    return Patching(effect, clean_score, corrupted_score, patched, counted)


def _check_feedback(feedback: Feedback, rows: Rows) -> None:
    if rows.inputs is None:
        raise CoconutError("Rows.inputs = None: pause tokens are not made of states, so that none is made again")
    if draws(feedback):
        raise CoconutError(f"the feedback {type(feedback).__name__} draws: thoughts made again would be other ones")


def _column_before(valid: Bool[Array, "B T"], columns: Int[Array, "B W"]) -> Int[Array, "B W"]:
    """The last valid column before each of some columns."""
    T = valid.shape[1]
    earlier = valid[:, None] & (jnp.arange(T) < columns[..., None])
    return jnp.max(jnp.where(earlier, jnp.arange(T), 0), axis=-1)


def _make_thoughts(
    decoder: Decoder,
    feedback: Feedback,
    x: Array,
    positions: Array,
    valid: Array,
    thoughts: Array,
    first: Any,
    edit: Any,
) -> Array:
    """The inputs of whole rows with the thoughts from ``first`` on made again, one by one."""
    before = _column_before(valid, thoughts)
    feedback = with_constants(feedback, decoder)

    def body(index: Array, x: Array) -> Array:
        take = lambda array: jax.lax.dynamic_slice_in_dim(array, index, 1, axis=1)
        layers = run_layers(decoder, x, positions=positions, valid=valid, wanted=take(before), edit=edit)
        return place_thoughts(x, take(thoughts), feedback(decoder, layers.hidden))

    return jax.lax.fori_loop(first, thoughts.shape[1], body, x)


@jax.jit
def _think_again(
    decoder: Decoder,
    feedback: Feedback,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    thoughts: Int[Array, "B K"],
    inputs: Float[Array, "B K D"],
    noise: Float[Array, "B T _"],
) -> Float[Array, "B K D"]:
    x = place_thoughts(decoder.embed(tokens) + noise, thoughts, inputs)
    x = _make_thoughts(decoder, feedback, x, positions, valid, thoughts, 0, lambda index, x: x)
    made = jnp.take_along_axis(x, jnp.maximum(thoughts, 0)[..., None], axis=1)
    return jnp.where((thoughts >= 0)[..., None], made, 0.0)


@functools.partial(jax.jit, static_argnums=12)
def _score(
    decoder: Decoder,
    feedback: Feedback | None,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    thoughts: Int[Array, "B K"],
    inputs: Float[Array, "B K D"] | None,
    noise: Float[Array, "B T _"],
    answer: Int[Array, "B S"],
    restored: Float[Array, "B D"],
    layer: Int[Array, ""],
    thought: Int[Array, ""],
    size: int,
) -> Float[Array, " B"]:
    """Log-probability of the answer with a state restored at a layer and thought; none is at layer -1."""
    column = jax.lax.dynamic_slice_in_dim(thoughts, thought, 1, axis=1)

    def edit(index: Any, x: Array) -> Array:
        return jnp.where(index == layer, place_thoughts(x, column, restored[:, None]), x)

    x = place_thoughts(decoder.embed(tokens) + noise.astype(decoder.execution.compute_dtype), thoughts, inputs)
    if feedback is not None:
        first = jnp.where(layer < 0, thoughts.shape[1], thought + 1)
        x = _make_thoughts(decoder, feedback, x, positions, valid, thoughts, first, edit)
    before = _column_before(valid, answer)
    layers = run_layers(decoder, x, positions=positions, valid=valid, wanted=before, edit=edit)
    shares = jax.nn.log_softmax(decoder.unembed(layers.hidden)[..., :size])
    written = jnp.take_along_axis(tokens, jnp.maximum(answer, 0), axis=1)
    own = jnp.take_along_axis(shares, written[..., None], axis=-1)[..., 0]
    return jnp.where(answer >= 0, own, 0.0).sum(1)
