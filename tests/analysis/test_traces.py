"""Whole rows from the inside, against each row alone, the obvious attention, and the path that answers questions."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.analysis.contributions import contributions
from coconut.analysis.traces import Rows, Trace, lay_out, trace
from coconut.batching import page_shape
from coconut.errors import CoconutError
from coconut.evaluation.reading import latent_columns, read
from coconut.latent.feedback import Identity
from coconut.latent.thinkers import OneByOne, Sweeps, Thinker
from coconut.model import Model
from coconut.models.attention import rotate
from coconut.models.config import DecoderConfig
from coconut.models.decoder import Decoder
from coconut.pages import Markers, Page, Text, Thoughts
from coconut.tokenizers import symbol_tokenizer
from tests.tiny_models import GPT2_STYLE, LLAMA_STYLE, quick_compilation, quick_jit, random_decoder
from tests.tiny_pages import aligned

TOKENIZER = symbol_tokenizer([str(number) for number in range(19)])
TOLERANCE = 1e-10


def page(question: list[int], *parts: int | list[int]) -> Page:
    """A question; numbers are blocks of so many thoughts between markers, lists are text."""
    markers = Markers.of(TOKENIZER)
    written: list[Text | Thoughts] = [Text(np.asarray(question, np.int32))]
    for part in parts:
        if isinstance(part, list):
            written.append(Text(np.asarray(part, np.int32)))
        else:
            written += [markers.start_text, Thoughts(part), markers.end_text]
    return tuple(written)


# Rows of two blocks and of one, which leave columns free before the question, in a block, and behind.
PAGES = [page([3, 4, 5], 2, [6, 7], 1, [8]), page([9, 10], 1, [11, 12, 13], 2), page([1, 2, 3, 4, 5], 3)]


class Traced(NamedTuple):
    decoder: Decoder
    thoughts: list[np.ndarray] | None
    last: np.ndarray
    rows: Rows
    all: Trace


def answered(decoder: Decoder, think: Thinker) -> tuple[list[np.ndarray] | None, np.ndarray]:
    """The thoughts of the pages, and the last states, by the path that answers questions."""
    feeds_back = think != Sweeps(count=0)
    batch = aligned(PAGES, page_shape(PAGES), TOKENIZER, feeds_back=feeds_back)

    @quick_jit  # One program, where answering compiles one for each span.
    def answer(decoder: Decoder) -> Any:
        return read(Model(decoder, {"feedback": Identity()}), batch, think, latent_id=TOKENIZER.latent_id)

    prefix, thoughts = answer(decoder)
    if not feeds_back:
        return None, np.asarray(prefix.last)
    made = np.concatenate([np.asarray(block) for block in thoughts], 1)
    used = np.asarray(batch.valid)[:, latent_columns(batch)]
    return [own[here] for own, here in zip(made, used, strict=True)], np.asarray(prefix.last)


OLMO_STYLE = dataclasses.replace(
    LLAMA_STYLE, norm_placement="after", query_key_norm=True, query_key_norm_over="all", qkv_bias=False
)
CASES: dict[str, tuple[DecoderConfig, Thinker, dict[str, Any]]] = {
    "learned positions": (GPT2_STYLE, OneByOne(), {}),
    "rotary, grouped queries, stacked": (LLAMA_STYLE, OneByOne(), {"scan_layers": True}),
    "norms behind": (OLMO_STYLE, OneByOne(), {}),
    "sweeps": (GPT2_STYLE, Sweeps(count=1), {}),
    "pauses": (GPT2_STYLE, Sweeps(count=0), {}),
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name == "pauses" else pytest.mark.slow) for name in CASES],
)
def traced(request: pytest.FixtureRequest) -> Iterator[Traced]:
    config, think, execution = CASES[request.param]
    with jax.enable_x64(True), quick_compilation():
        decoder = random_decoder(dataclasses.replace(config, param_dtype="float64"), **execution)
        thoughts, last = answered(decoder, think)
        rows = lay_out(PAGES, TOKENIZER, thoughts)
        parts = list(trace(decoder, rows, columns=rows.all_columns, batch_size=2))
        whole = [np.concatenate(part, axis) for part, axis in zip(zip(*parts, strict=True), (0, 1, 1, 0), strict=True)]
        yield Traced(decoder, thoughts, last, rows, Trace(*whole))


def test_last_states_are_those_that_answers_are_made_of(traced):
    columns = traced.rows.last_columns
    last = np.take_along_axis(traced.all.hidden, columns[..., None], 1)[:, 0]
    np.testing.assert_allclose(last, traced.last, atol=TOLERANCE)
    logits, expected = (traced.decoder.unembed(jnp.asarray(hidden)) for hidden in (last, traced.last))
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE)


def states_queries_keys(decoder: Decoder, inputs: jax.Array) -> tuple[jax.Array, list[Any]]:
    """What `Decoder.observe` sees of one row without padding, and each layer's queries and keys."""
    T, width = inputs.shape[1], decoder.config.width_of_head
    positions = jnp.arange(T)[None]
    *_, states = decoder.observe(inputs, positions, positions=positions, valid=jnp.ones((1, T), bool))
    found = []
    for index in range(decoder.config.num_layers):
        stacked = decoder.execution.scan_layers
        layer = jax.tree.map(lambda x, i=index: x[i], decoder.layers) if stacked else decoder.layers[index]
        reads = layer.attention_norm(states[index]) if decoder.config.norm_placement == "before" else states[index]
        both = [layer.attention.query(reads), layer.attention.key(reads)]
        if decoder.config.query_key_norm:  # Here over all heads.
            both = [layer.attention.query_norm(both[0]), layer.attention.key_norm(both[1])]
        both = [x.reshape(1, T, -1, width) for x in both]
        if decoder.config.position_embedding == "rotary":
            both = [rotate(x, positions, decoder.config.rotary_base) for x in both]
        found.append(both)
    return states, found


