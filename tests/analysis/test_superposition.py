"""Zhu et al.'s three measures on arrays written by hand, and on a random decoder of two layers."""

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
)
from coconut.errors import CoconutError
from coconut.evaluation.answers import AnswerConfig, thoughts_of_questions
from coconut.evaluation.subject import Subject
from coconut.latent.feedback import Identity
from coconut.model import Model
from coconut.models.config import DecoderConfig
from coconut.tasks import small_graphs
from coconut.tokenizers import SYMBOLS, symbol_tokenizer
from coconut.types import Graph
from tests.analysis.tiny_subject import asked_subject
from tests.tiny_models import quick_compilation, random_decoder

# 0 -> 1 -> 3, 0 -> 2, 1 -> 4, 5 -> 3; target 3.
EDGES = ((1, 3), (0, 1), (0, 2), (5, 3), (1, 4))
GRAPH = Graph(symbols=tuple("abcdef"), edges=EDGES, root=0, target=3, negative=5)


def test_edges_belong_to_the_group_of_their_source():
    assert group_edges(GRAPH, 0) == ["unreachable", "optimal", "frontier", "unreachable", "unreachable"]
    assert group_edges(GRAPH, 1) == ["optimal", "reachable", "reachable", "unreachable", "frontier"]
    # The target is reached, and nothing goes on from it.
    assert group_edges(GRAPH, 2) == ["reachable", "reachable", "reachable", "unreachable", "reachable"]


def test_what_a_bar_copies_is_summed_over_heads():
    # Two layers, two heads; columns: one before, two edges of three.
    weights = np.zeros((2, 2, 9, 9))
    weights[0, :, 6, 4], weights[0, 0, 6, 5], weights[0, 1, 3, 2], weights[1, :, 6, 4] = 0.5, 0.25, 0.75, 9.0
    # The graph's first edge stands behind its second.
    np.testing.assert_allclose(copied(weights, np.asarray([4, 1])), [[1.0, 0.25], [0, 0.75]])
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


@pytest.mark.slow
def test_attention_to_edges_is_summed_over_heads_and_their_tokens(asked: Subject) -> None:
    examples = small_graphs.generate(3, seed=3, config="e8")
    with quick_compilation():
        config = AnswerConfig(batch_size=3, thoughts=2)
        thoughts = thoughts_of_questions(*asked.asked, list(map(asked.tokenize, examples)), config)
        found = edge_attention(asked, examples, thoughts, batch_size=2)
        products = inner_products(asked, examples, thoughts=2)
        for example, own, attention, product in zip(examples, thoughts, found, products, strict=True):
            weights, edges = attention_weights(asked, example, thoughts=2)
            graph, question = example.graph, example.question.split()
            assert graph is not None
            np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
            assert (weights[..., ~np.tri(weights.shape[-1], dtype=bool)] == 0).all()
            for edge, (parent, child) in enumerate(graph.edges):
                column = edges[edge]
                assert question[column : column + 3] == [graph.symbols[parent], graph.symbols[child], "|"]
                # Behind the question stand the start marker, which is step 0, and the thoughts.
                steps = np.arange(len(question), len(question) + 1 + len(own))
                expected = weights[1][:, steps, column : column + 3].sum((0, 2))
                np.testing.assert_allclose(attention[:, edge], expected, rtol=1e-4, atol=1e-6)
            ids = [asked.tokenizer.encode(symbol)[0] for symbol in graph.symbols]
            table = np.asarray(asked.model.decoder.tokens.embedding[...])
            np.testing.assert_allclose(product, own @ table[ids].T, rtol=1e-4)
    with pytest.raises(CoconutError, match=r"layer = 2: the decoder has layers 0 \.\. 1"):
        edge_attention(asked, examples, thoughts, layer=2)
    with pytest.raises(CoconutError, match=r"thoughts: \[1, 2\] of a question"):
        edge_attention(asked, examples[:2], [thoughts[0][:1], thoughts[1][:2]])
