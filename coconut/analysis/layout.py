"""Where to draw the nodes of a question's graph: layers by hops, few crossings, no overlaps.

The nodes below the root asked about stand in one block, all others beside it in a second one. In both, the layer is
the number of hops from the block's own root. Within a layer nodes are ordered by the barycentres of their neighbours
(Sugiyama et al. 1981), then moved as near to these as the distances between nodes allow.
"""

from collections.abc import Sequence

import numpy as np

from coconut.tasks.graphs import adjacency, distances, hops_from, persons
from coconut.types import Graph

_SWEEPS = 24
_GAP = 1.4
"""Distance between the two blocks, in distances between neighbours of one layer."""


def layers_of(graph: Graph) -> tuple[list[list[int]], list[list[int]]]:
    """The nodes by block and layer.

    Returns:
      The layers below the root asked about, and those of all other nodes, whose layer 0 is the other root (or all
      parentless nodes). A node that both roots reach is of the first block.
    """
    size = len(graph.symbols)
    own = distances(graph, graph.root)
    rest = [node for node in range(size) if node not in own]
    sources = [node for node in persons(graph) if node not in own]
    others = hops_from(adjacency(size, graph.edges), *sources)
    # Nodes on a cycle that nothing leads to have no layer of their own; no task here makes any.
    return _by_layer(own, list(own)), _by_layer({node: others.get(node, 0) for node in rest}, rest)


def layered_positions(graph: Graph) -> dict[int, tuple[float, float]]:
    """A place ``(x, y)`` for every node: ``y`` is minus its layer, neighbours of one layer are at least 1 apart."""
    blocks = layers_of(graph)
    neighbors = adjacency(len(graph.symbols), graph.edges, "both")
    for block in blocks:
        _untangle(block, graph.edges, neighbors)
    x: dict[int, float] = {}
    start = 0.0
    for block in blocks:
        placed = _spread(block, neighbors)
        if placed:
            shift = start - min(placed.values())
            x |= {node: value + shift for node, value in placed.items()}
            start = max(x.values()) + _GAP
    return {node: (x[node], -float(layer)) for block in blocks for layer, row in enumerate(block) for node in row}


def crossings(layers: Sequence[Sequence[int]], edges: Sequence[tuple[int, int]]) -> int:
    """Pairs of edges between two neighbouring layers that cross."""
    place = {node: (layer, index) for layer, row in enumerate(layers) for index, node in enumerate(row)}
    count = 0
    spans: dict[int, list[tuple[int, int]]] = {}
    for edge in edges:
        ends = sorted(place[node] for node in edge if node in place)
        if len(ends) == 2 and ends[1][0] == ends[0][0] + 1:
            spans.setdefault(ends[0][0], []).append((ends[0][1], ends[1][1]))
    for span in spans.values():
        for index, (top, bottom) in enumerate(span):
            count += sum((top - other_top) * (bottom - other_bottom) < 0 for other_top, other_bottom in span[:index])
    return count


def _by_layer(depth: dict[int, int], nodes: Sequence[int]) -> list[list[int]]:
    layers: list[list[int]] = [[] for _ in range(max((depth[node] for node in nodes), default=-1) + 1)]
    for node in nodes:
        layers[depth[node]].append(node)
    return layers


def _untangle(layers: list[list[int]], edges: Sequence[tuple[int, int]], neighbors: Sequence[Sequence[int]]) -> None:
    """Reorders every layer in place, downwards and upwards in turn, and keeps the order with the fewest crossings."""
    best, fewest = [list(row) for row in layers], crossings(layers, edges)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        indices = range(1, len(layers)) if down else range(len(layers) - 2, -1, -1)
        for index in indices:
            fixed = layers[index - 1 if down else index + 1]
            place = {node: (rank + 0.5) / len(fixed) for rank, node in enumerate(fixed)}

            def barycenter(
                node: int, place: dict[int, float] = place, row: Sequence[int] = tuple(layers[index])
            ) -> float:
                seen = [place[other] for other in neighbors[node] if other in place]
                return sum(seen) / len(seen) if seen else (row.index(node) + 0.5) / len(row)

            layers[index].sort(key=barycenter)
        count = crossings(layers, edges)
        if count < fewest:
            best, fewest = [list(row) for row in layers], count
    layers[:] = best


def _spread(layers: Sequence[Sequence[int]], neighbors: Sequence[Sequence[int]]) -> dict[int, float]:
    """Distances along a layer: each node as near to its neighbours' mean as an order with gaps of 1 allows."""
    x = {node: rank - (len(row) - 1) / 2 for row in layers for rank, node in enumerate(row)}
    if not x:
        return x
    for _ in range(_SWEEPS):
        middle = sum(x.values()) / len(x)
        for row in layers:
            wanted = []
            for node in row:
                seen = [x[other] for other in neighbors[node] if other in x]
                # A node without neighbours in its block would otherwise stay behind while the block moves.
                wanted.append(sum(seen) / len(seen) if seen else middle)
            x |= zip(row, _keep_apart(wanted), strict=True)
    return x


def _keep_apart(wanted: Sequence[float]) -> list[float]:
    """The rising numbers at least 1 apart that are nearest to ``wanted`` by squares: pool adjacent violators."""
    pools: list[list[float]] = []  # [mean of wanted minus rank, number of nodes]
    for rank, value in enumerate(wanted):
        pools.append([value - rank, 1])
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            mean, size = pools.pop()
            before = pools[-1]
            before[0] = (before[0] * before[1] + mean * size) / (before[1] + size)
            before[1] += size
    flat = np.repeat([mean for mean, _ in pools], [int(size) for _, size in pools])
    return [float(value) + rank for rank, value in enumerate(flat)]
