"""Walks on graphs, by hand, by brute force, and against the released optimal-path sets."""

import itertools
import json
import random

import pytest

from coconut.errors import CoconutError
from coconut.tasks import graphs
from coconut.tasks.records import load_examples
from coconut.types import Graph

#   0 -> 1 -> 3 -> 5      7 -> 4
#   0 -> 2 -> 3    6 -> 2
DIAMOND = Graph(
    symbols=tuple("abcdefgh"),
    edges=((0, 1), (0, 2), (1, 3), (2, 3), (3, 5), (6, 2), (7, 4)),
    root=0,
    target=5,
    negative=4,
)


def test_distances_follow_or_ignore_directions():
    assert graphs.distances(DIAMOND, 0) == {0: 0, 1: 1, 2: 1, 3: 2, 5: 3}
    assert graphs.distances(DIAMOND, 5, "up") == {5: 0, 3: 1, 1: 2, 2: 2, 0: 3, 6: 3}
    assert graphs.distances(DIAMOND, 1, "both") == {1: 0, 0: 1, 3: 1, 2: 2, 5: 2, 6: 3}


def test_sets_of_nodes():
    assert graphs.reachable(DIAMOND, 6) == {6, 2, 3, 5}
    assert graphs.ancestors(DIAMOND, 3) == {0, 1, 2, 6}
    assert graphs.persons(DIAMOND) == (0, 6, 7)
    assert graphs.leaves(DIAMOND) == (4, 5)


def test_walks_end_where_a_longer_way_leads_too():
    # 0 -> 1 -> 3, 0 -> 3: node 3 ends walks of one edge and of two.
    graph = Graph(symbols=tuple("abcd"), edges=((0, 1), (1, 3), (0, 3), (3, 2)), root=0, target=2, negative=1)
    assert [set(graphs.walk_ends(graph, hops)) for hops in range(5)] == [{0}, {1, 3}, {2, 3}, {2}, set()]
    with pytest.raises(CoconutError, match="hops = -1"):
        graphs.walk_ends(graph, -1)


def test_heights_by_the_shortest_and_the_longest_way_to_a_leaf():
    # 0 -> 1 -> 3, 0 -> 3, 1 -> 2 -> 4 -> 5; leaves 3 and 5.
    edges = ((0, 1), (1, 3), (0, 3), (1, 2), (2, 4), (4, 5))
    graph = Graph(symbols=tuple("abcdef"), edges=edges, root=0, target=5, negative=3)
    assert graphs.heights(graph) == {3: 0, 5: 0, 0: 1, 1: 1, 4: 1, 2: 2}
    assert graphs.heights(graph, "longest") == {3: 0, 5: 0, 4: 1, 2: 2, 1: 3, 0: 4}
    circle = Graph(symbols=tuple("abc"), edges=((0, 1), (1, 0), (1, 2)), root=0, target=2, negative=2)
    assert graphs.heights(circle) == {2: 0, 1: 1, 0: 2}
    with pytest.raises(CoconutError, match="the graph has a cycle"):
        graphs.heights(circle, "longest")


def test_all_shortest_paths_and_the_nodes_on_them():
    assert sorted(graphs.shortest_paths(DIAMOND, 0, 5)) == [(0, 1, 3, 5), (0, 2, 3, 5)]
    assert graphs.shortest_paths(DIAMOND, 0, 4) == []
    assert graphs.shortest_paths(DIAMOND, 0, 0) == [(0,)]
    assert graphs.neighbor_k(DIAMOND) == ((0,), (1, 2), (3,), (5,))


@pytest.mark.parametrize("seed", range(20))
def test_distances_agree_with_brute_force(seed):
    rng = random.Random(seed)
    edges = tuple({(rng.randrange(6), rng.randrange(6)) for _ in range(9)})
    graph = Graph(symbols=tuple("abcdef"), edges=edges, root=0, target=5, negative=4)
    walks = [
        (0, *middle, 5)
        for length in range(5)
        for middle in itertools.permutations(range(1, 5), length)
        if all(edge in edges for edge in itertools.pairwise((0, *middle, 5)))
    ]
    shortest = min(map(len, walks), default=0)
    expected = [walk for walk in walks if len(walk) == shortest]
    assert sorted(graphs.shortest_paths(graph, 0, 5)) == sorted(expected)
    assert graphs.count_shortest_paths(graph, 0, 5) == len(expected)
    assert graphs.neighbor_k(graph) == tuple(tuple(sorted(set(nodes))) for nodes in zip(*expected, strict=True))
    assert graphs.distances(graph, 0).get(5, 0) == max(shortest - 1, 0)


def test_shortest_paths_are_counted_without_making_them():
    # Two nodes a layer, each below both of the layer above: their number doubles with each layer.
    def layered(layers: int) -> Graph:
        above, edges = [0], []
        for layer in range(layers):
            own = [2 * layer + 1, 2 * layer + 2]
            edges += [(parent, child) for parent in above for child in own]
            above = own
        last = 2 * layers + 1
        edges += [(parent, last) for parent in above]
        symbols = tuple(str(node) for node in range(last + 2))
        return Graph(symbols=symbols, edges=tuple(edges), root=0, target=last, negative=last + 1)

    few, many = layered(5), layered(1000)
    assert graphs.count_shortest_paths(few, 0, few.target) == len(graphs.shortest_paths(few, 0, few.target)) == 2**5
    assert graphs.count_shortest_paths(many, 0, many.target) == graphs.MOST_PATHS
    assert graphs.count_shortest_paths(DIAMOND, 0, 5) == 2 and graphs.count_shortest_paths(DIAMOND, 0, 4) == 0


def test_neighbor_k_agrees_with_the_released_sets(shared_data):
    path = shared_data / "prosqa_graph_valid.json"
    released = [record["neighbor_k"] for record in json.loads(path.read_text())]
    for example, neighbor_k in zip(load_examples(path), released, strict=True):
        assert example.graph is not None
        ours = graphs.neighbor_k(example.graph)
        assert {str(hop): list(nodes) for hop, nodes in enumerate(ours)} == {
            k: sorted(v) for k, v in neighbor_k.items()
        }
