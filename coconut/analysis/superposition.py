"""Whether thoughts hold the frontier of a search, for graph questions in the symbol form.

Three measures of Zhu et al. (2025, "Reasoning by Superposition", arXiv 2505.12514, section 5):

1. In the first layer the bar behind an edge attends to the edge's two nodes, and so copies them.
2. In a later layer the ``k``-th thought attends to the edges that leave the nodes which ``k`` steps of breadth-first
   search have just reached.
3. The ``k``-th thought is nearest to the embeddings of these nodes.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from coconut.analysis.levels import LevelMeans, means_by_level
from coconut.analysis.paths import NODE_GROUPS, NodeGroup, group_nodes
from coconut.analysis.probes import node_token_ids, thought_neighbors
from coconut.analysis.search_tree import graph_of
from coconut.errors import CoconutError
from coconut.evaluation.answers import AnswerConfig, thoughts_of_questions
from coconut.evaluation.reading import given_pages
from coconut.evaluation.subject import Subject
from coconut.models.attention import rotate
from coconut.models.decoder import Decoder
from coconut.pages import Text
from coconut.tasks.graph_form import question_graph
from coconut.tasks.graphs import neighbor_k
from coconut.types import Example, Graph

EDGE_TOKENS = 3
"""Parent, child and bar."""


# --- What is looked at ----------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A question with its thoughts, as the decoder reads it.

    Attributes:
      graph: the question's graph.
      inputs: of each column: a token's embedding, or a thought.
      edges: the first column of each of the graph's edges.
      steps: the column that the first thought is made at, then that of each thought. So step ``k`` has ``k`` thoughts.
    """

    graph: Graph
    inputs: Float[np.ndarray, "T D"]
    edges: Int[np.ndarray, " E"]
    steps: Int[np.ndarray, " S"]


def rows_of(subject: Subject, examples: Sequence[Example], *, thoughts: int | None = None) -> list[Row]:
    """Lets a model think about each question, and lays out what it has read then.

    Args:
      subject: who is asked.
      examples: graph questions in the symbol form.
      thoughts: how many; None for the trained number.

    Raises:
      CoconutError: a question has no graph, or is not its graph in symbols; it has not exactly one block of thoughts;
        or nothing is fed back in it.
    """
    graphs, tokenized = [graph_of(example) for example in examples], [subject.tokenize(example) for example in examples]
    made = thoughts_of_questions(*subject.asked, tokenized, AnswerConfig(thoughts=thoughts))
    pages = given_pages(subject.method, subject.placing, tokenized, thoughts)
    embed = lambda ids: np.asarray(subject.model.decoder.embed(jnp.asarray(ids, jnp.int32)))
    rows = []
    for graph, example, page, own in zip(graphs, tokenized, pages, made, strict=True):
        blocks = [index for index, part in enumerate(page) if not isinstance(part, Text)]
        if len(blocks) != 1:
            raise CoconutError(f"{len(blocks)} blocks of thoughts: the steps of a search need a question with one")
        before, behind = (
            [token for part in parts if isinstance(part, Text) for token in part.ids.tolist()]
            for parts in (page[: blocks[0]], page[blocks[0] :])
        )
        inputs = np.concatenate([embed(before), own, embed(behind)])
        steps = len(before) - 1 + np.arange(len(own) + 1)
        rows.append(Row(graph, inputs, _edge_columns(subject, graph, example.question), steps))
    return rows


def attention_weights(decoder: Decoder, row: Row) -> Float[np.ndarray, "L N T T"]:
    """The attention weights of each layer and head: of each column (third axis) to each column (last axis).

    Raises:
      CoconutError: the decoder scans its layers.
    """
    # The least that these pictures need: one row of a small decoder, without padding. Whoever traces whole batches
    # anyway can hand their weights to all that follows.
    if decoder.execution.scan_layers:
        raise CoconutError("ExecutionConfig.scan_layers = True: attention weights are taken layer by layer")
    return np.asarray(_attention_weights(decoder, jnp.asarray(row.inputs)[None])[:, 0])


@jax.jit
def _attention_weights(decoder: Decoder, inputs: Float[Array, "B T D"]) -> Float[Array, "L B N T T"]:
    config, columns = decoder.config, inputs.shape[1]
    positions, causal = jnp.arange(columns)[None], jnp.tril(jnp.ones((columns, columns), bool))
    x = inputs + decoder.positions(positions) if config.position_embedding == "learned" else inputs
    found = []
    for layer in decoder.layers:
        attention, normed = layer.attention, layer.attention_norm(x)
        query, key = (
            linear(normed).reshape(1, columns, -1, config.width_of_head) for linear in (attention.query, attention.key)
        )
        if config.query_key_norm:
            query, key = attention.query_norm(query), attention.key_norm(key)
        if config.position_embedding == "rotary":
            query, key = (rotate(y, positions, config.rotary_base, config.rotary_scaling) for y in (query, key))
        key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
        scores = jnp.einsum("btnh,bcnh->bntc", query, key) * config.width_of_head**-0.5
        found.append(jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1))
        x, _ = layer(
            x, positions=positions, past=[], visible=[causal[None]], implementation="dense", dropout=None, columns=[]
        )
    return jnp.stack(found)


def _edge_columns(subject: Subject, graph: Graph, question: Int[np.ndarray, " P"]) -> Int[np.ndarray, " E"]:
    """The column of each edge's parent, in the order of the graph's edges."""
    ids = node_token_ids(subject.tokenizer, graph)
    found = question_graph(question)
    wanted = [(ids[parent], ids[child]) for parent, child in graph.edges]
    if found is None or sorted(found[0]) != sorted(wanted):
        raise CoconutError(f"{subject.tokenizer.decode(question)!r:.80}: not the edges of its graph, in symbols")
    places = {edge: 1 + EDGE_TOKENS * place for place, edge in enumerate(found[0])}
    return np.asarray([places[edge] for edge in wanted], int)


# --- 1. Copying ---------------------------------------------------------------------------------------------------


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
    weights: Float[np.ndarray, "L N T T"],
    edges: Int[np.ndarray, " E"],
    steps: Int[np.ndarray, " S"],
    *,
    layer: int = 1,
) -> Float[np.ndarray, "S E"]:
    """The attention of each step to each edge, summed over heads and over the edge's three tokens.

    Args:
      weights: of one row.
      edges: the first column of each edge.
      steps: the columns that attend.
      layer: counted from 0; the paper's second one is 1.

    Raises:
      CoconutError: there is no such layer.
    """
    if not 0 <= layer < len(weights):
        raise CoconutError(f"layer = {layer}: the weights are those of layers 0 .. {len(weights) - 1}")
    tokens = edges[:, None] + np.arange(EDGE_TOKENS)
    return weights[layer].sum(0)[steps][:, tokens].sum(-1)


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
