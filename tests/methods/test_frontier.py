"""Labels from a search: those that are drawn are the nodes which breadth-first search finds at that hop."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from coconut.curriculum import CurriculumConfig
from coconut.errors import CoconutError
from coconut.methods import METHODS
from coconut.methods.frontier import FrontierOptions
from coconut.pages import Page, Placing, Text, count_thoughts, given
from coconut.pipeline import BatchSource, PipelineConfig
from coconut.tasks import get_task
from coconut.tasks.graph_form import graph_symbols, symbol_example
from coconut.tasks.graphs import distances, neighbor_k
from coconut.tokenizers import SYMBOLS, TokenizedExample, encode_example, symbol_tokenizer
from coconut.types import Graph
from tests.tiny_pages import placing_at

TOKENIZER = symbol_tokenizer(graph_symbols(14))
CURRICULUM = CurriculumConfig(max_latent_stage=3)
# The first one's target is at the end of two shortest paths.
DIAMOND = Graph(
    symbols=tuple(map(str, range(8))),
    edges=((0, 1), (0, 2), (0, 4), (1, 3), (2, 3), (4, 5), (3, 6), (7, 5), (7, 1)),
    root=0,
    target=6,
    negative=5,
)
GRAPHS = [
    symbol_example(DIAMOND, (0, 2, 3, 6), (5, 6)),
    *get_task("small_graphs").generate(9, seed=1, config={"extra_nodes": 6, "second_parents": 4}),
]
METHOD = METHODS["coconut_frontier"]


def at(stage: int, labels: Any = "frontier", **settings: Any) -> Placing:
    return placing_at(TOKENIZER, CURRICULUM, stage, options=FrontierOptions(labels=labels), **settings)


def scored(page: Page) -> list[str]:
    return [TOKENIZER.decode(part.ids.tolist()) for part in page if isinstance(part, Text) and part.scored]


def nodes_at(graph: Graph, hop: int, labels: str) -> list[str]:
    """The obvious way: walks in the graph that the task has drawn, not in the question."""
    frontier = [node for node, hops in distances(graph, graph.root).items() if hops == hop]
    return [graph.symbols[node] for node in (frontier if labels == "frontier" else neighbor_k(graph)[hop])]


@pytest.mark.parametrize("labels", ["frontier", "optimal"])
def test_every_node_of_the_hop_is_drawn_as_often(labels: str) -> None:
    numbers = []
    for graph_example in GRAPHS:
        example = encode_example(TOKENIZER, graph_example, SYMBOLS)
        assert graph_example.graph is not None
        for stage in range(3):
            nodes = nodes_at(graph_example.graph, stage + 1, labels)
            draws = 4 * len(nodes)
            pages = [METHOD.pages["main"](example, at(stage, labels, draw=(i + 0.5) / draws)) for i in range(draws)]
            assert Counter(label for page in pages for label in scored(page)) == dict.fromkeys(nodes, 4)
            assert {count_thoughts(page) for page in pages} == {stage}
            numbers.append(len(nodes))
    assert numbers[:3] == ([3, 2, 1] if labels == "frontier" else [2, 1, 1])


def test_where_nothing_is_drawn_it_is_the_path_and_at_its_end_the_answer() -> None:
    example = encode_example(TOKENIZER, GRAPHS[0], SYMBOLS)
    plain = METHODS["coconut"].pages["main"]
    for stage in range(3):
        page, coconut = METHOD.pages["main"](example, at(stage)), plain(example, at(stage))
        assert scored(page) == scored(coconut)[:1] == [GRAPHS[0].steps[stage]]
        # It is asked as Coconut is.
        assert str(given(METHOD.write_to_answer(example, at(stage)))) == str(given(coconut))
    for draw in (None, 0.7):
        assert str(METHOD.pages["main"](example, at(3, draw=draw))) == str(plain(example, at(3)))


def test_labels_are_drawn_anew_in_each_epoch_and_the_edges_may_change_places() -> None:
    examples = [encode_example(TOKENIZER, graph, SYMBOLS) for graph in GRAPHS[:8]]
    config = PipelineConfig(batch_size=8, shuffle_edges=True)
    batches = BatchSource(examples, TOKENIZER, METHOD, at(1), config, seed=0)
    labels = lambda epoch: {
        int(index): int(row.max())
        for index, row in zip(batches[epoch]["main"].examples, batches[epoch]["main"].labels, strict=True)
    }
    seen = [labels(epoch) for epoch in range(6)]
    assert any(one != seen[0] for one in seen)
    for index, graph_example in enumerate(GRAPHS[:8]):
        assert graph_example.graph is not None
        found = {TOKENIZER.decode([one[index]]) for one in seen}
        assert found <= set(nodes_at(graph_example.graph, 2, "frontier"))


@pytest.mark.parametrize(
    "change",
    [
        {"question": np.arange(7, dtype=np.int32)},
        {"steps": (np.zeros(2, np.int32),) * 3},
        {"steps": (np.zeros(1, np.int32),) * 3},  # A symbol that is no node.
    ],
)
def test_what_is_no_graph_in_symbols_is_an_error(change: dict[str, Any]) -> None:
    whole = encode_example(TOKENIZER, GRAPHS[0], SYMBOLS)
    parts = {"question": whole.question, "steps": whole.steps, "answer": whole.answer, **change}
    with pytest.raises(CoconutError, match="'coconut_frontier' needs graph questions in symbols"):
        METHOD.pages["main"](TokenizedExample(**parts), at(0, draw=0.5))
    with pytest.raises(CoconutError, match=r"FrontierOptions\.labels = 'path'"):
        FrontierOptions(labels="path")  # pyright: ignore[reportArgumentType]