def alone(traced: Traced, row: int) -> tuple[np.ndarray, np.ndarray]:
    """States and attention weights of one row, head by head and column by column."""
    rows, config = traced.rows, traced.decoder.config
    inputs = np.array(traced.decoder.embed(jnp.asarray(rows.tokens[row])))
    if traced.thoughts is not None:
        inputs[rows.thoughts[row][rows.thoughts[row] >= 0]] = traced.thoughts[row]
    inputs = inputs[rows.valid[row]]
    T, heads = len(inputs), config.num_heads
    states, found = jax.tree.map(np.asarray, quick_jit(states_queries_keys)(traced.decoder, jnp.asarray(inputs[None])))
    weights = np.zeros((config.num_layers, heads, T, T))
    for index, (query, key) in enumerate(found):
        for head in range(heads):
            seen = key[0, :, head * config.kv_heads // heads]
            for column in range(T):
                scores = seen[: column + 1] @ query[0, column, head] / config.width_of_head**0.5
                weights[index, head, column, : column + 1] = np.exp(scores) / np.exp(scores).sum()
    return states[:, 0], weights


@pytest.mark.slow
def test_states_and_weights_are_those_of_each_row_alone(traced):
    for row in (0, 1):
        states, weights = alone(traced, row)
        here = traced.rows.valid[row]
        own = traced.all.states[:, row][:, here]
        np.testing.assert_allclose(own[:-1], states[:-1], atol=TOLERANCE)
        # The last one is kept before the final norm.
        np.testing.assert_allclose(traced.decoder.norm(jnp.asarray(own[-1:])), states[-1:], atol=TOLERANCE)
        np.testing.assert_allclose(traced.all.hidden[row, here], states[-1], atol=TOLERANCE)
        np.testing.assert_allclose(traced.all.weights[:, row][:, :, here][..., here], weights, atol=TOLERANCE)
        assert not traced.all.weights[:, row][..., ~here].any() and not traced.all.states[:, row][:, ~here].any()


def test_weights_sum_to_one_and_columns_say_what_they_hold(traced):
    valid, rows = traced.rows.valid, traced.rows
    np.testing.assert_allclose(
        traced.all.weights.sum(-1), np.broadcast_to(valid[:, None], traced.all.weights.shape[1:-1])[None].repeat(2, 0)
    )
    for row, own in enumerate(PAGES):
        columns = rows.thoughts[row][rows.thoughts[row] >= 0]
        assert isinstance(own[0], Text) and rows.tokens[row, rows.question[row]].tolist() == own[0].ids.tolist()
        assert (rows.tokens[row, columns] == TOKENIZER.latent_id).all()
        text = np.concatenate([part.ids for part in own[1:] if isinstance(part, Text)])
        assert rows.tokens[row, rows.text[row]].tolist() == text.tolist()
        assert len(columns) + (rows.question | rows.text)[row].sum() == valid[row].sum()
    assert [(row >= 0).sum() for row in rows.thoughts] == [3, 3, 3]
    # Without their thoughts the columns would be other ones.
    of_thoughts = next(trace(traced.decoder, rows, batch_size=3, with_weights=False))
    assert of_thoughts.weights is None
    expected = np.take_along_axis(traced.all.states, rows.thoughts[None, ..., None], 2)
    np.testing.assert_allclose(of_thoughts.states, expected, atol=TOLERANCE)


def test_contributions_add_up_to_the_logit(traced):
    rows = traced.rows
    tokens = np.asarray([[0, 4, 2], [7, 7, 1], [3, 18, 5]])
    found = contributions(traced.decoder, rows, tokens, batch_size=2)
    hidden = np.take_along_axis(traced.all.hidden, rows.thoughts[..., None], 1)
    logits = np.take_along_axis(np.asarray(traced.decoder.unembed(jnp.asarray(hidden))), tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(found.total, logits, atol=TOLERANCE)
    np.testing.assert_allclose(found.start + found.bias + found.logits.sum((0, 1)), logits, atol=1e-9)
    states = np.take_along_axis(traced.all.states, rows.thoughts[None, ..., None], 2)
    assert found.norms.shape == (2, 2, 3, 3)
    # What both add is the difference of two states; neither is nothing.
    added = np.linalg.norm(np.diff(states, axis=0), axis=-1)
    assert (found.norms.min(1) > 0.01).all() and (added <= found.norms.sum(1) + TOLERANCE).all()


def test_what_does_not_fit_is_refused():
    decoder = random_decoder(GPT2_STYLE)
    thoughts = [np.zeros((3, 16), np.float32)] * 3
    rows = lay_out(PAGES, TOKENIZER, thoughts)
    with pytest.raises(CoconutError, match="page 1 has 3 thoughts, and 2 are given"):
        lay_out(PAGES, TOKENIZER, [thoughts[0], thoughts[0][:2], thoughts[0]])
    with pytest.raises(CoconutError, match="thoughts = those of 1 rows: there are 3 pages"):
        lay_out(PAGES, TOKENIZER, thoughts[:1])
    with pytest.raises(CoconutError, match="pages: there are none"):
        lay_out([], TOKENIZER, None)
    with pytest.raises(CoconutError, match="batch_size = 0"):
        next(trace(decoder, rows, batch_size=0))
    with pytest.raises(CoconutError, match="is padding in its row"):
        next(trace(decoder, rows, columns=np.zeros((3, 1), int)))
    with pytest.raises(CoconutError, match="columns: must lie in"):
        next(trace(decoder, rows, columns=np.full((3, 1), rows.valid.shape[1])))
    with pytest.raises(CoconutError, match=r"thoughts of width 8: DecoderConfig\.embed_dim = 16"):
        next(trace(decoder, dataclasses.replace(rows, inputs=np.zeros((3, 3, 8), np.float32))))
    with pytest.raises(CoconutError, match=r"DecoderConfig\.max_positions = 4: the rows need"):
        next(trace(random_decoder(dataclasses.replace(GPT2_STYLE, max_positions=4)), rows))
    with pytest.raises(CoconutError, match="tokens of shape"):
        contributions(decoder, rows, np.zeros((3, 1), int))
