"""Attention to edges and sentences, of weights made by hand."""

import numpy as np
import pytest

from coconut.analysis.attention import (
    attention_by_edge_group,
    attention_to_question,
    edges_of_tokens,
    mean_attention,
    sentences_of_tokens,
    sum_by_group,
)
from coconut.analysis.paths import NODE_GROUPS, NodeGroup
from coconut.analysis.traces import Trace, lay_out
from coconut.errors import CoconutError
from coconut.pages import Text, Thoughts
from coconut.tokenizers import word_tokenizer
from coconut.types import Graph

# 0 -> 1 -> 3 (the target), 0 -> 2, and 4 -> 5 that the root does not reach.
GRAPH = Graph(symbols=tuple("012345"), edges=((1, 3), (0, 1), (4, 5), (0, 2), (2, 5)), root=0, target=3, negative=4)


def test_weights_are_cut_to_each_rows_own_question_and_thoughts(subject):
    pages = [
        (Text(np.asarray([1, 2, 3], np.int32)), Thoughts(2), Text(np.asarray([9], np.int32))),
        (Text(np.asarray([1], np.int32)), Text(np.asarray([4], np.int32)), Thoughts(1)),
    ]
    rows = lay_out(pages, subject.tokenizer, [np.zeros((2, 4)), np.zeros((1, 4))])
    assert rows.thoughts.tolist() == [[3, 4], [3, -1]]
    weights = np.random.default_rng(0).random((2, 2, 3, 2, rows.valid.shape[1]))
    trace = Trace(rows.thoughts, np.zeros((3, 2, 2, 4)), weights, np.zeros((2, 2, 4)))
    first, second = attention_to_question(rows, trace)
    np.testing.assert_array_equal(first, weights[:, 0, :, :, :3])
    # Its question ends one column before the marker that ends its prompt.
    np.testing.assert_array_equal(second, weights[:, 1, :, :1, 1:2])
    with pytest.raises(CoconutError, match="made without weights"):
        attention_to_question(rows, trace._replace(weights=None))
    with pytest.raises(CoconutError, match="a trace of 2 rows beside 1 rows"):
        attention_to_question(rows.take([0]), trace)


def test_a_group_gets_the_sum_of_its_tokens():
    weights = np.asarray([[[0.5, 0.25, 0.125, 1.0]]])
    assert sum_by_group(weights, np.asarray([1, -1, 1, 0])).tolist() == [[[1.0, 0.625]]]
    assert sum_by_group(weights, np.full(4, -1)).shape == (1, 1, 0)


def test_each_edge_has_three_tokens(subject):
    _, tokenizer, example, tokenized, graph = subject
    groups = edges_of_tokens(tokenizer, tokenized.question, graph)
    words = example.question.split()
    assert len(words) == len(groups)
    for edge, (parent, child) in enumerate(graph.edges):
        written = [words[index] for index in np.flatnonzero(groups == edge)]
        assert written == [graph.symbols[parent], graph.symbols[child], "|"]
    assert [word for word, group in zip(words, groups, strict=True) if group < 0][:2] == ["<eos>", "[Q]"]
    with pytest.raises(CoconutError, match="no graph in symbols"):
        edges_of_tokens(tokenizer, tokenized.question[1:], graph)
    with pytest.raises(CoconutError, match="edges that its graph lacks"):
        edges_of_tokens(tokenizer, tokenized.question, Graph(**(vars(graph) | {"edges": graph.edges[1:]})))


def test_attention_is_averaged_over_the_edges_of_a_group():
    # One layer, one head, two thoughts; the weight to each edge.
    weights = np.asarray([[[[0.4, 0.1, 0.2, 0.15, 0.05], [0.5, 0.1, 0.1, 0.1, 0.2]]]])
    means = attention_by_edge_group(weights, GRAPH)
    # After one step: node 1 is optimal, node 2 frontier, the root reachable, 3 to 5 not yet.
    assert means["optimal"][0, 0].tolist() == pytest.approx([0.4, np.nan], nan_ok=True)
    assert means["frontier"][0, 0].tolist() == pytest.approx([0.05, np.nan], nan_ok=True)
    # After two all sources but 4 lie behind.
    assert means["reachable"][0, 0].tolist() == pytest.approx([0.125, 0.225])
    assert means["unreachable"][0, 0].tolist() == pytest.approx([0.2, 0.1])
    by_target = attention_by_edge_group(weights, GRAPH, end="target")
    # Node 1 is optimal and node 2 frontier; then node 3 optimal, and 5, by 4 as by 2, frontier.
    assert by_target["optimal"][0, 0].tolist() == pytest.approx([0.1, 0.5])
    assert by_target["frontier"][0, 0].tolist() == pytest.approx([0.15, 0.15])
    earlier = attention_by_edge_group(weights, GRAPH, first_hop=0)
    assert earlier["optimal"][0, 0].tolist() == pytest.approx([0.125, 0.5])
    with pytest.raises(CoconutError, match="weights to 4 edges: the graph has 5"):
        attention_by_edge_group(weights[..., :4], GRAPH)


def test_a_question_without_a_group_is_not_counted():
    one: dict[NodeGroup, np.ndarray] = {group: np.full((1, 1, 2), np.nan) for group in NODE_GROUPS}
    other: dict[NodeGroup, np.ndarray] = {group: np.full((1, 1, 1), 0.5) for group in NODE_GROUPS}
    one["optimal"][0, 0] = [0.1, 0.3]
    means = mean_attention([one, other], resamples=10)
    assert means["optimal"].mean[0, 0].tolist() == pytest.approx([0.3, 0.3])
    assert means["optimal"].number[0, 0].tolist() == [2, 1]
    assert means["frontier"].mean[0, 0].tolist() == pytest.approx([0.5, np.nan], nan_ok=True)
    assert means["frontier"].number[0, 0].tolist() == [1, 0]
    with pytest.raises(CoconutError, match="there are no questions"):
        mean_attention([])


def test_sentences_end_with_their_mark():
    text = "Tom has $3.50. Does he pay 2? Yes.\n"
    tokenizer = word_tokenizer([text])
    ids = np.asarray(tokenizer.encode(text))
    groups = sentences_of_tokens(tokenizer, ids)
    sentences = [tokenizer.decode(ids[groups == sentence]) for sentence in range(groups.max() + 1)]
    assert sentences == ["Tom has $3.50.", " Does he pay 2?", " Yes.\n"]
