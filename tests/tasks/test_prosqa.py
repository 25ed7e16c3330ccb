"""ProsQA: every record checked by program, and the whole compared with the released validation split."""

import dataclasses
import itertools
import math
import re

import pytest
from scipy import stats

from coconut.errors import CoconutError
from coconut.tasks import content_hash, prosqa
from coconut.tasks.graph_form import graph_symbols
from coconut.tasks.graphs import adjacency, distances, leaves, persons, reachable
from coconut.tasks.recipe import Recipe
from coconut.tasks.records import load_examples
from coconut.tasks.shortcuts import RULES, Marginal, shortcut_accuracies, statistics
from coconut.types import Example, Graph

MATCHED_COUNT = 1200


@pytest.fixture(scope="module")
def official(shared_data):
    return load_examples(shared_data / "prosqa_valid.json")


@pytest.fixture(scope="module")
def generated():
    return prosqa.generate(3000, seed=0)


@pytest.fixture(scope="module")
def matched():
    return prosqa.generate(MATCHED_COUNT, seed=0, negatives="depth_matched")


def graph_of(example: Example) -> Graph:
    assert example.graph is not None
    return example.graph


def check_text(example):
    graph = graph_of(example)
    name = graph.symbols
    people = persons(graph)
    *sentences, question = re.split(r"(?<=\.) ", example.question)

    def said(parent, child):
        return (
            f"{name[parent]} is a {name[child]}." if parent in people else f"Every {name[parent]} is a {name[child]}."
        )

    assert sentences == [said(*edge) for edge in graph.edges]
    assert len(set(graph.edges)) == len(graph.edges)
    assert len(set(name)) == len(name)
    assert all((symbol in prosqa.PERSONS) == (node in people) for node, symbol in enumerate(name))
    assert all(symbol in prosqa.PERSONS or symbol in prosqa.CONCEPTS for symbol in name)
    asked = re.fullmatch(r"Is (\w+) a (\w+) or (\w+)\?", question)
    assert asked and asked[1] == name[graph.root] and graph.root in people
    assert sorted(asked.groups()[1:]) == sorted((name[graph.target], name[graph.negative]))
    assert example.answer == f"{name[graph.root]} is a {name[graph.target]}."
    below = distances(graph, graph.root)
    assert graph.negative not in below
    assert {graph.target, graph.negative} <= set(leaves(graph))
    assert 3 <= below[graph.target] <= 6
    assert len(example.steps) == below[graph.target]
    walk = [graph.root, *(name.index(step.removesuffix(".").split()[-1]) for step in example.written_steps)]
    assert walk[-1] == graph.target and all(edge in graph.edges for edge in itertools.pairwise(walk))
    assert list(example.steps) == [said(*edge) for edge in itertools.pairwise(walk)]


@pytest.mark.slow
def test_every_record_is_true(generated):
    for example in generated:
        check_text(example)


def test_released_records_pass_the_same_checks(official):
    # Their sentences are shuffled against the list of edges; ours are not.
    for example in official:
        parsed = prosqa.parse_graph(example)
        assert {(parsed.symbols[a], parsed.symbols[b]) for a, b in parsed.edges} == {
            (example.graph.symbols[a], example.graph.symbols[b]) for a, b in example.graph.edges
        }
        relabelled = {name: node for node, name in enumerate(parsed.symbols)}
        assert relabelled[example.graph.symbols[example.graph.negative]] == parsed.negative
        check_text(dataclasses.replace(example, graph=parsed))


def p_values(ours: dict[str, Marginal], theirs: dict[str, Marginal]) -> dict[str, float]:
    """How likely two samples of every property come from one distribution: chi-squared, or Welch's t for the sizes."""
    values = {}
    for name, left in ours.items():
        right = theirs[name]
        if name in ("nodes", "edges", "words", "below_root_only", "below_other_only", "leaves"):
            both = [(side.mean, side.standard_deviation, side.total) for side in (left, right)]
            values[name] = float(stats.ttest_ind_from_stats(*both[0], *both[1], equal_var=False).pvalue)
            continue
        columns, rest = [], [0, 0]
        for value in sorted({*left.counts, *right.counts}):
            column = [left.counts.get(value, 0), right.counts.get(value, 0)]
            if column[1] >= 5:
                columns.append(column)
            else:
                rest = [have + new for have, new in zip(rest, column, strict=True)]
        if sum(rest):
            columns.append(rest)
        values[name] = stats.chi2_contingency(columns).pvalue  # pyright: ignore[reportAttributeAccessIssue]
    return values


