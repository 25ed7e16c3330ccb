"""ProsQA: which of two concepts does a person turn out to be? (Coconut, arXiv 2412.06769, section 4.2).

The paper's sketch of the generator, taken literally, gives sparser graphs than the released files. This recipe was
fitted to the released validation and test splits, from which its output cannot be told by their marginals:

1. Nodes 0 and 1 are the two roots. Each further node draws k ~ Poisson(1.5) parents among one group of the nodes before
   it: those below root 0 only, those below root 1 only, or all. Below a single root, a parent is the likelier the
   deeper it stands.
2. Isolated nodes go. A root's own side is what lies below it alone; the root asked about is the one whose own side
   holds the deeper leaf, the target is one of its deepest leaves, the negative any leaf of the other root's own side.
3. Nodes without parents are persons, the others concepts. Sentences and options are shuffled; the steps are a uniformly
   drawn shortest path.

That leaves shortcuts: the option farther from its nearest person is right nine times in ten, whoever is asked about.
``negatives="depth_matched"`` (`coconut.tasks.depth_matched`) takes them away. `coconut.tasks.shortcuts` measures them.

Node ids in `Graph` are a uniformly random relabelling, and its edges stand in the order of the sentences: in the
released files ids rise along every edge and the root is 0 or 1, which a reader of the symbol form would learn.
"""

import dataclasses
import functools
import itertools
import random
import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from coconut.errors import CoconutError
from coconut.tasks import depth_matched
from coconut.tasks.graph_form import draw_symbols, graph_symbols, symbol_example
from coconut.tasks.graphs import shortest_paths
from coconut.tasks.recipe import MAX_NODES, Choice, Recipe, choose_official, draw_draft
from coconut.tasks.sampling import draw_unique
from coconut.types import Example, Graph

# fmt: off
PERSONS = (
    "Alex", "Bob", "Carol", "Davis", "Eva", "Fae", "Gabriel", "Jack", "Max", "Oliver", "Polly", "Rex", "Sally", "Sam",
    "Stella", "Tom", "Wren",
)
CONCEPTS = (
    "bompus", "boompus", "brimpus", "chorpus", "dumpus", "felpus", "fompus", "gerpus", "gorpus", "grimpus", "gwompus",
    "hilpus", "impus", "jelpus", "jompus", "kerpus", "lempus", "lorpus", "numpus", "quimpus", "rempus", "rompus",
    "rorpus", "scrompus", "shumpus", "sterpus", "storpus", "terpus", "timpus", "tumpus", "vumpus", "worpus", "wumpus",
    "yerpus", "yimpus", "yumpus", "zhorpus", "zumpus",
)
# fmt: on

MAX_DRAFTS = 100_000
"""Graphs drawn for one record before we say that a recipe does not yield any."""

_STATEMENT = re.compile(r"(?:Every )?(\S+) is an? (\S+)")
_QUESTION = re.compile(r"Is (\S+) an? (\S+) or (\S+)")

FORMS = ("text", "graph")
NEGATIVES = ("official", "depth_matched")


def generate(
    count: int,
    *,
    seed: int,
    negatives: str = "official",
    form: str = "text",
    start: int = 0,
    exclude: AbstractSet[str] = frozenset(),
    recipe: Recipe | Mapping[str, Any] | None = None,
) -> list[Example]:
    """Draws distinct questions.

    Args:
      count: how many.
      seed: any integer; record ``i`` depends on the seed, the options and ``i`` only (see `draw_unique`).
      negatives: ``official``, or ``depth_matched`` for questions without the known shortcuts.
      form: ``text`` for sentences, ``graph`` for the symbols of `coconut.tasks.graph_form`.
      start: index of the first record.
      exclude: `content_hash` of questions not to emit.
      recipe: the random graph, or fields of it that differ from the default: the one of the released files, and for
        ``depth_matched``, which doubles it, one of half the size.

    Raises:
      CoconutError: for an unknown ``negatives`` or ``form``, a negative count, or a recipe that yields no question.
    """
    for option, value, known in (("negatives", negatives, NEGATIVES), ("form", form, FORMS)):
        if value not in known:
            raise CoconutError(f"unknown {option} {value!r}; there are {', '.join(known)}")
    default = depth_matched.HALF_RECIPE if negatives == "depth_matched" else Recipe()
    if recipe is None:
        recipe = default
    elif isinstance(recipe, Mapping):
        fields = [field.name for field in dataclasses.fields(Recipe)]
        if unknown := sorted(set(recipe) - set(fields)):
            raise CoconutError(f"unknown field {unknown[0]!r} of a recipe; there are {', '.join(fields)}")
        recipe = dataclasses.replace(default, **recipe)
    if negatives == "depth_matched":
        depth_matched.require_room(recipe)
    draw = functools.partial(_draw, recipe=recipe, negatives=negatives, form=form)
    return draw_unique(draw, count, stream="prosqa", seed=seed, start=start, exclude=exclude)


