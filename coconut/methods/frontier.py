"""Coconut on graphs with labels from a search, not from one path (Zhu et al. 2025, arXiv 2505.12514).

The label behind the thoughts is a node that a search may have come to in as many hops, another one each epoch: no label
says that the thoughts are to follow one path. Nothing is written behind it, since a path would often not go on from
there. Only where the thoughts have reached the target is the answer written.
"""

import dataclasses
from typing import Literal, no_type_check

import numpy as np

from coconut.curriculum import replace_steps
from coconut.errors import CoconutError, check_fields
from coconut.methods.coconut import write_with_thoughts
from coconut.methods.method import Method
from coconut.pages import Page, Placing, index_behind
from coconut.tasks.graph_form import question_graph
from coconut.tasks.graphs import adjacency, hops_from
from coconut.tokenizers import TokenizedExample


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontierOptions:
    """Options of `COCONUT_FRONTIER`.

    Attributes:
      labels: the nodes that a label at hop ``h`` is drawn from, each as likely as another: ``frontier``, all nodes
        exactly ``h`` hops below the root (the paper's breadth-first variant); or ``optimal``, those of them on some
        shortest path to the target (`coconut.tasks.graphs.neighbor_k`).

    Raises:
      CoconutError: a value that is none of these; the message names the field and the value.
    """

    labels: Literal["frontier", "optimal"] = "frontier"

    def __post_init__(self) -> None:
        check_fields(self)


def label_nodes(example: TokenizedExample, hop: int, labels: Literal["frontier", "optimal"]) -> list[int]:
    """Token ids of the nodes that the label at a hop may name, in rising order.

    The question itself says what the graph is, one id a symbol. Its target is the node that the last step names.

    Raises:
      CoconutError: the question is no graph in symbols, or its steps are not the nodes of a path, one a hop.
    """
    steps = example.written_steps
    graph = question_graph(example.question)
    if graph is not None and all(len(step) == 1 for step in steps):
        edges, root = graph
        number, target = int(example.question.max()) + 1, int(steps[-1][0])
        down = hops_from(adjacency(number, edges), root)
        nodes = sorted(node for node, hops in down.items() if hops == hop)
        if labels == "optimal":
            up = hops_from(adjacency(number, edges, "up"), target)
            nodes = [node for node in nodes if hop + up.get(node, number) == down.get(target)]
        if int(steps[hop - 1][0]) in nodes:
            return nodes
    raise CoconutError(
        "method = 'coconut_frontier' needs graph questions in symbols, whose steps are the nodes of a shortest path; "
        f"here is one of {len(example.question)} ids with steps of {', '.join(str(len(step)) for step in steps)} ids"
    )


def write_with_drawn_label(example: TokenizedExample, placing: Placing) -> Page:
    """``question <start> thoughts <end> node``; Coconut's page once no step is left.

    Without a draw, as in answering, the node is that of the example's own path.
    """
    reached = replace_steps(placing.curriculum, placing.stage, example.num_steps).skipped
    if reached == example.num_steps:
        return write_with_thoughts(example, placing)
    index = index_behind(example.steps, reached + 1) - 1
    label = example.steps[index]
    if placing.draw is not None:
        nodes = label_nodes(example, reached + 1, placing.options.labels)
        label = np.asarray([nodes[int(placing.draw * len(nodes))]], np.int32)
    page = write_with_thoughts(dataclasses.replace(example, steps=(*example.steps[:index], label)), placing)
    return page[:-1]  # Without the answer.


COCONUT_FRONTIER = Method(
    name="coconut_frontier", pages={"main": write_with_drawn_label}, options=FrontierOptions, needs_steps=True
)
