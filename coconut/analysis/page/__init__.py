"""The page of `coconut inspect`: one HTML file that a person opens, without a network or anything else.

``index.html``, ``page.css`` and the scripts stand beside this module; `write_page` puts them and what they show into
one file. The page shows every text as text, never as HTML, so that nothing a model has written can run.
"""

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import PurePosixPath
from string import Template
from typing import Any

from coconut.errors import CoconutError
from coconut.storage import write_atomically
from coconut.storage_path import StoragePath

SCRIPTS = ("elements.js", "graph.js", "summary.js", "question.js", "page.js")
"""In the order in which they run; only the last does anything by itself."""


def write_page(content: Mapping[str, Any], path: StoragePath) -> None:
    """Writes the page, whole or not at all.

    Of ``content`` only ``title`` and ``questions`` must be there, and of a question ``question``, ``expected``,
    ``answer``, ``right`` and ``after``; what else is missing or None has no place on the page. Shares are numbers from
    0 to 1, intervals ``[low, high]``:

    - ``title``.
    - ``run``: ``method``, ``task``, ``split``, ``seed``, ``step``, ``stage``, ``commit``, ``command``.
    - ``measures``: ``examples``, ``correct``, ``accuracy``, ``interval_95``.
    - ``interventions``, for each: ``name``, ``thoughts`` (which are changed), ``later`` (what becomes of the thoughts
      behind them), ``examples``, ``accuracy``, ``interval_95``, ``accuracy_before``, ``flips`` (share of answers that
      became another one), ``flips_interval_95``, ``p_value``, ``log_probability_change`` and ``kl`` (in nats).
    - ``figures``, for each: ``file``, a path from the page's folder, and ``caption``.
    - ``questions``, for each: ``question``, ``expected``, ``answer``, ``right``, ``thoughts``, ``tokens`` (of the
      question), and

      - ``after``: for each number of ``thoughts``, in order, the ``text`` then written, whether it is ``right``, its
        ``class``, and the ``belief``, a share for every node of the graph;
      - ``lens``: for each thought, pairs of a token and its probability, the most likely first;
      - ``attention``: ``layers``, for each layer and thought one weight for every token of the question;
      - ``interventions``, by name: ``text``, ``right``, and ``flipped``, whether the answer became another one;
      - ``graph``: ``symbols``, ``edges``, ``root``, ``target``, ``negative``, and ``positions``, for every node its
        ``[x, y]`` (`coconut.analysis.layout.layered_positions`).

    Numbers are written with five digits; those that are not finite are null, and shown as a dash.

    Args:
      content: what the page shows, as plain values or numpy's.
      path: file to write.

    Raises:
      CoconutError: a required field is missing, lists that belong together differ in length, a figure's path leads out
        of the page's folder, or the file cannot be written.
    """
    _check(content)
    # What is filled in is not looked through again: a question may hold "${style}".
    text = Template(_shipped("index.html")).substitute(
        title=html.escape(content["title"]),
        style=_shipped("page.css"),
        script="\n".join(map(_shipped, SCRIPTS)),
        content=_embedded(content),
    )
    write_atomically(path, text)


def _shipped(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text("utf-8")


def _embedded(content: Mapping[str, Any]) -> str:
    """JSON that may stand in a ``<script>``, where ``</script`` and ``<!--`` would mean something: no ``<`` is left."""
    exact = json.dumps(content, default=lambda value: value.tolist())  # An array or a number of numpy's.
    # Most of a file is attention, whose further digits nobody sees.
    short = json.loads(
        exact, parse_float=lambda digits: float(f"{float(digits):.5g}"), parse_constant=lambda name: None
    )
    return json.dumps(short, separators=(",", ":")).replace("<", "\\u003c")


def _check(content: Mapping[str, Any]) -> None:
    """Finds what the page could not show before it is written, since a page that fails shows nothing."""
    _require(content, ("title", "questions"), "content")
    for figure in content.get("figures") or ():
        file = PurePosixPath(figure["file"])
        if file.is_absolute() or ".." in file.parts or ":" in figure["file"]:
            raise CoconutError(f"figures.file = {figure['file']!r}: must be a path from the page's folder")
    for index, question in enumerate(content["questions"]):
        where = f"questions[{index}]"
        _require(question, ("question", "expected", "answer", "right", "after"), where)
        for name, values, expected in _lengths(question):
            if len(values) != expected:
                raise CoconutError(f"{where}.{name} has {len(values)} values: must be {expected}")


def _require(values: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    for name in names:
        if values.get(name) is None:
            raise CoconutError(f"{where}.{name} is missing")


def _lengths(question: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[Any], int]]:
    """What of a question has to be as long as its graph has nodes, or its text tokens: name, values, length."""
    graph, attention = question.get("graph"), question.get("attention")
    nodes = len(graph["symbols"]) if graph else 0
    if graph:
        yield "graph.positions", graph["positions"], nodes
    for index, held in enumerate(question["after"]):
        if held.get("belief") is not None:
            yield f"after[{index}].belief", held["belief"], nodes
    for layer, thoughts in enumerate(attention["layers"] if attention else ()):
        for thought, weights in enumerate(thoughts):
            yield f"attention.layers[{layer}][{thought}]", weights, len(question.get("tokens") or ())
