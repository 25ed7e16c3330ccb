"""The symbol form of a graph question, after Reasoning by Superposition (Zhu et al. 2025, arXiv 2505.12514).

``<eos> a b | c d | ... | [Q] x y [R] root``: every edge is three tokens (parent, child, bar), the frame around them is
six (``<eos>``, ``[Q]``, the two candidates, ``[R]``, the root). The steps are one node a hop, from the root's child to
the target; the answer is the target, which the text format writes as ``[A] target``. Symbols are
separated by single blanks; a node's symbol is a decimal number.

Zhu et al. keep the node ids of the generator, where the roots are 0 and 1 and every edge goes from a smaller to a
larger id. That gives the topology away, so here ids are a uniformly random relabelling.
"""

import functools
import random
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from coconut.types import Example, Graph

START, EDGE_END, CANDIDATES, ROOT, ANSWER = "<eos>", "|", "[Q]", "[R]", "[A]"


@functools.cache
def graph_symbols(num_nodes: int) -> tuple[str, ...]:
    """The whole vocabulary of the symbol form: the five marks, then ``num_nodes`` node symbols."""
    return (START, EDGE_END, CANDIDATES, ROOT, ANSWER, *node_symbols(num_nodes))


@functools.cache
def node_symbols(num_nodes: int) -> tuple[str, ...]:
    """The node symbols ``"0" .. str(num_nodes - 1)``."""
    return tuple(map(str, range(num_nodes)))


def draw_symbols(rng: random.Random, num_nodes: int, num_symbols: int) -> tuple[str, ...]:
    """Names ``num_nodes`` nodes by a random subset of ``num_symbols`` symbols, in rising order.

    The order is no loss of randomness where node ids are permuted already, and with as many symbols as nodes it makes
    a node's symbol equal its id.
    """
    if num_symbols == num_nodes:
        return node_symbols(num_nodes)
    return tuple(map(str, sorted(rng.sample(range(num_symbols), num_nodes))))


def symbol_example(graph: Graph, path: Sequence[int], candidates: tuple[int, int]) -> Example:
    """Writes a question in the symbol form, with edges and candidates in the order given.

    Args:
      graph: the graph; ``graph.symbols`` must come from `node_symbols`.
      path: a shortest path from root to target, both included.
      candidates: target and negative, in the order in which they are to be shown.
    """
    name = graph.symbols
    edges = " ".join([f"{name[parent]} {name[child]} |" for parent, child in graph.edges])
    first, second = candidates
    return Example(
        question=f"{START} {edges} {CANDIDATES} {name[first]} {name[second]} {ROOT} {name[graph.root]}",
        steps=tuple([name[node] for node in path[1:]]),
        answer=name[graph.target],
        graph=graph,
    )


def has_graph_form(question: Int32[np.ndarray, "_"], edge_end: int) -> bool:
    """Whether the ids of a question, one a symbol, are those of the symbol form; ``edge_end`` is the bar's."""
    edges = question[1:-5]
    return len(question) >= 6 and len(edges) % 3 == 0 and bool((edges[2::3] == edge_end).all())


def question_graph(question: Int32[np.ndarray, "_"]) -> tuple[list[tuple[int, int]], int] | None:
    """The (parent, child) edges and the root of a question in ids, each node by its id; None where it is no graph."""
    if len(question) < 9 or not has_graph_form(question, int(question[3])):
        return None
    return [(int(parent), int(child)) for parent, child, _ in question[1:-5].reshape(-1, 3)], int(question[-1])


def reorder_graph(question: Int32[np.ndarray, "_"], rng: np.random.Generator) -> Int32[np.ndarray, "_"]:
    """The same question, one id a symbol, with its edges and its two candidates in another order."""
    reordered = question.copy()
    reordered[1:-5] = rng.permutation(question[1:-5].reshape(-1, 3)).ravel()
    reordered[-4:-2] = rng.permutation(question[-4:-2])
    return reordered
