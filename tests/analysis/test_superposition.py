"""Zhu et al.'s three measures on arrays written by hand, and on a random decoder of two layers."""

import jax.numpy as jnp
import numpy as np
import pytest

from coconut.analysis.levels import means_by_level
from coconut.analysis.superposition import (
    attention_weights,
    copied,
    edge_attention,
    edge_attention_by_group,
    first_columns,
    group_edges,
    histograms_by_group,
    inner_products,
    rows_of,
)
from coconut.errors import CoconutError
from coconut.latent.feedback import Identity
from coconut.model import Model
from coconut.models.config import DecoderConfig
from coconut.tasks import small_graphs
from coconut.tokenizers import SYMBOLS, symbol_tokenizer
from coconut.types import Graph
from tests.analysis.tiny_subject import asked_subject
from tests.tiny_models import quick_compilation, quick_jit, random_decoder

# 0 -> 1 -> 3, 0 -> 2, 1 -> 4, 5 -> 3; target 3.
EDGES = ((1, 3), (0, 1), (0, 2), (5, 3), (1, 4))
GRAPH = Graph(symbols=tuple("abcdef"), edges=EDGES, root=0, target=3, negative=5)


def test_edges_belong_to_the_group_of_their_source():
    assert group_edges(GRAPH, 0) == ["unreachable", "optimal", "frontier", "unreachable", "unreachable"]
    assert group_edges(GRAPH, 1) == ["optimal", "reachable", "reachable", "unreachable", "frontier"]
    # The target is reached, and nothing goes on from it.
    assert group_edges(GRAPH, 2) == ["reachable", "reachable", "reachable", "unreachable", "reachable"]


def test_attention_to_edges_is_summed_over_heads_and_tokens():
    # Two layers, two heads, columns: one before, two edges of three, two steps.
    weights = np.zeros((2, 2, 9, 9))
    weights[1, 0, 7, 1:4], weights[1, 1, 7, 1:4] = [0.1, 0.2, 0.3], [0.0, 0.0, 0.4]
    weights[1, 1, 8, 4:7], weights[1, 0, 8, 0] = [0.5, 0.25, 0.0], 1.0
    weights[0, 0, 7, 1] = 0.9  # Another layer.
    edges, steps = np.asarray([4, 1]), np.asarray([7, 8])  # The graph's first edge stands behind its second.
    np.testing.assert_allclose(edge_attention(weights, edges, steps), [[0, 1.0], [0.75, 0]])
    np.testing.assert_allclose(edge_attention(weights, edges, steps, layer=0), [[0, 0.9], [0, 0]])
    with pytest.raises(CoconutError, match=r"layer = 2: the weights are those of layers 0 \.\. 1"):
        edge_attention(weights, edges, steps, layer=2)
    weights[0, :, 6, 4], weights[0, 0, 6, 5], weights[0, 1, 3, 2] = 0.5, 0.25, 0.75
    np.testing.assert_allclose(copied(weights, edges), [[1.0, 0.25], [0, 0.75]])
    np.testing.assert_allclose(first_columns(weights, 7)[6], [0, 0, 0, 0, 1.0, 0.25, 0])
    with pytest.raises(CoconutError, match="number = 0"):
        first_columns(weights, 0)


def test_attention_by_group_averages_over_edges():
    one = np.asarray([[0.1, 0.8, 0.4, 0.2, 0.3], [0.9, 0.2, 0.4, 0.1, 0.5]])
    found = edge_attention_by_group([one, 3 * one], [GRAPH, GRAPH])
    np.testing.assert_allclose(found["optimal"].means, [1.6, 1.8])
    np.testing.assert_allclose(found["frontier"].means, [0.8, 1.0])
    np.testing.assert_allclose(found["unreachable"].means, [0.4, 0.2])
    assert found["unreachable"].number.tolist() == [6, 2] and found["reachable"].levels.tolist() == [1]
    np.testing.assert_allclose(found["reachable"].means, [0.6])
    # A bootstrap of two questions draws the one, the other, or both.
    np.testing.assert_allclose([found["optimal"].low, found["optimal"].high], [[0.8, 0.9], [2.4, 2.7]])
    with pytest.raises(CoconutError, match="1 questions does not fit 2"):
        edge_attention_by_group([one], [GRAPH, GRAPH])
    with pytest.raises(CoconutError, match="question 0: attention to 4 edges, of 5"):
        edge_attention_by_group([one[:, 1:]], [GRAPH])


def test_means_by_level_weigh_numbers_and_draw_questions():
    numbers = [(2, 0, 1.0), (2, 0, 3.0), (2, 1, 8.0), (5, 1, 7.0)]
    found = means_by_level(numbers, 2)
    assert found.levels.tolist() == [2, 5] and found.means.tolist() == [4.0, 7.0]
    assert (found.number.tolist(), found.questions.tolist()) == ([3, 1], [2, 1])
    # Question 0 alone has the mean 2, question 1 alone 8; one question has no interval.
    np.testing.assert_allclose([found.low, found.high], [[2, np.nan], [8, np.nan]])
    assert means_by_level([], 2).levels.shape == (0,)
    with pytest.raises(CoconutError, match="there are no questions"):
        means_by_level([], 0)


