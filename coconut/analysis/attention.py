"""What thoughts look at: attention to the question's tokens, and to its edges or sentences."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from coconut.analysis.intervals import Means, means_of_questions
from coconut.analysis.paths import NODE_GROUPS, NodeGroup, group_nodes
from coconut.analysis.traces import Rows, Trace
from coconut.errors import CoconutError
from coconut.tasks.graph_form import question_graph
from coconut.tokenizers import Tokenizer
from coconut.types import Graph

End = Literal["source", "target"]


def attention_to_question(rows: Rows, trace: Trace) -> list[Float[np.ndarray, "L N W P"]]:
    """The weights of each row's columns to its question's tokens, by layer and head.

    Args:
      rows: those that were traced.
      trace: with weights.

    Returns:
      For each row the weights of the columns that it has, over the ``P`` tokens of its own question. They sum to at
      most 1: the rest goes to markers, thoughts and text.

    Raises:
      CoconutError: the trace has no weights, or other rows.
    """
    if trace.weights is None:
        raise CoconutError("attention_to_question: the trace was made without weights")
    if len(rows) != len(trace.columns):
        raise CoconutError(f"attention_to_question: a trace of {len(trace.columns)} rows beside {len(rows)} rows")
    return [trace.weights[:, row][:, :, trace.columns[row] >= 0][..., rows.question[row]] for row in range(len(rows))]


def sum_by_group(weights: Float[np.ndarray, "*A P"], groups: Int[np.ndarray, " P"]) -> Float[np.ndarray, "*A G"]:
    """Sums weights over the tokens of each group.

    Args:
      weights: over tokens.
      groups: the group of each token, from 0; -1 for one of no group.
    """
    members = groups[:, None] == np.arange(groups.max(initial=-1) + 1)
    return weights @ members.astype(weights.dtype)


def edges_of_tokens(tokenizer: Tokenizer, question: Int[np.ndarray, " P"], graph: Graph) -> Int[np.ndarray, " P"]:
    """Which edge of the graph each token of a question in symbols belongs to: three of them, ``parent child |``.

    Returns:
      The index of the edge in ``graph.edges``; -1 for the tokens around the edges.

    Raises:
      CoconutError: the question is not that graph in symbols.
    """
    found = question_graph(np.asarray(question, np.int32))
    if found is None:
        raise CoconutError(f"the question {tokenizer.decode(question)!r:.80} is no graph in symbols")
    index = {
        tuple(tokenizer.encode(graph.symbols[parent]) + tokenizer.encode(graph.symbols[child])): edge
        for edge, (parent, child) in enumerate(graph.edges)
    }
    if not set(found[0]) <= index.keys():
        raise CoconutError(f"the question {tokenizer.decode(question)!r:.80} has edges that its graph lacks")
    groups = np.full(len(question), -1)
    groups[1:-5] = np.repeat([index[edge] for edge in found[0]], 3)
    return groups


def sentences_of_tokens(tokenizer: Tokenizer, question: Int[np.ndarray, " P"]) -> Int[np.ndarray, " P"]:
    """Which sentence of a text each token belongs to, from 0.

    A sentence ends with a token that ends in a full stop, a question mark or an exclamation mark, where white space or
    nothing follows: that of ``3.50`` ends none. White space behind it opens the next one, and alone at the end of the
    text belongs to the last.
    """
    texts = [tokenizer.decode([token]) for token in question]
    groups, sentence = np.zeros(len(texts), int), 0
    for index, text in enumerate(texts):
        groups[index] = sentence
        rest = "".join(texts[index + 1 :])
        sentence += text.endswith((".", "?", "!")) and bool(rest.strip()) and rest[0].isspace()
    return groups


def attention_by_edge_group(
    weights: Float[np.ndarray, "L N K E"], graph: Graph, *, end: End = "source", first_hop: int = 1
) -> dict[NodeGroup, Float[np.ndarray, "L N K"]]:
    """Attention to an edge, averaged over the edges of each group of `group_nodes` (Zhu et al. 2025, section 5).

    A search that has reached the nodes ``k`` hops away goes on along the edges that leave them. So the ``k``-th thought
    is expected to look at edges whose *source* is ``frontier`` or ``optimal`` after ``k`` steps.

    Args:
      weights: of each thought to each edge of the graph, summed over the edge's tokens (`sum_by_group` with
        `edges_of_tokens`).
      graph: the graph of the question.
      end: which end of an edge says its group.
      first_hop: steps of search that the first thought stands for.

    Returns:
      For each group the mean over its edges, by layer, head and thought; NaN where it has no edge.

    Raises:
      CoconutError: the weights are not one for each edge, or ``end`` is no end.
    """
    if end not in get_args(End):
        raise CoconutError(f"end = {end!r}: must be one of {', '.join(get_args(End))}")
    if weights.shape[-1] != len(graph.edges):
        raise CoconutError(f"weights to {weights.shape[-1]} edges: the graph has {len(graph.edges)}")
    ends = [edge[get_args(End).index(end)] for edge in graph.edges]
    means: dict[NodeGroup, np.ndarray] = {group: np.full(weights.shape[:3], np.nan) for group in NODE_GROUPS}
    for thought in range(weights.shape[2]):
        groups = group_nodes(graph, first_hop + thought)
        for group in NODE_GROUPS:
            members = [edge for edge, node in enumerate(ends) if groups[node] == group]
            if members:
                means[group][:, :, thought] = weights[:, :, thought, members].mean(-1)
    return means


def mean_attention(
    by_question: Sequence[dict[NodeGroup, Float[np.ndarray, "L N _"]]], *, resamples: int = 1000, seed: int = 0
) -> dict[NodeGroup, Means]:
    """Means over questions of `attention_by_edge_group`, each ``[L, N, K]`` with its interval and its own number.

    Questions may have different numbers of thoughts; ``K`` is the largest. One without a thought, or without an edge in
    a group there, is not counted.

    Raises:
      CoconutError: there are no questions.
    """
    most = max((means[group].shape[2] for means in by_question for group in means), default=0)

    def stacked(group: NodeGroup) -> np.ndarray:
        found = np.full((len(by_question), *by_question[0][group].shape[:2], most), np.nan)
        for question, means in enumerate(by_question):
            found[question, :, :, : means[group].shape[2]] = means[group]
        return found

    if not by_question:
        raise CoconutError("mean_attention: there are no questions")
    return {group: means_of_questions(stacked(group), resamples=resamples, seed=seed) for group in NODE_GROUPS}
