"""Layers, order and distances of a drawn graph."""

import itertools

import pytest

from coconut.analysis.layout import crossings, layered_positions, layers_of
from coconut.tasks import prosqa, small_graphs
from coconut.tasks.graphs import distances, reachable
from coconut.types import Graph

# In the order of its ids, edge 3 -> 4 crosses edge 2 -> 5.
CROSSED = Graph(
    symbols=tuple("01234567"),
    edges=((0, 1), (0, 2), (0, 3), (1, 4), (2, 5), (3, 4), (6, 7), (6, 4)),
    root=0,
    target=5,
    negative=7,
)


def test_blocks_and_layers_follow_the_hops():
    assert layers_of(CROSSED) == ([[0], [1, 2, 3], [4, 5]], [[6], [7]])


def test_order_avoids_crossings():
    layers, _ = layers_of(CROSSED)
    assert crossings(layers, CROSSED.edges) == 1
    places = layered_positions(CROSSED)
    drawn = [sorted(layer, key=lambda node: places[node][0]) for layer in layers]
    assert crossings(drawn, CROSSED.edges) == 0
    assert {node: -y for node, (_, y) in places.items()} == {0: 0, 1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 6: 0, 7: 1}
    # A parent stands over the middle of its children.
    assert places[0][0] == pytest.approx(sum(places[node][0] for node in (1, 2, 3)) / 3)


GRAPHS = [
    *small_graphs.generate(20, seed=0, config="e12_matched"),
    *prosqa.generate(5, seed=0),
]


@pytest.mark.parametrize("example", GRAPHS, ids=range(len(GRAPHS)))
def test_no_overlap_and_two_blocks(example):
    graph = example.graph
    places = layered_positions(graph)
    assert sorted(places) == list(range(len(graph.symbols)))
    for (x, y), (other_x, other_y) in itertools.combinations(places.values(), 2):
        assert y != other_y or abs(x - other_x) > 1 - 1e-9
    below = reachable(graph, graph.root)
    assert min(x for x, _ in places.values()) == 0
    assert max(places[node][0] for node in below) < min(x for node, (x, _) in places.items() if node not in below)
    for layers in layers_of(graph):
        drawn = [sorted(layer, key=lambda node: places[node][0]) for layer in layers]
        assert crossings(drawn, graph.edges) <= crossings(layers, graph.edges)
    assert all(places[node][1] == -hops for node, hops in distances(graph, graph.root).items())


def test_one_block_alone():
    graph = Graph(symbols=("a", "b"), edges=((1, 0),), root=1, target=0, negative=0)
    assert layered_positions(graph) == {1: (0.0, -0.0), 0: (0.0, -1.0)}
