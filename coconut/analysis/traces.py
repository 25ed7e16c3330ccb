"""All that happens inside a decoder while it reads whole rows: states between the layers, and attention weights.

Once the thoughts of a question are known (`coconut.evaluation.answers.thoughts_of_questions`), its whole row is one
pass of causal attention: question, markers, the thoughts as inputs, and whatever stands behind them. Each column then
has the keys, values and states that it had when the thoughts were made one by one.

This holds for thoughts made in sweeps (`coconut.latent.thinkers.Sweeps`), too. What follows looks back on the columns
of the block as they are after the last sweep, which ran them causally on their final inputs. But with fewer sweeps than
thoughts the state before a thought is not what it was made of: that was an earlier sweep's. Pause tokens are known from
the start, and their rows are read as they are, without thoughts.

All passes here are of dense attention, without dropout: a row that uses a part of a block has a gap there, which the
kernels do not take (`coconut.models.segment_attention`).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from coconut.batching import align, page_shape
from coconut.errors import CoconutError
from coconut.models.decoder import Decoder
from coconut.models.decoder_layer import Layer
from coconut.models.layers import take_columns
from coconut.models.visibility import Visibility
from coconut.pages import Page, Text, Thoughts, count_thoughts
from coconut.tokenizers import Tokenizer, validate_ids


@no_type_check  # The import hook would look at every field of every slice
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Whole rows in the columns of one shape: prompts end together, and every block has columns of its own.

    Attributes:
      tokens: token ids; the latent marker's in the columns of thoughts.
      positions: position of each column in its row.
      valid: columns that belong to the row.
      question: which of them hold the question. They are a row's first ones.
      thoughts: the column of each thought of a row, block by block; -1 behind a row's last one.
      text: which columns hold any other text: markers, and what stands behind the question.
      inputs: what is run in the columns of ``thoughts``; None for the tokens' embeddings, which makes them pauses.
    """

    tokens: Int[np.ndarray, "B T"]
    positions: Int[np.ndarray, "B T"]
    valid: Bool[np.ndarray, "B T"]
    question: Bool[np.ndarray, "B T"]
    thoughts: Int[np.ndarray, "B K"]
    text: Bool[np.ndarray, "B T"]
    inputs: Float[np.ndarray, "B K D"] | None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def all_columns(self) -> Int[np.ndarray, "B T"]:
        """The number of each column that belongs to its row; -1 elsewhere."""
        return np.where(self.valid, np.arange(self.valid.shape[1]), -1)

    @property
    def last_columns(self) -> Int[np.ndarray, "B 1"]:
        """The last column of each row, whose state decides what would be written next."""
        return self.all_columns.max(1, keepdims=True)

    def take(self, rows: Any) -> "Rows":
        """Some of the rows, by any index of numpy's that keeps the first axis."""
        taken = {
            field.name: array[rows]
            for field in dataclasses.fields(self)
            if (array := getattr(self, field.name)) is not None
        }
        return dataclasses.replace(self, **taken)


def lay_out(pages: Sequence[Page], tokenizer: Tokenizer, thoughts: Sequence[np.ndarray] | None) -> Rows:
    """Writes pages and their thoughts into columns.

    Args:
      pages: whole rows, each of which begins with its question: what a question is given with
        (`coconut.evaluation.reading.given_pages`), and any text behind it.
      tokenizer: the tokenizer.
      thoughts: ``[K, D]`` of each page, of all of its blocks in order (`thoughts_of_questions`); None where the blocks
        hold pause tokens.

    Raises:
      CoconutError: there are no pages, a page begins with something else than text, or has another number of thoughts
        than are given.
    """
    if not pages:
        raise CoconutError("pages: there are none to lay out")
    if thoughts is not None and len(thoughts) != len(pages):
        raise CoconutError(f"thoughts = those of {len(thoughts)} rows: there are {len(pages)} pages")
    shape = page_shape(pages)
    batch = align(pages, shape, pad_id=tokenizer.eos_id, latent_id=tokenizer.latent_id, feeds_back=True)
    valid, (_, starts) = np.asarray(batch.valid), shape.starts
    question = np.zeros(valid.shape, bool)
    most = max(map(count_thoughts, pages))
    columns = np.full((len(pages), most), -1)
    inputs = None
    if thoughts is not None:
        inputs = np.zeros((len(pages), most, thoughts[0].shape[-1]), thoughts[0].dtype)
    for row, page in enumerate(pages):
        if not isinstance(page[0], Text):
            raise CoconutError(f"page {row}: must begin with its question, not with a block of thoughts")
        first = int(np.argmax(valid[row]))
        question[row, first : first + len(page[0].ids)] = True
        counts = [part.count for part in page if isinstance(part, Thoughts)]
        own = [start + number for start, count in zip(starts, counts, strict=False) for number in range(count)]
        columns[row, : len(own)] = own
        if inputs is not None and thoughts is not None:
            if len(thoughts[row]) != len(own):
                raise CoconutError(f"page {row} has {len(own)} thoughts, and {len(thoughts[row])} are given")
            inputs[row, : len(own)] = thoughts[row]
    text = valid & ~question
    for row, own in enumerate(columns):
        text[row, own[own >= 0]] = False
    return Rows(
        tokens=batch.tokens,
        positions=batch.positions,
        valid=valid,
        question=question,
        thoughts=columns,
        text=text,
        inputs=inputs,
    )