def test_histograms_count_each_node_in_its_group():
    # One thought: after one step b and c are reached, b is optimal, a is reachable.
    one = np.asarray([[0.0, 9.0, 5.0, 1.0, 1.0, 1.0]])
    two = np.asarray([[1.0, 10.0, 4.0, 0.0, 1.0, 2.0]])
    found = histograms_by_group([one, two], [GRAPH, GRAPH], bins=5)
    np.testing.assert_allclose(found.edges, [0, 2, 4, 6, 8, 10])
    assert found.counts["optimal"].tolist() == [[0, 0, 0, 0, 2]]
    assert found.counts["frontier"].tolist() == [[0, 0, 2, 0, 0]]
    assert found.counts["reachable"].tolist() == [[2, 0, 0, 0, 0]]
    assert found.counts["unreachable"].tolist() == [[5, 1, 0, 0, 0]]
    assert len(histograms_by_group([one], [GRAPH]).edges) == 31
    with pytest.raises(CoconutError, match="products of 0 questions do not fit 0 graphs"):
        histograms_by_group([], [])
    with pytest.raises(CoconutError, match="bins = 0"):
        histograms_by_group([one], [GRAPH], bins=0)
    with pytest.raises(CoconutError, match=r"question 1: products of shape \(1, 5\)"):
        histograms_by_group([one, two[:, 1:]], [GRAPH, GRAPH])


@pytest.fixture(scope="module")
def asked():
    """A random decoder of two layers with fewer key heads than heads."""
    tokenizer = symbol_tokenizer(small_graphs.E8.vocabulary)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=2,
        embed_dim=16,
        num_heads=4,
        num_kv_heads=2,
        max_positions=48,
        position_embedding="rotary",
    )
    return asked_subject(Model(random_decoder(config), {"feedback": Identity()}), tokenizer, SYMBOLS)


def as_attended(decoder, inputs, weights):
    """The states after the final norm; and what each layer's attention adds, by itself and with the weights."""
    columns = inputs.shape[0]
    positions, valid = jnp.arange(columns)[None], jnp.ones((1, columns), bool)
    options = {"positions": positions, "past": [], "implementation": "dense", "dropout": None, "columns": []}
    options["visible"] = [jnp.tril(jnp.ones((1, columns, columns), bool))]
    hidden, _ = decoder.trunk(inputs[None], positions=positions, valid=valid)
    x, added, mixed = inputs[None], [], []
    for layer, own in zip(decoder.layers, weights, strict=True):
        normed = layer.attention_norm(x)
        added.append(layer.attention(normed, **options)[0][0])
        values = jnp.repeat(layer.attention.value(normed).reshape(columns, 2, -1), 2, axis=1)
        heads = jnp.einsum("ntc,cnh->tnh", own, values)
        mixed.append(layer.attention.output(heads.reshape(1, columns, -1))[0])
        x, _ = layer(x, **options)
    return hidden[0], jnp.stack(added), jnp.stack(mixed)


@pytest.mark.slow
def test_weights_are_those_that_the_decoder_attends_with(asked):
    examples = small_graphs.generate(2, seed=3, config="e8")
    with quick_compilation():
        rows = rows_of(asked, examples, thoughts=2)
        row, decoder = rows[0], asked.model.decoder
        weights = attention_weights(decoder, row)
        products = inner_products(asked, examples, thoughts=2)
    hidden, added, mixed = quick_jit(as_attended)(decoder, jnp.asarray(row.inputs), jnp.asarray(weights))
    columns = len(row.inputs)
    assert weights.shape == (2, 4, columns, columns)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert (weights[..., ~np.tri(columns, dtype=bool)] == 0).all()
    # With these weights the values make what each layer adds.
    np.testing.assert_allclose(mixed, added, rtol=1e-3, atol=1e-4)
    # The state at each step is the next thought: the row is laid out as it was thought.
    np.testing.assert_allclose(hidden[row.steps[:-1]], row.inputs[row.steps[1:]], rtol=1e-3, atol=1e-4)
    table = np.asarray(decoder.tokens.embedding[...])
    for own, found in zip(rows, products, strict=True):
        ids = [asked.tokenizer.encode(symbol)[0] for symbol in own.graph.symbols]
        # The columns of each edge hold its nodes.
        for (parent, child), column in zip(own.graph.edges, own.edges, strict=True):
            np.testing.assert_array_equal(own.inputs[column : column + 2], table[[ids[parent], ids[child]]])
        np.testing.assert_allclose(found, own.inputs[own.steps[1:]] @ table[ids].T, rtol=1e-4)
