"""Where the nodes of a question's graph stand while a search goes out from its root."""

from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from coconut.errors import CoconutError
from coconut.tasks.graphs import distances, neighbor_k
from coconut.types import Graph

NodeGroup = Literal["unreachable", "reachable", "frontier", "optimal"]
NODE_GROUPS: tuple[NodeGroup, ...] = get_args(NodeGroup)
"""From the least to the most interesting; each node is counted in the last group that it belongs to."""


def group_nodes(graph: Graph, k: int) -> dict[int, NodeGroup]:
    """The group of every node after ``k`` steps of breadth-first search (Zhu et al. 2025, arXiv 2505.12514).

    Args:
      graph: the graph of one question.
      k: number of steps, which is the number of thoughts where one thought stands for one step.

    Returns:
      For each node id ``optimal`` (exactly ``k`` hops from the root, on a shortest path to the target), ``frontier``
      (exactly ``k`` hops from the root, on none), ``reachable`` (fewer hops) or ``unreachable`` (within ``k`` hops it
      is not reached). Past the target's depth no node is optimal.

    Raises:
      CoconutError: ``k`` is negative.
    """
    if k < 0:
        raise CoconutError(f"k = {k}: a search takes at least 0 steps")
    hops = distances(graph, graph.root)
    optimal_by_hop = neighbor_k(graph)
    optimal = optimal_by_hop[k] if k < len(optimal_by_hop) else ()

    def group(node: int) -> NodeGroup:
        if node not in hops or hops[node] > k:
            return "unreachable"
        if hops[node] < k:
            return "reachable"
        return "optimal" if node in optimal else "frontier"

    return {node: group(node) for node in range(len(graph.symbols))}


def group_means(graph: Graph, values: Float[np.ndarray, "K N"], *, first_hop: int = 1) -> dict[NodeGroup, np.ndarray]:
    """Averages a number per node over the groups of `group_nodes`, thought by thought.

    Args:
      graph: the graph of one question.
      values: row ``i`` belongs to ``first_hop + i`` steps of search; one column for each of the graph's ``N`` nodes.
      first_hop: steps of search of the first row. Thoughts start at 1; beliefs, which include no thoughts, at 0.

    Returns:
      For each group ``[K]`` means; NaN where a group is empty.

    Raises:
      CoconutError: the columns are not the graph's nodes.
    """
    if values.shape[1] != len(graph.symbols):
        raise CoconutError(f"{values.shape[1]} values a row do not fit a graph of {len(graph.symbols)} nodes")
    means: dict[NodeGroup, np.ndarray] = {group: np.full(len(values), np.nan) for group in NODE_GROUPS}
    for row, numbers in enumerate(values):
        groups = group_nodes(graph, first_hop + row)
        for group in NODE_GROUPS:
            members = [node for node, own in groups.items() if own == group]
            if members:
                means[group][row] = numbers[members].mean()
    return means
