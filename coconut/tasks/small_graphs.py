"""ProsQA-like questions small enough for a model of 0.1 M parameters on a CPU.

Two roots, a chain of ``hops`` edges below each, and some more nodes. Target and negative are the ends of the two
chains, the root asked about is a coin flip, and node ids are a random relabelling: a rule that does not look at the
root is right half the time, by construction. The target is exactly ``hops`` hops below the root asked about and
cannot be reached from the other one; the mirror image holds for the negative.

`E12` has 12 nodes and 12 edges, so its prompt is 42 tokens: 12 edges of 3 tokens (parent, child, ``|``) and the 6 of
``<eos>``, ``[Q]``, two candidates, ``[R]`` and the root. Its 3 steps are one token each, its answer is written in 2.
"""

import dataclasses
import functools
import random
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from coconut.errors import CoconutError
from coconut.tasks.graph_form import draw_symbols, graph_symbols, symbol_example
from coconut.tasks.sampling import draw_unique
from coconut.types import Example, Graph


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallGraphConfig:
    """The size of a small graph.

    Attributes:
      hops: edges of each chain, the depth of target and negative.
      extra_nodes: nodes beyond the two chains, each below a uniformly drawn existing node.
      second_parents: how many of them, drawn at random, have a second parent, on the side of the other root (on either
        side, for a node that already lies below both roots).
      depth_matched: also ties the undirected distances of the two candidates from either root, so that "the candidate
        nearer to the root, whatever the direction of the edges" is no better than a coin. The two nodes with a second
        parent are then the links that do it: a child of the node at depth d of one chain and of the node at depth
        d + 2 of the other, d random, one link each way. Chain ends stay leaves.
      num_symbols: node symbols to draw the ids from; ``None`` for as many as there are nodes.

    Raises:
      CoconutError: naming the value that cannot be.
    """

    hops: int = 3
    extra_nodes: int
    second_parents: int
    depth_matched: bool = False
    num_symbols: int | None = None

    def __post_init__(self) -> None:
        if self.hops < 1:
            raise CoconutError(f"hops must be at least 1, got {self.hops}")
        if self.extra_nodes < 0:
            raise CoconutError(f"extra_nodes must not be negative, got {self.extra_nodes}")
        if not 0 <= self.second_parents <= self.extra_nodes:
            raise CoconutError(
                f"second_parents must lie in 0..extra_nodes={self.extra_nodes}, got {self.second_parents}"
            )
        if self.depth_matched and self.second_parents != 2:
            raise CoconutError(f"depth_matched needs second_parents=2, one link each way, got {self.second_parents}")
        if self.depth_matched and self.hops < 3:
            raise CoconutError(f"depth_matched needs hops of at least 3, got {self.hops}")
        if self.num_symbols is not None and self.num_symbols < self.num_nodes:
            raise CoconutError(f"num_symbols must be at least the {self.num_nodes} nodes, got {self.num_symbols}")

    @property
    def num_nodes(self) -> int:
        """Nodes of every graph."""
        return 2 * (self.hops + 1) + self.extra_nodes

    @property
    def num_edges(self) -> int:
        """Edges of every graph."""
        return 2 * self.hops + self.extra_nodes + self.second_parents

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Every symbol a question, step or answer can hold."""
        return graph_symbols(self.num_symbols or self.num_nodes)


E8 = SmallGraphConfig(extra_nodes=2, second_parents=0)
"""10 nodes, 8 edges: the warm-up on which edge following is learnt first."""

E12 = SmallGraphConfig(extra_nodes=4, second_parents=2)
"""12 nodes, 12 edges, 42-token prompt."""

E12_MATCHED = dataclasses.replace(E12, depth_matched=True)
"""E12 without the undirected shortcut."""

PRESETS: Mapping[str, SmallGraphConfig] = {"e8": E8, "e12": E12, "e12_matched": E12_MATCHED}


def generate(
    count: int,
    *,
    seed: int,
    start: int = 0,
    exclude: AbstractSet[str] = frozenset(),
    config: SmallGraphConfig | Mapping[str, Any] | str = E12_MATCHED,
) -> list[Example]:
    """Draws distinct questions in the symbol form of `coconut.tasks.graph_form`.

    Args:
      count: how many.
      seed: any integer; record ``i`` depends on the seed, the config and ``i`` only (see `draw_unique`).
      start: index of the first record; fresh graphs at step s are ``start=s * count``.
      exclude: `content_hash` of questions not to emit.
      config: a size, its fields as a mapping, or the name of one of `PRESETS`.

    Raises:
      CoconutError: for an unknown preset, a negative count, or a size with fewer than ``count`` distinct questions.
    """
    if isinstance(config, Mapping):
        fields = [field.name for field in dataclasses.fields(SmallGraphConfig)]
        if unknown := sorted(set(config) - set(fields)):
            raise CoconutError(f"unknown field {unknown[0]!r} of a small graph; there are {', '.join(fields)}")
        config = SmallGraphConfig(**config)
    elif isinstance(config, str):
        if config not in PRESETS:
            raise CoconutError(f"unknown small-graph preset {config!r}; there are {', '.join(PRESETS)}")
        config = PRESETS[config]
    draw = functools.partial(_draw, config=config)
    return draw_unique(draw, count, stream="small_graphs", seed=seed, start=start, exclude=exclude)


def _draw(rng: random.Random, config: SmallGraphConfig) -> Example:
    chain, num_nodes = config.hops + 1, config.num_nodes
    edges = _draw_edges(rng, config)
    rng.shuffle(edges)
    ids = list(range(num_nodes))
    rng.shuffle(ids)
    first, second = range(chain), range(chain, 2 * chain)
    path, other = (first, second) if rng.random() < 0.5 else (second, first)
    target, negative = ids[path[-1]], ids[other[-1]]
    graph = Graph(
        symbols=draw_symbols(rng, num_nodes, config.num_symbols or num_nodes),
        edges=tuple([(ids[parent], ids[child]) for parent, child in edges]),
        root=ids[path[0]],
        target=target,
        negative=negative,
    )
    candidates = (target, negative) if rng.random() < 0.5 else (negative, target)
    return symbol_example(graph, [ids[node] for node in path], candidates)


def _draw_edges(rng: random.Random, config: SmallGraphConfig) -> list[tuple[int, int]]:
    """Edges over unpermuted ids: chain one is ``0..hops``, chain two the next ``hops + 1``, then the extra nodes."""
    chain = config.hops + 1
    edges = [(node, node + 1) for node in range(2 * chain - 1) if node != config.hops]
    below = [1] * chain + [2] * chain  # bit 0: below the first root; bit 1: below the second
    twice = set(rng.sample(range(2 * chain, config.num_nodes), config.second_parents))
    # A link (depth d of one chain, depth d + 2 of the other) replaces two edges of the way down by two of its own, so
    # it makes the other chain's end exactly as far as the own one and never nearer.
    links = []
    if config.depth_matched:
        one_way, other_way = (int(rng.random() * (config.hops - 2)) for _ in range(2))
        links = [(one_way, chain + one_way + 2), (chain + other_way, other_way + 2)]
        hosts = [node for node in range(2 * chain) if node not in (config.hops, 2 * chain - 1)]
    else:
        hosts = list(range(2 * chain))
    for node in range(2 * chain, config.num_nodes):
        if node in twice and links:
            parents = links.pop()
        else:
            parent = hosts[int(rng.random() * len(hosts))]
            parents = (parent,)
            if node in twice:
                others = [
                    host for host in hosts if host != parent and (below[parent] == 3 or not below[host] & below[parent])
                ]
                parents = (parent, others[int(rng.random() * len(others))])
        label = 0
        for parent in parents:
            label |= below[parent]
            edges.append((parent, node))
        below.append(label)
        hosts.append(node)
    return edges