class Layers(NamedTuple):
    """What the layers do at ``W`` columns of each row.

    Attributes:
      states: the residual stream before each layer, and last what the last layer leaves, *before* the final norm
        (`Decoder.observe` has it behind that norm). Positions of a learned table are in the first one already.
      attention: what each layer's attention adds to it.
      mlp: what each layer's MLP adds to it.
      weights: those with which each column attends to the ``T`` columns of its row, by head; None where not asked for.
      hidden: states after the final norm, which logits and thoughts are made of.
    """

    states: Float[Array, "_ B W D"]
    attention: Float[Array, "L B W D"]
    mlp: Float[Array, "L B W D"]
    weights: Float[Array, "L B N W T"] | None
    hidden: Float[Array, "B W D"]


def run_layers(
    decoder: Decoder,
    inputs: Float[Array, "B T D"],
    *,
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    wanted: Int[Array, "B W"],
    with_weights: bool = False,
    edit: Callable[[Any, Array], Array] = lambda index, x: x,
) -> Layers:
    """Runs all layers over whole rows, and keeps what they do at some columns. Traceable.

    Args:
      decoder: the decoder, with its layers stacked or one by one.
      inputs: token embeddings and thoughts, without positions.
      positions: position of each column in its row.
      valid: columns that others may attend to.
      wanted: the columns to keep.
      with_weights: whether to keep attention weights.
      edit: called with the index of each layer and the residual stream ``[B, T, D]`` before it, and with ``L`` and what
        the last one leaves; returns what goes on from there.
    """
    x = inputs.astype(decoder.execution.compute_dtype)
    if decoder.config.position_embedding == "learned":
        x = x + decoder.positions(positions)
    visible = Visibility(decoder.config, [], valid, dense=True)

    def step(x: Array, scanned: tuple[Layer, Any]) -> tuple[Array, tuple[Any, ...]]:
        layer, index = scanned
        x = edit(index, x)
        reads = layer.attention_reads(x)
        attended, _ = layer.attention(
            reads,
            index=index,
            positions=positions,
            past=[],
            visible=visible.of_layer(index),
            implementation="dense",
            dropout=None,
            columns=[],
        )
        weights = None
        if with_weights:
            (everywhere,) = visible.of_layer(index)
            weights = layer.attention.weights(
                reads, index=index, positions=positions, visible=take_columns(everywhere, wanted), wanted=wanted
            )
        attended = layer.attention_adds(attended)
        between = x + attended
        added = layer.mlp_adds(between)
        kept = [take_columns(part, wanted) for part in (x, attended, added)]
        return between + added, (*kept, weights)

    if decoder.execution.scan_layers:
        x, kept = jax.lax.scan(step, x, (decoder.layers, jnp.arange(decoder.config.num_layers)))
    else:
        each = []
        for index, layer in enumerate(decoder.layers):
            x, own = step(x, (layer, index))
            each.append(own)
        kept = jax.tree.map(lambda *parts: jnp.stack(parts), *each)
    states, attention, mlp, weights = kept
    last = take_columns(edit(decoder.config.num_layers, x), wanted)
    return Layers(jnp.concatenate([states, last[None]]), attention, mlp, weights, decoder.norm(last))


def place_thoughts(
    embedded: Float[Array, "B T D"], thoughts: Int[Array, "B K"], inputs: Float[Array, "B K D"] | None
) -> Float[Array, "B T D"]:
    """Puts the inputs of thoughts into their columns; a column of -1 is no column."""
    if inputs is None:
        return embedded
    # Behind the last column, where a write is dropped: -1 would be the last one.
    columns = jnp.where(thoughts < 0, embedded.shape[1], thoughts)
    rows = jnp.arange(len(embedded))[:, None]
    return embedded.at[rows, columns].set(inputs.astype(embedded.dtype), mode="drop")


