"""Small graphs: their promises, record by record, and no better rule than a coin."""

import itertools
import math
import re

import pytest

from coconut.errors import CoconutError
from coconut.tasks import content_hash, small_graphs
from coconut.tasks.graphs import ancestors, distances, leaves, persons, reachable
from coconut.tasks.shortcuts import RULES, shortcut_accuracies
from coconut.tasks.small_graphs import E8, E12, E12_MATCHED, SmallGraphConfig

COUNT = 600
CONFIGS = {
    "e8": E8,
    "e12": E12,
    "e12_matched": E12_MATCHED,
    "long": SmallGraphConfig(hops=5, extra_nodes=6, second_parents=2, depth_matched=True, num_symbols=40),
    "short": SmallGraphConfig(hops=1, extra_nodes=3, second_parents=3),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def drawn(request):
    config = CONFIGS[request.param]
    return config, small_graphs.generate(COUNT, seed=7, config=config)


def test_every_record_keeps_its_promises(drawn):
    config, examples = drawn
    for example in examples:
        graph = example.graph
        assert len(graph.symbols) == config.num_nodes
        assert len(set(graph.edges)) == len(graph.edges) == config.num_edges
        others = [person for person in persons(graph) if person != graph.root]
        assert len(others) == 1 and graph.root in persons(graph)
        assert distances(graph, graph.root)[graph.target] == distances(graph, others[0])[graph.negative] == config.hops
        assert graph.negative not in reachable(graph, graph.root)
        assert graph.target not in reachable(graph, others[0])
        assert len(ancestors(graph, graph.target)) == config.hops  # a single way down, hence a single depth
        assert all(node not in reachable(graph, child) for node, child in graph.edges)  # acyclic
        if config.depth_matched:
            assert {graph.target, graph.negative} <= set(leaves(graph))
            for root in (graph.root, *others):
                around = distances(graph, root, "both")
                assert around[graph.target] == around[graph.negative] == config.hops


def test_the_question_says_what_the_graph_holds(drawn):
    config, examples = drawn
    for example in examples:
        graph, name = example.graph, example.graph.symbols
        tokens = example.question.split(" ")
        assert len(tokens) == 3 * config.num_edges + 6
        assert {*tokens, *example.written_steps, *example.answer.split()} <= set(config.vocabulary)
        edges = "".join(f"{name[parent]} {name[child]} | " for parent, child in graph.edges)
        match = re.fullmatch(r"<eos> (.*)\[Q\] (\d+) (\d+) \[R\] (\d+)", example.question)
        assert match and match[1] == edges and match[4] == name[graph.root]
        assert sorted(match.groups()[1:3]) == sorted((name[graph.target], name[graph.negative]))
        walk = [graph.root, *(name.index(step) for step in example.written_steps)]
        assert all(edge in graph.edges for edge in itertools.pairwise(walk))
        assert walk[-1] == graph.target and len(walk) == config.hops + 1
        assert example.answer == name[graph.target]


def test_e12_prompt_is_42_tokens():
    [example] = small_graphs.generate(1, seed=0, config=E12)
    assert len(example.question.split()) == 42
    assert len(example.steps) == 3


@pytest.mark.parametrize("preset", ["e12", "e12_matched"])
def test_rules_blind_to_the_root_guess(preset):
    accuracies = shortcut_accuracies(small_graphs.generate(5000, seed=1, config=preset))
    blind = set(RULES) if preset == "e12_matched" else set(RULES) - {"nearer to the root, undirected"}
    for rule in blind:
        assert abs(accuracies[rule].value - 0.5) < 3 * 0.5 / math.sqrt(5000), rule


def test_matching_takes_away_the_undirected_shortcut():
    rule = "nearer to the root, undirected"
    assert shortcut_accuracies(small_graphs.generate(1000, seed=1, config=E12))[rule].value > 0.7
    # What nobody chose has no shortcut.
    assert shortcut_accuracies(small_graphs.generate(1000, seed=1))[rule].value == 0.5


def test_ids_and_candidates_are_uniform():
    examples = small_graphs.generate(6000, seed=2)
    for role in ("root", "target", "negative"):
        counts = [0] * 12
        for example in examples:
            counts[getattr(example.graph, role)] += 1
        assert sum((count - 500) ** 2 / 500 for count in counts) < 31.3  # chi-squared, 11 degrees, p = .001
    target_first = sum(example.question.split()[-4] == example.answer.split()[-1] for example in examples)
    assert abs(target_first - 3000) < 3 * math.sqrt(1500)


def test_records_depend_on_seed_and_index_only():
    whole = small_graphs.generate(60, seed=3)
    assert whole[:20] == small_graphs.generate(20, seed=3)
    assert whole[20:] == small_graphs.generate(40, seed=3, start=20)
    assert not {e.question for e in whole} & {e.question for e in small_graphs.generate(60, seed=4)}


def test_known_questions_are_not_repeated():
    tiny = SmallGraphConfig(hops=1, extra_nodes=0, second_parents=0)  # 4 nodes: 12 pairs of edges, 2 roots
    first = small_graphs.generate(12, seed=0, config=tiny)
    known = frozenset(map(content_hash, first))
    second = small_graphs.generate(12, seed=0, config=tiny, exclude=known)
    assert len({content_hash(example) for example in first + second}) == 24
    with pytest.raises(CoconutError, match="no new question for record 24"):
        small_graphs.generate(25, seed=0, config=tiny)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hops": 0}, "hops must be at least 1, got 0"),
        ({"extra_nodes": -1}, "got -1"),
        ({"second_parents": 5}, "got 5"),
        ({"second_parents": 1, "depth_matched": True}, "got 1"),
        ({"hops": 2, "depth_matched": True}, "got 2"),
        ({"num_symbols": 11}, "12 nodes, got 11"),
    ],
)
def test_impossible_sizes_are_named(options, message):
    with pytest.raises(CoconutError, match=message):
        SmallGraphConfig(**{"extra_nodes": 4, "second_parents": 2, **options})


def test_unknown_preset_and_negative_count():
    with pytest.raises(CoconutError, match="'e13'"):
        small_graphs.generate(1, seed=0, config="e13")
    with pytest.raises(CoconutError, match="count=-1"):
        small_graphs.generate(-1, seed=0)
