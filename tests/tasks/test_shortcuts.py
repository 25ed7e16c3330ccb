"""Shortcut rules and statistics: by hand, and against the figures of the released splits."""

import dataclasses

import pytest

from coconut.errors import CoconutError
from coconut.tasks.records import load_examples
from coconut.tasks.shortcuts import RULES, other_root, shortcut_accuracies, statistics
from coconut.types import Example, Graph

# 0 -> 2 -> 3 -> 4 (target)    1 -> 5 (negative)    6 -> 5    2 -> 7 <- 5
GRAPH = Graph(
    symbols=("Tom", "Sam", "impus", "lempus", "rompus", "numpus", "Eva", "jelpus"),
    edges=((0, 2), (2, 3), (3, 4), (1, 5), (6, 5), (2, 7), (5, 7)),
    root=0,
    target=4,
    negative=5,
)
EXAMPLE = Example(question="Is Tom a rompus or numpus?", steps=(), answer="Tom is a rompus.", graph=GRAPH)


def test_rules_by_hand():
    scores = {name: rule(GRAPH) for name, rule in RULES.items()}
    assert scores == {
        "farther from its nearest person": (3, 1),
        "nearer to the root, undirected": (-3, -3),
        "more ancestors": (3, 2),
        "smaller in-degree": (-1, -2),
        "larger node id": (4, 5),
    }
    accuracies = {name: accuracy.value for name, accuracy in shortcut_accuracies([EXAMPLE]).items()}
    assert list(accuracies.values()) == [1, 0.5, 1, 1, 0]


def test_statistics_by_hand():
    measured = statistics([EXAMPLE])
    assert {name: dict(marginal.counts) for name, marginal in measured.items()} == {
        "nodes": {8: 1},
        "edges": {7: 1},
        "persons": {3: 1},
        "shortest_path": {3: 1},
        "shortest_paths": {1: 1},
        "in_degree": {0: 1, 1: 3, 2: 2},
        "out_degree": {0: 2, 1: 5, 2: 1},
        "below_root_only": {4: 1},
        "below_other_only": {2: 1},
        "below_both": {1: 1},
        "below_neither": {1: 1},
        "leaves": {2: 1},
        "other_root_to_negative": {1: 1},
        "words": {6: 1},
    }
    assert measured["in_degree"].mean == pytest.approx(7 / 6)
    assert measured["in_degree"].standard_deviation == pytest.approx((17 / 36) ** 0.5)
    assert measured["in_degree"].share(1) == 0.5


RELEASED = {
    "farther from its nearest person": 0.916,
    "nearer to the root, undirected": 0.871,
    "more ancestors": 0.707,
    "smaller in-degree": 0.664,
    "larger node id": 0.600,
}
"""Accuracies on the 800 released validation and test rows."""


@pytest.fixture(scope="module")
def released(shared_data):
    return load_examples(shared_data / "prosqa_valid.json")


def test_rules_on_the_released_split(released):
    accuracies = shortcut_accuracies(released)
    for name, value in RELEASED.items():
        assert abs(accuracies[name].value - value) < accuracies[name].half_width, name
    parsed = shortcut_accuracies([dataclasses.replace(example, graph=None) for example in released])
    for name in list(RULES)[:-1]:  # node ids do not survive in a text
        assert parsed[name] == accuracies[name]


def test_statistics_of_the_released_split(released):
    measured = statistics(released)
    means = {name: (round(m.mean, 2), round(m.standard_deviation, 2)) for name, m in measured.items()}
    assert means["nodes"] == (22.82, 2.04)
    assert means["edges"] == (36.26, 5.63)
    assert [means[name][0] for name in ("persons", "shortest_path", "shortest_paths")] == [2.51, 3.75, 1.61]
    assert [means[name][0] for name in ("leaves", "other_root_to_negative")] == [7.42, 2.08]
    assert measured["words"].mean == pytest.approx(180.5, abs=0.05)
    assert [round(measured["in_degree"].share(degree), 2) for degree in range(1, 5)] == [0.48, 0.30, 0.14, 0.04]


def test_nothing_to_measure_is_an_error():
    for function in (statistics, shortcut_accuracies):
        with pytest.raises(CoconutError, match="no examples"):
            function([])
        with pytest.raises(CoconutError, match="not a ProsQA question"):
            function([Example(question="What is 2 + 2?", steps=(), answer="4")])
    lonely = dataclasses.replace(GRAPH, edges=((0, 2), (2, 3), (3, 4)))
    assert other_root(GRAPH) == 1
    with pytest.raises(CoconutError, match="no person other than 'Tom'"):
        other_root(lonely)
    with pytest.raises(CoconutError, match="cannot be reached"):
        statistics([dataclasses.replace(EXAMPLE, graph=dataclasses.replace(GRAPH, target=7, edges=((0, 2), (1, 5))))])
