"""Walks on the graph behind a question, shared by generators, shortcut rules and plots.

A walk is breadth-first over an adjacency list; `adjacency` builds it for edges followed downwards (parent to child),
upwards, or both ways. Distances are in edges ("hops"), and nodes that cannot be reached are simply absent.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

from coconut.errors import CoconutError
from coconut.types import Graph

Direction = Literal["down", "up", "both"]
Height = Literal["shortest", "longest"]


def adjacency(num_nodes: int, edges: Iterable[tuple[int, int]], direction: Direction = "down") -> list[list[int]]:
    """Lists, for every node id, the nodes one edge away.

    Args:
      num_nodes: nodes have the ids ``0 .. num_nodes - 1``.
      edges: ``(parent, child)`` pairs.
      direction: ``down`` follows edges to children, ``up`` to parents, ``both`` ignores their direction.
    """
    neighbors: list[list[int]] = [[] for _ in range(num_nodes)]
    for parent, child in edges:
        if direction != "up":
            neighbors[parent].append(child)
        if direction != "down":
            neighbors[child].append(parent)
    return neighbors


def hops_from(neighbors: Sequence[Sequence[int]], *sources: int) -> dict[int, int]:
    """Least number of hops from any of ``sources``, over the nodes that can be reached, in the order of reaching."""
    hops = dict.fromkeys(sources, 0)
    queue = list(sources)
    for node in queue:  # the list grows while it is read: a queue that keeps its past
        for neighbor in neighbors[node]:
            if neighbor not in hops:
                hops[neighbor] = hops[node] + 1
                queue.append(neighbor)
    return hops


def distances(graph: Graph, source: int, direction: Direction = "down") -> dict[int, int]:
    """Hops from ``source`` to every node it reaches (itself at 0); unreachable nodes are absent."""
    return hops_from(adjacency(len(graph.symbols), graph.edges, direction), source)


def walk_ends(graph: Graph, hops: int) -> frozenset[int]:
    """The nodes where a walk of exactly ``hops`` edges from the root can end; a shorter way there may exist, too.

    Raises:
      CoconutError: ``hops`` is negative.
    """
    if hops < 0:
        raise CoconutError(f"hops = {hops}: a walk takes at least 0 of them")
    children = adjacency(len(graph.symbols), graph.edges)
    ends = {graph.root}
    for _ in range(hops):
        ends = {child for node in ends for child in children[node]}
    return frozenset(ends)


def heights(graph: Graph, kind: Height = "shortest") -> dict[int, int]:
    """Hops from every node down to a leaf below it (Hao et al. 2024, section 5): leaves have height 0.

    Args:
      graph: the graph; without cycles for ``longest``.
      kind: whether the ``shortest`` way to a leaf counts or the ``longest``. The paper's text says the one, the caption
        of its figure the other.

    Returns:
      By node id; a node with no leaf below it (on a cycle) has none.

    Raises:
      CoconutError: an unknown ``kind``, or a cycle where the longest way is asked for.
    """
    parents = adjacency(len(graph.symbols), graph.edges, "up")
    if kind == "shortest":
        return hops_from(parents, *leaves(graph))
    if kind != "longest":
        raise CoconutError(f"kind = {kind!r}: a height is the shortest or the longest way to a leaf")
    found: dict[int, int] = {}
    # Wave by wave: a node is still moved up while a longer way to it is found.
    wave, height = set(leaves(graph)), 0
    while wave:
        if height == len(graph.symbols):
            raise CoconutError("kind = 'longest': the graph has a cycle, so that there is no longest way to a leaf")
        found |= dict.fromkeys(wave, height)
        wave, height = {parent for node in wave for parent in parents[node]}, height + 1
    return found


def reachable(graph: Graph, source: int) -> frozenset[int]:
    """The nodes a directed walk from ``source`` can reach, ``source`` included."""
    return frozenset(distances(graph, source))


def ancestors(graph: Graph, node: int) -> frozenset[int]:
    """The nodes from which ``node`` can be reached, ``node`` itself excluded."""
    return frozenset(distances(graph, node, "up")) - {node}


def persons(graph: Graph) -> tuple[int, ...]:
    """The nodes no edge points to; in ProsQA exactly these carry a person's name."""
    children = {child for _, child in graph.edges}
    return tuple(node for node in range(len(graph.symbols)) if node not in children)


def leaves(graph: Graph) -> tuple[int, ...]:
    """The nodes without children."""
    parents = {parent for parent, _ in graph.edges}
    return tuple(node for node in range(len(graph.symbols)) if node not in parents)


def shortest_paths(graph: Graph, source: int, target: int) -> list[tuple[int, ...]]:
    """Every shortest directed path, each from ``source`` to ``target`` inclusive; empty where there is none."""
    hops = distances(graph, source)
    if target not in hops:
        return []
    parents = adjacency(len(graph.symbols), graph.edges, "up")
    paths: list[tuple[int, ...]] = [(target,)]
    for hop in reversed(range(hops[target])):
        paths = [(parent, *path) for path in paths for parent in parents[path[0]] if hops.get(parent) == hop]
    return paths


MOST_PATHS = 10**18
"""A number of paths is counted up to here."""


def count_shortest_paths(graph: Graph, source: int, target: int) -> int:
    """How many `shortest_paths` there are, at most `MOST_PATHS`, without making them: they may double with each hop."""
    hops = distances(graph, source)
    if target not in hops:
        return 0
    parents = adjacency(len(graph.symbols), graph.edges, "up")
    ways = {source: 1}
    for node in sorted(hops, key=hops.__getitem__)[1:]:
        ways[node] = min(MOST_PATHS, sum(ways[up] for up in parents[node] if hops.get(up) == hops[node] - 1))
    return ways[target]


def neighbor_k(graph: Graph) -> tuple[tuple[int, ...], ...]:
    """The optimal nodes at every hop (Reasoning by Superposition, arXiv 2505.12514).

    Entry ``k`` holds, in rising order, the nodes at hop ``k`` that lie on some shortest path from the root to the
    target; the first entry is the root alone, the last the target alone. Empty where the target cannot be reached.
    """
    down = distances(graph, graph.root)
    if graph.target not in down:
        return ()
    up = distances(graph, graph.target, "up")
    length = down[graph.target]
    return tuple(
        tuple(sorted(node for node, hops in down.items() if hops == hop and up.get(node) == length - hop))
        for hop in range(length + 1)
    )