def test_generated_cannot_be_told_from_released(generated, official):
    values = p_values(statistics(generated), statistics(official))
    assert len(values) == 14
    assert min(values.values()) > 0.005, values


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [
        Recipe(mean_parents=1.2, nodes=30),  # the edges of the paper's literal algorithm: about 30 at 23 nodes
        Recipe(depth_weight=0.0),
        Recipe(first_share=0.25),
        Recipe(second_share=0.55),
        Recipe(nodes=27),
    ],
)
def test_a_wrong_recipe_is_told_from_released(wrong, official):
    values = p_values(statistics(prosqa.generate(1000, seed=0, recipe=wrong)), statistics(official))
    assert min(values.values()) < 0.001, values


def test_shortcuts_of_generated_equal_released(generated, official):
    ours, theirs = shortcut_accuracies(generated), shortcut_accuracies(official)
    for rule in RULES:
        if rule != "larger node id":  # ours are permuted
            assert abs(ours[rule].value - theirs[rule].value) < 1.6 * (ours[rule].half_width + theirs[rule].half_width)
    assert abs(ours["larger node id"].value - 0.5) < 3 * 0.5 / math.sqrt(len(generated))


def test_ids_say_nothing_of_the_topology(generated):
    rising = sum(parent < child for example in generated for parent, child in example.graph.edges)
    edges = sum(len(example.graph.edges) for example in generated)
    assert abs(rising / edges - 0.5) < 0.01
    assert abs(sum(example.graph.root < 2 for example in generated) / len(generated) - 2 / 22.8) < 0.02


def all_walks_tie(graph: Graph, source: int) -> bool:
    """Whether as many undirected walks of every length up to 12 lead from a node to the target as to the negative."""
    neighbors = adjacency(len(graph.symbols), graph.edges, "both")
    counts = [int(node == source) for node in range(len(neighbors))]
    for _ in range(12):
        counts = [sum(counts[neighbor] for neighbor in neighbors[node]) for node in range(len(neighbors))]
        if counts[graph.target] != counts[graph.negative]:
            return False
    return True


@pytest.mark.slow
def test_depth_matched_options_are_twins(matched):
    for example in matched:
        check_text(example)
        graph = graph_of(example)
        hops = distances(graph, graph.root)[graph.target]
        assert all(parent not in reachable(graph, child) for parent, child in graph.edges)  # acyclic
        # A bystander may stand above an option, too, but one person mirrors the root in everything.
        mirrors = [
            person
            for person in persons(graph)
            if distances(graph, person).get(graph.negative) == hops and graph.target not in distances(graph, person)
        ]
        assert any(all_walks_tie(graph, person) for person in mirrors)
        assert all_walks_tie(graph, graph.root)


def test_depth_matched_shortcuts_are_at_chance(matched):
    accuracies = shortcut_accuracies(matched)
    assert len(accuracies) == 5
    for rule, accuracy in accuracies.items():
        assert abs(accuracy.value - 0.5) < 3 * 0.5 / math.sqrt(MATCHED_COUNT), rule
    assert accuracies["nearer to the root, undirected"].value == 0.5


def test_depth_matched_sizes_are_near_the_released(matched):
    measured = statistics(matched)
    for name, released, tolerance in (("nodes", 22.8, 1.0), ("edges", 36.1, 2.0), ("persons", 2.55, 0.2)):
        assert abs(measured[name].mean - released) < tolerance, name
    shares = [measured["shortest_path"].share(hops) for hops in (3, 4, 5, 6)]
    assert max(abs(a - b) for a, b in zip(shares, (0.41, 0.42, 0.14, 0.03), strict=True)) < 0.04


