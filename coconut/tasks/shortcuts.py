"""How much of a ProsQA-like task can be answered without searching, and what its graphs look like.

Five rules that look at a few local properties answer the released ProsQA splits far above chance; accuracy below the
best of them is no evidence of search. Both functions take any examples with a graph, or in ProsQA's text form.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from coconut.errors import CoconutError
from coconut.tasks.graphs import (
    adjacency,
    ancestors,
    count_shortest_paths,
    distances,
    hops_from,
    leaves,
    persons,
    reachable,
)
from coconut.tasks.prosqa import parse_graph
from coconut.tasks.statistics import Accuracy, Marginal, accuracies, marginals
from coconut.types import Example, Graph

Score = tuple[int | float, int | float]
"""What a rule says of (target, negative)."""


def statistics(examples: Iterable[Example]) -> dict[str, Marginal]:
    """The distribution of every property by which two sets of ProsQA graphs can be compared.

    ``in_degree`` and ``out_degree`` have one observation a node (the two roots excepted for ``in_degree``), the others
    one a question. The *other* root is not marked in a question: it is taken to be the person above the negative with
    the most nodes below.

    Raises:
      CoconutError: if there are no examples, or one has no graph.
    """
    return marginals(map(_measure, examples))


def other_root(graph: Graph) -> int:
    """The person above the negative, not asked about, with the most nodes below (the smallest id, on a tie).

    Raises:
      CoconutError: if there is none.
    """
    above = ancestors(graph, graph.negative)
    candidates = [person for person in persons(graph) if person in above and person != graph.root]
    if not candidates:
        raise CoconutError(
            f"no person other than {graph.symbols[graph.root]!r} is above {graph.symbols[graph.negative]!r}"
        )
    return max(candidates, key=lambda person: (len(reachable(graph, person)), -person))


def shortcut_accuracies(examples: Iterable[Example]) -> dict[str, Accuracy]:
    """Accuracy of every rule of `RULES`.

    Raises:
      CoconutError: if there are no examples, or one has no graph.
    """
    points = dict.fromkeys(RULES, 0.0)
    count = 0
    for example in examples:
        graph = _graph(example)
        count += 1
        for name, score in RULES.items():
            target, negative = score(graph)
            points[name] += 0.5 if target == negative else float(target > negative)
    return accuracies(points, count)


def _farther_from_person(graph: Graph) -> Score:
    hops = hops_from(adjacency(len(graph.symbols), graph.edges), *persons(graph))
    return hops.get(graph.target, math.inf), hops.get(graph.negative, math.inf)


def _nearer_to_root(graph: Graph) -> Score:
    hops = distances(graph, graph.root, "both")
    return -hops.get(graph.target, math.inf), -hops.get(graph.negative, math.inf)


def _more_ancestors(graph: Graph) -> Score:
    return len(ancestors(graph, graph.target)), len(ancestors(graph, graph.negative))


def _smaller_in_degree(graph: Graph) -> Score:
    degree = Counter(child for _, child in graph.edges)
    return -degree[graph.target], -degree[graph.negative]


def _larger_id(graph: Graph) -> Score:
    return graph.target, graph.negative


RULES: Mapping[str, Callable[[Graph], Score]] = {
    "farther from its nearest person": _farther_from_person,
    "nearer to the root, undirected": _nearer_to_root,
    "more ancestors": _more_ancestors,
    "smaller in-degree": _smaller_in_degree,
    "larger node id": _larger_id,
}
"""Each rule scores (target, negative); the option with the higher score is its answer."""


def _graph(example: Example) -> Graph:
    return example.graph if example.graph is not None else parse_graph(example)


def _measure(example: Example) -> dict[str, list[int]]:
    graph = _graph(example)
    other = other_root(graph)
    below_root, below_other = reachable(graph, graph.root), reachable(graph, other)
    paths = count_shortest_paths(graph, graph.root, graph.target)
    if not paths:
        raise CoconutError(f"the target cannot be reached from the root: {example.question[-80:]!r}")
    nodes = range(len(graph.symbols))
    parents = Counter(child for _, child in graph.edges)
    children = Counter(parent for parent, _ in graph.edges)
    return {
        "nodes": [len(nodes)],
        "edges": [len(graph.edges)],
        "persons": [len(persons(graph))],
        "shortest_path": [distances(graph, graph.root)[graph.target]],
        "shortest_paths": [paths],
        "in_degree": [parents[node] for node in nodes if node not in (graph.root, other)],
        "out_degree": [children[node] for node in nodes],
        "below_root_only": [len(below_root - below_other)],
        "below_other_only": [len(below_other - below_root)],
        "below_both": [len(below_root & below_other)],
        "below_neither": [len(nodes) - len(below_root | below_other)],
        "leaves": [len(leaves(graph))],
        "other_root_to_negative": [distances(graph, other)[graph.negative]],
        "words": [len(example.question.split())],
    }
