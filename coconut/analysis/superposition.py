"""Whether thoughts hold the frontier of a search, for graph questions in the symbol form.

Three measures of Zhu et al. (2025, "Reasoning by Superposition", arXiv 2505.12514, section 5):

1. In the first layer the bar behind an edge attends to the edge's two nodes, and so copies them.
2. In a later layer the ``k``-th thought attends to the edges that leave the nodes which ``k`` steps of breadth-first
   search have just reached.
3. The ``k``-th thought is nearest to the embeddings of these nodes.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from coconut.analysis.attention import attention_to_question, edges_of_tokens, sum_by_group
from coconut.analysis.levels import LevelMeans, means_by_level
from coconut.analysis.paths import NODE_GROUPS, NodeGroup, group_nodes
from coconut.analysis.probes import node_token_ids, thought_neighbors
from coconut.analysis.search_tree import graph_of
from coconut.analysis.traces import Rows, lay_out, trace
from coconut.errors import CoconutError
from coconut.evaluation.answers import AnswerConfig, thoughts_of_questions
from coconut.evaluation.reading import given_pages, pages_for_inputs
from coconut.evaluation.subject import Subject
from coconut.tasks.graphs import neighbor_k
from coconut.types import Example, Graph

# --- 1. Copying ---------------------------------------------------------------------------------------------------


def attention_weights(
    subject: Subject, example: Example, *, thoughts: int | None = None
) -> tuple[Float[np.ndarray, "L N T T"], Int[np.ndarray, " E"]]:
    """All attention weights of one question with its thoughts, and the first column of each of its edges.

    Args:
      subject: who is asked.
      example: a graph question in symbols.
      thoughts: how many; None for the trained number.

    Raises:
      CoconutError: the question is not its graph in symbols, or nothing is fed back.
    """
    tokenized = subject.tokenize(example)
    config = AnswerConfig(batch_size=1, thoughts=thoughts)
    rows = _rows(subject, [example], thoughts_of_questions(*subject.asked, [tokenized], config))
    (found,) = trace(subject.model.decoder, rows, columns=rows.all_columns, batch_size=1)
    assert found.weights is not None
    groups = edges_of_tokens(subject.tokenizer, tokenized.question, graph_of(example))
    return found.weights[:, 0], np.asarray([np.argmax(groups == edge) for edge in range(groups.max() + 1)])


def _rows(subject: Subject, examples: Sequence[Example], thoughts: Sequence[np.ndarray]) -> Rows:
    """The questions with their thoughts, up to where they are answered."""
    pages = given_pages(subject.method, subject.placing, [subject.tokenize(example) for example in examples])
    return lay_out(pages_for_inputs(pages, thoughts), subject.tokenizer, thoughts)


def first_columns(weights: Float[np.ndarray, "L N T T"], number: int = 16) -> Float[np.ndarray, "_ _"]:
    """The first layer's attention among the first columns, summed over heads (the paper's map of 16 columns).

    Raises:
      CoconutError: ``number`` is below 1.
    """
    if number < 1:
        raise CoconutError(f"number = {number}: must be at least 1 column")
    return weights[0].sum(0)[:number, :number]


def copied(weights: Float[np.ndarray, "L N T T"], edges: Int[np.ndarray, " E"]) -> Float[np.ndarray, "E 2"]:
    """The first layer's attention of each edge's bar to the edge's source and to its target, summed over heads.

    A bar that did nothing but copy the two would have as much for both together as there are heads.
    """
    first = weights[0].sum(0)
    return np.stack([first[edges + 2, edges], first[edges + 2, edges + 1]], 1)


# --- 2. Attention to edges ----------------------------------------------------------------------------------------


def group_edges(graph: Graph, k: int) -> list[NodeGroup]:
    """The group of each edge after ``k`` steps of search: that of its source (`group_nodes`).

    But an edge is ``optimal`` only where it lies on a shortest path to the target itself: another edge of an optimal
    source is ``frontier``.
    """
    groups, optimal = group_nodes(graph, k), neighbor_k(graph)
    following = optimal[k + 1] if k + 1 < len(optimal) else ()
    return [
        "frontier" if groups[source] == "optimal" and child not in following else groups[source]
        for source, child in graph.edges
    ]


def edge_attention(
    subject: Subject,
    examples: Sequence[Example],
    thoughts: Sequence[Float[np.ndarray, "K D"]],
    *,
    layer: int = 1,
    batch_size: int = 16,
) -> list[Float[np.ndarray, "S E"]]:
    """The attention of each step to each edge of a question, summed over heads and over the edge's three tokens.

    Step 0 is the column that the first thought is made at, step ``k`` that of the ``k``-th thought.

    Args:
      subject: who is asked.
      examples: graph questions in symbols, of one block of thoughts.
      thoughts: of each question, as many for all of them.
      layer: counted from 0; the paper's second one is 1.
      batch_size: rows run together.

    Raises:
      CoconutError: there is no such layer, questions differ in their number of thoughts or have none, or one is not its
        graph in symbols.
    """
    layers = subject.model.decoder.config.num_layers
    if not 0 <= layer < layers:
        raise CoconutError(f"layer = {layer}: the decoder has layers 0 .. {layers - 1}")
    if len(counts := {len(own) for own in thoughts}) != 1 or not min(counts):
        raise CoconutError(f"thoughts: {sorted(counts)} of a question; all need the same number, at least 1")
    rows, found = _rows(subject, examples, thoughts), []
    columns = np.concatenate([rows.thoughts[:, :1] - 1, rows.thoughts], 1)
    for traced in trace(subject.model.decoder, rows, columns=columns, batch_size=min(batch_size, len(rows))):
        here = slice(len(found), len(found) + len(traced.columns))
        for weights, example in zip(attention_to_question(rows.take(here), traced), examples[here], strict=True):
            groups = edges_of_tokens(subject.tokenizer, subject.tokenize(example).question, graph_of(example))
            found.append(sum_by_group(weights[layer].sum(0), groups))
    return found


def edge_attention_by_group(
    attention: Sequence[Float[np.ndarray, "S E"]],
    graphs: Sequence[Graph],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[NodeGroup, LevelMeans]:
    """Mean attention to an edge by group (`group_edges`), at each step; step ``k`` has thought ``k`` thoughts.

    Args:
      attention: of each question (`edge_attention`).
      graphs: of the questions.
      resamples: of the bootstrap over questions (`means_by_level`).
      seed: of its draws.

    Raises:
      CoconutError: there are not as many graphs, or the columns are not a graph's edges.
    """
    if len(attention) != len(graphs):
        raise CoconutError(f"attention of {len(attention)} questions does not fit {len(graphs)} graphs")
    rows: dict[NodeGroup, list[tuple[int, int, float]]] = {group: [] for group in NODE_GROUPS}
    for question, (own, graph) in enumerate(zip(attention, graphs, strict=True)):
        if own.shape[1] != len(graph.edges):
            raise CoconutError(f"question {question}: attention to {own.shape[1]} edges, of {len(graph.edges)}")
        for step, numbers in enumerate(own):
            for group, number in zip(group_edges(graph, step), numbers, strict=True):
                rows[group].append((step, question, float(number)))
    return {group: means_by_level(own, len(graphs), resamples=resamples, seed=seed) for group, own in rows.items()}


# --- 3. Inner products ----------------------------------------------------------------------------------------------


class Histograms(NamedTuple):
    """Histograms of inner products, with the same bins for all groups and thoughts.

    Attributes:
      edges: of the bins.
      counts: by group, for each thought, how many nodes fall into each bin.
    """

    edges: Float[np.ndarray, " _"]
    counts: Mapping[NodeGroup, Int[np.ndarray, "K _"]]


def inner_products(
    subject: Subject, examples: Sequence[Example], *, thoughts: int | None = None
) -> list[Float[np.ndarray, "K N"]]:
    """The inner product of each thought with the embedding of each node of its graph (`probes.thought_neighbors`).

    Raises:
      CoconutError: a question has no graph, a node is not one token, or nothing is fed back.
    """
    tokenized = [subject.tokenize(example) for example in examples]
    made = thoughts_of_questions(*subject.asked, tokenized, AnswerConfig(thoughts=thoughts))
    return [
        thought_neighbors(subject.model, own, node_token_ids(subject.tokenizer, graph_of(example)))
        for own, example in zip(made, examples, strict=True)
    ]


def histograms_by_group(
    products: Sequence[Float[np.ndarray, "K N"]], graphs: Sequence[Graph], *, bins: int = 30
) -> Histograms:
    """Counts inner products by the group of the node after as many steps of search as there were thoughts.

    Args:
      products: of each question (`inner_products`), all with the same number of thoughts; row ``k - 1`` is that of the
        ``k``-th thought.
      graphs: of the questions.
      bins: how many, from the least product of all to the greatest.

    Raises:
      CoconutError: there are no questions, no bins, other numbers of thoughts, or columns that are not a graph's nodes.
    """
    if not products or len(products) != len(graphs):
        raise CoconutError(f"products of {len(products)} questions do not fit {len(graphs)} graphs")
    if bins < 1:
        raise CoconutError(f"bins = {bins}: must be at least 1")
    count = len(products[0])
    for question, (own, graph) in enumerate(zip(products, graphs, strict=True)):
        if own.shape != (count, len(graph.symbols)):
            raise CoconutError(
                f"question {question}: products of shape {own.shape}, where the first one has {count} thoughts and the "
                f"graph {len(graph.symbols)} nodes"
            )
    limits = (min(own.min() for own in products), max(own.max() for own in products))
    edges = np.histogram_bin_edges(np.zeros(0), bins, limits)
    counts: dict[NodeGroup, np.ndarray] = {group: np.zeros((count, bins), int) for group in NODE_GROUPS}
    for own, graph in zip(products, graphs, strict=True):
        for thought, numbers in enumerate(own):
            groups = group_nodes(graph, thought + 1)
            for group in NODE_GROUPS:
                members = [node for node, belongs in groups.items() if belongs == group]
                counts[group][thought] += np.histogram(numbers[members], edges)[0]
    return Histograms(edges, counts)