class Trace(NamedTuple):
    """Rows seen from the inside, at ``W`` columns of each; zero where a row has no such column.

    Attributes:
      columns: which columns they are; -1 where a row has none.
      states: see `Layers`.
      weights: see `Layers`.
      hidden: states after the final norm.
    """

    columns: Int[np.ndarray, "B W"]
    states: Float[np.ndarray, "_ B W D"]
    weights: Float[np.ndarray, "L B N W T"] | None
    hidden: Float[np.ndarray, "B W D"]


def trace(
    decoder: Decoder,
    rows: Rows,
    *,
    columns: Int[np.ndarray, "B W"] | None = None,
    with_weights: bool = True,
    batch_size: int = 32,
) -> Iterator[Trace]:
    """Runs rows, batch by batch, and looks at some of their columns.

    GPT-2's states at six thoughts of 1,000 questions are 240 MB, and their attention weights over 200 columns 700 MB;
    those of all columns are 33 times as much. So what is made of them is better made batch by batch.

    Args:
      decoder: the decoder.
      rows: the rows (`lay_out`).
      columns: of each row, to look at, -1 for none; None for the columns of its thoughts. `Rows.all_columns` are all.
      with_weights: whether to return attention weights.
      batch_size: rows run together.

    Yields:
      The trace of each batch of rows, in order.

    Raises:
      CoconutError: a batch of no rows is asked for; rows do not fit the decoder; or a column is not one of its row.
    """
    columns = rows.thoughts if columns is None else columns
    if columns.min(initial=-1) < -1 or columns.max(initial=-1) >= rows.valid.shape[1]:
        raise CoconutError(f"columns: must lie in 0 .. {rows.valid.shape[1] - 1}, or be -1 for none")
    present = (columns >= 0) & np.take_along_axis(rows.valid, np.maximum(columns, 0), 1)
    if (present != (columns >= 0)).any():
        raise CoconutError("columns: one of them is padding in its row; -1 stands for no column")
    for batch, number, (own, here) in batches(decoder, rows, batch_size, columns, present):
        found = _trace(decoder, *batch, np.maximum(own, 0), here, with_weights=with_weights)
        states, weights, hidden = jax.tree.map(np.asarray, found)
        yield Trace(own[:number], states[:, :number], None if weights is None else weights[:, :number], hidden[:number])


def batches(
    decoder: Decoder, rows: Rows, batch_size: int, *beside: np.ndarray
) -> Iterator[tuple[tuple[Any, ...], int, list[np.ndarray]]]:
    """Batches of one size; the last one is filled up with its first row.

    Args:
      decoder: what is to run them.
      rows: the rows.
      batch_size: rows of a batch.
      beside: arrays with an entry for each row.

    Yields:
      The arrays of each batch (tokens, positions, valid, thoughts, inputs), how many of its rows count, and those rows
      of what stands beside.

    Raises:
      CoconutError: ``batch_size`` is below 1, or the rows do not fit the decoder.
    """
    if batch_size < 1:
        raise CoconutError(f"batch_size = {batch_size}: must be at least 1")
    config = decoder.config
    validate_ids(rows.tokens, config.vocabulary, "Rows.tokens")
    if config.position_embedding == "learned" and (needed := int(rows.positions.max()) + 1) > config.max_positions:
        raise CoconutError(f"DecoderConfig.max_positions = {config.max_positions}: the rows need {needed}")
    if rows.inputs is not None and rows.inputs.shape[-1] != config.embed_dim:
        raise CoconutError(f"thoughts of width {rows.inputs.shape[-1]}: DecoderConfig.embed_dim = {config.embed_dim}")
    for start in range(0, len(rows), batch_size):
        number = min(batch_size, len(rows) - start)
        indices = np.where(np.arange(batch_size) < number, np.arange(batch_size), 0) + start
        own = rows.take(indices)
        arrays = (own.tokens, own.positions, own.valid, own.thoughts, own.inputs)
        yield arrays, number, [array[indices] for array in beside]


@functools.partial(jax.jit, static_argnames="with_weights")
def _trace(
    decoder: Decoder,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    thoughts: Int[Array, "B K"],
    inputs: Float[Array, "B K D"] | None,
    wanted: Int[Array, "B W"],
    present: Bool[Array, "B W"],
    *,
    with_weights: bool,
) -> tuple[Array, Array | None, Array]:
    embedded = place_thoughts(decoder.embed(tokens), thoughts, inputs)
    layers = run_layers(decoder, embedded, positions=positions, valid=valid, wanted=wanted, with_weights=with_weights)
    weights = None if layers.weights is None else jnp.where(present[:, None, :, None], layers.weights, 0.0)
    return (
        jnp.where(present[..., None], layers.states, 0.0),
        weights,
        jnp.where(present[..., None], layers.hidden, 0.0),
    )
