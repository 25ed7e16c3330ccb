"""Attention to edges and sentences, of weights made by hand."""

import numpy as np
import pytest

from coconut.analysis.attention import (
    attention_to_question,
    edges_of_tokens,
    sentences_of_tokens,
    sum_by_group,
)
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


def test_sentences_end_with_their_mark():
    text = "Tom has $3.50. Does he pay 2? Yes.\n"
    tokenizer = word_tokenizer([text])
    ids = np.asarray(tokenizer.encode(text))
    groups = sentences_of_tokens(tokenizer, ids)
    sentences = [tokenizer.decode(ids[groups == sentence]) for sentence in range(groups.max() + 1)]
    assert sentences == ["Tom has $3.50.", " Does he pay 2?", " Yes.\n"]