@pytest.mark.parametrize("negatives", ["official", "depth_matched"])
def test_graph_form_asks_the_same_as_text(negatives):
    vocabulary = set(prosqa.vocabulary())
    assert len(vocabulary) == 40
    for example in prosqa.generate(100, seed=5, negatives=negatives, form="graph"):
        graph = graph_of(example)
        name = graph.symbols
        edges = " ".join(f"{name[parent]} {name[child]} |" for parent, child in graph.edges)
        head, candidates = example.question.split(" [Q] ")
        assert head == f"<eos> {edges}"
        assert candidates in {
            f"{name[first]} {name[second]} [R] {name[graph.root]}"
            for first, second in itertools.permutations((graph.target, graph.negative))
        }
        walk = [graph.root, *(name.index(step) for step in example.written_steps)]
        assert walk[-1] == graph.target and all(edge in graph.edges for edge in itertools.pairwise(walk))
        assert {*example.question.split(), *example.written_steps, *example.answer.split()} <= vocabulary
        assert example.answer == name[graph.target]


def test_graph_symbols_are_marks_and_numbers():
    assert graph_symbols(3) == ("<eos>", "|", "[Q]", "[R]", "[A]", "0", "1", "2")


def test_records_depend_on_seed_and_index_only():
    whole = prosqa.generate(30, seed=9)
    assert whole[:10] == prosqa.generate(10, seed=9)
    assert whole[10:] == prosqa.generate(20, seed=9, start=10)
    assert whole[0] != prosqa.generate(1, seed=10)[0]
    excluded = content_hash(whole[0])
    again = prosqa.generate(30, seed=9, exclude={excluded})
    assert again[1:] == whole[1:] and content_hash(again[0]) != excluded


def test_text_graphs_are_parsed_back(generated):
    for example in generated[:200]:
        parsed = prosqa.parse_graph(dataclasses.replace(example, graph=None))
        names, graph = parsed.symbols, example.graph
        assert [(names[a], names[b]) for a, b in parsed.edges] == [
            (graph.symbols[a], graph.symbols[b]) for a, b in graph.edges
        ]
        for role in ("root", "target", "negative"):
            assert names[getattr(parsed, role)] == graph.symbols[getattr(graph, role)]


@pytest.mark.parametrize("field, value", [("question", "What is 2 + 2?"), ("answer", "Tom is a quorpus.")])
def test_other_texts_are_not_parsed(generated, field, value):
    with pytest.raises(CoconutError):
        prosqa.parse_graph(dataclasses.replace(generated[0], graph=None, **{field: value}))


def test_a_recipe_may_be_its_fields():
    fields = {"max_hops": 4}
    examples = prosqa.generate(60, seed=0, form="graph", recipe=fields)
    assert examples == prosqa.generate(60, seed=0, form="graph", recipe=Recipe(max_hops=4))
    assert {len(example.steps) for example in examples} == {3, 4}
    # The others keep the default of the kind of negatives.
    assert prosqa.generate(3, seed=0, negatives="depth_matched", recipe={}) == prosqa.generate(
        3, seed=0, negatives="depth_matched"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negatives": "hard"}, "'hard'"),
        ({"form": "picture"}, "'picture'"),
        ({"recipe": Recipe(nodes=5, min_hops=5)}, "no question in"),
        ({"negatives": "depth_matched", "recipe": Recipe()}, "nodes=28"),
        ({"recipe": {"hops": 4}}, "unknown field 'hops' of a recipe"),
    ],
)
def test_bad_options_are_named(options, message, monkeypatch):
    monkeypatch.setattr(prosqa, "MAX_DRAFTS", 200)
    with pytest.raises(CoconutError, match=message):
        prosqa.generate(1, seed=0, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"nodes": 3},
        {"nodes": 36},
        {"mean_parents": 0.0},
        {"first_share": 1.5},
        {"second_share": -0.1},
        {"depth_weight": math.inf},
        {"min_hops": 5, "max_hops": 4},
    ],
)
def test_impossible_recipes_are_named(options):
    value = next(iter(options.values()))
    with pytest.raises(CoconutError, match=re.escape(str(value))):
        Recipe(**options)