def vocabulary() -> tuple[str, ...]:
    """Every symbol of the graph form, 40 of them."""
    return graph_symbols(MAX_NODES)


def _draw(rng: random.Random, recipe: Recipe, negatives: str, form: str) -> Example:
    hops = depth_matched.draw_hops(rng, recipe) if negatives == "depth_matched" else None
    for _ in range(MAX_DRAFTS):
        draft = draw_draft(rng, recipe)
        if draft is None:
            continue
        if hops is None:
            choice = choose_official(rng, draft, recipe)
        else:
            choice = depth_matched.choose(rng, draft, hops)
        if choice and (example := _write(rng, choice, form)):
            return example
    raise CoconutError(f"no question in {MAX_DRAFTS} graphs of {recipe}")


def _write(rng: random.Random, choice: Choice, form: str) -> Example | None:
    """Relabels, names and words a choice; ``None`` where it has more persons or concepts than there are names."""
    edges = choice.edges.copy()
    rng.shuffle(edges)
    nodes = sorted({node for edge in edges for node in edge})  # isolated nodes go
    ids = dict(zip(nodes, rng.sample(range(len(nodes)), len(nodes)), strict=True))
    children = {ids[child] for _, child in edges}
    if form == "graph":
        symbols = draw_symbols(rng, len(nodes), MAX_NODES)
    else:
        if len(children) > len(CONCEPTS) or len(nodes) - len(children) > len(PERSONS):
            return None
        concepts = iter(rng.sample(CONCEPTS, len(children)))
        persons = iter(rng.sample(PERSONS, len(nodes) - len(children)))
        symbols = tuple([next(concepts if node in children else persons) for node in range(len(nodes))])
    graph = Graph(
        symbols=symbols,
        edges=tuple([(ids[parent], ids[child]) for parent, child in edges]),
        root=ids[choice.root],
        target=ids[choice.target],
        negative=ids[choice.negative],
    )
    path = rng.choice(shortest_paths(graph, graph.root, graph.target))
    candidates = (graph.target, graph.negative) if rng.random() < 0.5 else (graph.negative, graph.target)
    if form == "graph":
        return symbol_example(graph, path, candidates)
    root, first, second = (symbols[node] for node in (graph.root, *candidates))
    return Example(
        question=" ".join([*_statements(graph, graph.edges, children), f"Is {root} a {first} or {second}?"]),
        steps=tuple(_statements(graph, itertools.pairwise(path), children)),
        answer=f"{root} is a {symbols[graph.target]}.",
        graph=graph,
    )


def parse_graph(example: Example) -> Graph:
    """Reads the graph back from a question in text form; nodes are numbered as they first appear.

    Raises:
      CoconutError: if the sentences are not ProsQA's, or the answer is none of the options.
    """
    *statements, last = example.question.removesuffix("?").split(". ")
    asked = _QUESTION.fullmatch(last)
    answered = _STATEMENT.fullmatch(example.answer.removesuffix("."))
    pairs = [_STATEMENT.fullmatch(statement) for statement in statements]
    if not asked or not answered or not all(pairs):
        raise CoconutError(f"not a ProsQA question in text form: {last!r}, answered {example.answer!r}")
    root, *options = asked.groups()
    target = answered[2]
    if answered[1] != root or target not in options:
        raise CoconutError(f"the answer {example.answer!r} is none of the options of {last!r}")
    negative = options[1 - options.index(target)]
    names = [pair.groups() for pair in pairs if pair]
    ids: dict[str, int] = {}
    for name in (name for pair in (*names, (root, target), (root, negative)) for name in pair):
        ids.setdefault(name, len(ids))
    return Graph(
        symbols=tuple(ids),
        edges=tuple((ids[parent], ids[child]) for parent, child in names),
        root=ids[root],
        target=ids[target],
        negative=ids[negative],
    )


def read_statement(sentence: str) -> tuple[str, str] | None:
    """Who a sentence in text form is about, and what it says that is: ``("lempus", "scrompus")``; None for any other.

    ``Every`` may be there or not: a person does not need it, a concept does, and a reader understands both.
    """
    found = _STATEMENT.fullmatch(sentence.removesuffix("."))
    return (found[1], found[2]) if found else None


def _statements(graph: Graph, edges: Iterable[tuple[int, int]], concepts: AbstractSet[int]) -> list[str]:
    name = graph.symbols
    return [f"{'Every ' if parent in concepts else ''}{name[parent]} is a {name[child]}." for parent, child in edges]
