"""The glossary, and the records that travel through the house.

Axis letters, used in every shape comment and einsum of this project:

====== =====================================================================
``B``  rows of a batch
``P``  prompt columns (question, and the start marker where there is one)
``K``  latent columns (continuous thoughts, or the fillers of a control)
``S``  suffix columns (end marker, remaining language steps, answer, EOS)
``T``  all columns of a batch, ``P + K + S``
``C``  columns a query may look back on (a cache)
``L``  layers
``N``  query heads
``M``  key/value heads (grouped queries: ``N`` is a multiple of ``M``)
``H``  width of one head
``D``  width of the model
``F``  width of the MLP
``V``  vocabulary entries
====== =====================================================================
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

IGNORED_LABEL = -100
"""The label of a column that carries no loss (the field's convention)."""


class CoconutError(ValueError):
    """Bad input, described so that the reader knows what to change.

    Every error a user can cause by a file, a config or a flag is one of these; the command line prints its
    message alone and exits with code 2.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graph:
    """The graph behind a ProsQA-like question.

    Attributes:
      symbols: name of each node, by node id.
      edges: directed ``(parent, child)`` node-id pairs.
      root: the node asked about.
      target: the option reachable from ``root``.
      negative: the option not reachable from ``root``.
    """

    symbols: tuple[str, ...]
    edges: tuple[tuple[int, int], ...]
    root: int
    target: int
    negative: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One question of any task, as text.

    Attributes:
      question: the prompt, without a trailing newline.
      steps: the written reasoning, one string a step; may be empty.
      answer: the answer, without a prefix such as ``###``.
      graph: the graph behind the question, for tasks that have one.
    """

    question: str
    steps: tuple[str, ...]
    answer: str
    graph: Graph | None = None


JSON = Mapping[str, Any]
