"""ProsQA questions whose two options look alike from everywhere but along the arrows.

In the released files simple rules find the answer without any search (`coconut.tasks.shortcuts`). Here

- target and negative are leaves at the same depth, each below its own root alone, and the root asked about is a coin
  flip: a rule that does not look at the root is right half the time, by construction;
- from either root, both are equally far where the direction of edges is ignored, so nearness to the root ties. A few
  cross links, from below one root to below the other, see to that. They keep the graph acyclic, add no person, leave
  both options leaves, and make neither reachable from the other's root.

The number of hops is drawn from the released files' distribution first, then graphs are drawn until one has a pair of
such leaves and a choice of links.
"""

import math
import random
from collections.abc import Callable, Iterator
from itertools import product

from coconut.tasks.graphs import adjacency, hops_from
from coconut.tasks.recipe import Choice, Draft, Recipe

HOPS_SHARES = {3: 0.41, 4: 0.42, 5: 0.14, 6: 0.03}
"""Shares of shortest-path lengths in the released files."""

MAX_EXTENSION = 2
"""Edges by which a leaf may be moved down, to come to the depth of the one it is paired with."""

MAX_FIRST_LINKS = 8
"""Links tried as the first of a pair, before the graph is given up."""

Edge = tuple[int, int]


def chooser(rng: random.Random, recipe: Recipe) -> Callable[[random.Random, Draft, Recipe], Choice | None]:
    """Fixes the number of hops, so that rejecting graphs cannot shift its distribution, and returns the choice."""
    lengths = range(recipe.min_hops, recipe.max_hops + 1)
    shares = [HOPS_SHARES.get(length, 0) for length in lengths]
    [hops] = rng.choices(lengths, shares if any(shares) else None)

    def choose(rng: random.Random, draft: Draft, recipe: Recipe) -> Choice | None:
        edges, ends = draft.edges.copy(), []
        num_nodes = len(draft.below)
        for side in (1, 2):
            leaves = [leaf for leaf in draft.leaves(side) if hops - MAX_EXTENSION <= draft.depth[leaf] <= hops]
            if not leaves:
                return None
            deepest = max(draft.depth[leaf] for leaf in leaves)
            end = rng.choice([leaf for leaf in leaves if draft.depth[leaf] == deepest])
            for _ in range(hops - deepest):
                edges.append((end, num_nodes))
                end, num_nodes = num_nodes, num_nodes + 1
            ends.append(end)
        linked = _link(rng, num_nodes, edges, (ends[0], ends[1]))
        if linked is None or not is_matched(num_nodes, linked, (0, 1), (ends[0], ends[1])):
            return None
        root = int(rng.random() < 0.5)
        return Choice(linked, root, ends[root], ends[1 - root])

    return choose


def is_matched(num_nodes: int, edges: list[Edge], roots: Edge, ends: Edge) -> bool:
    """Whether two options are depth-matched: what every emitted question satisfies.

    Args:
      num_nodes: node ids are below this.
      edges: ``(parent, child)`` pairs.
      roots: the two roots.
      ends: the option below the first root, and the one below the second.
    """
    children = adjacency(num_nodes, edges)
    both_ways = adjacency(num_nodes, edges, "both")
    down = [hops_from(children, root) for root in roots]
    around = [hops_from(both_ways, root) for root in roots]
    return (
        len(set(edges)) == len(edges)
        and not any(children[end] for end in ends)
        and ends[1] not in down[0]
        and ends[0] not in down[1]
        and down[0].get(ends[0], -1) == down[1].get(ends[1], -2)
        and all(hops.get(ends[0]) == hops.get(ends[1]) for hops in around)
    )


def _link(rng: random.Random, num_nodes: int, edges: list[Edge], ends: Edge) -> list[Edge] | None:
    """The edges with at most two cross links that tie the undirected distances; ``None`` where none were found."""
    around = _Around(num_nodes, edges, ends)
    untied = [root for root in rng.sample((0, 1), 2) if not around.tied(root)]
    if not untied:
        return edges
    candidates = [link for link in _possible_links(num_nodes, edges, ends) if around.tied(untied[0], link)]
    rng.shuffle(candidates)
    if len(untied) == 2:
        for link in candidates[:MAX_FIRST_LINKS]:
            linked = [*edges, link]
            around = _Around(num_nodes, linked, ends)
            if around.tied(untied[1]):
                return linked
            both = [
                link
                for link in _possible_links(num_nodes, linked, ends)
                if around.tied(0, link) and around.tied(1, link)
            ]
            if both:
                return [*linked, rng.choice(both)]
        return None
    candidates = [link for link in candidates if around.tied(1 - untied[0], link)]
    return [*edges, candidates[0]] if candidates else None


def _possible_links(num_nodes: int, edges: list[Edge], ends: Edge) -> Iterator[Edge]:
    """New edges from a node below one root alone, no leaf, to a node below the other that does not lead to its option.

    Whatever leads to such a parent lies off the other side, so no cycle can arise.
    """
    children = adjacency(num_nodes, edges)
    parents = adjacency(num_nodes, edges, "up")
    down = [hops_from(children, root) for root in (0, 1)]
    for side, end in enumerate(ends):
        leading = hops_from(parents, end)
        hosts = [node for node in down[1 - side] if node not in down[side] and children[node]]
        guests = [node for node in down[side] if node not in leading]
        yield from ((host, guest) for host, guest in product(hosts, guests) if guest not in children[host])


class _Around:
    """Undirected distances from both roots and both ends, and what they become with one more edge."""

    def __init__(self, num_nodes: int, edges: list[Edge], ends: Edge):
        neighbors = adjacency(num_nodes, edges, "both")
        self.ends = ends
        self.from_root = [hops_from(neighbors, root) for root in (0, 1)]
        self.from_end = [hops_from(neighbors, end) for end in ends]

    def tied(self, root: int, link: Edge | None = None) -> bool:
        """Whether both ends are equally far from a root (with ``link`` added), and not out of reach."""
        near = self.from_root[root]
        lengths = []
        for end, near_end in zip(self.ends, self.from_end, strict=True):
            length = near.get(end, math.inf)
            if link is not None:
                for here, there in (link, link[::-1]):
                    length = min(length, near.get(here, math.inf) + 1 + near_end.get(there, math.inf))
            lengths.append(length)
        return lengths[0] == lengths[1] < math.inf
