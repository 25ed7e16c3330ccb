"""ProsQA questions whose two options differ in nothing but where the arrows lead.

In the released files simple rules find the answer without a search (`coconut.tasks.shortcuts`), and it does not help to
match a few of them: with equal depths and equal undirected distances, the option a random walk from the root visits
more often was still right in 88 % of the graphs we tried. So the two options here are twins:

1. Draw half a graph by the recipe, with a leaf (the end) at depth d below one root alone.
2. Point its edges anew, along a random search from both roots, until the end lies at depth d below the other root
   alone.
3. Hang both versions on the same two roots. Their ends are target and negative; the root asked about is a coin flip.

A rule blind to directions sees two copies of one graph and can only guess; so does a rule blind to the root. What is
left is to follow the arrows from the root.

The number of hops is drawn from the released files' distribution first, and ends that are up to two hops short are
moved down by a chain, in both versions. Means (standard deviations) over 4,000 questions, with the released validation
and test splits in brackets: nodes 23.2 (2.3) [22.8 (2.0)], edges 37.2 (7.0) [36.1 (5.7)], persons 2.6 [2.5], hops 3.79
[3.77], shortest paths 1.2 [1.6], leaves 8.1 [7.4], words 182 [179]. What differs by design: 6.0 nodes lie below both
roots instead of 1.3, and the negative is as deep as the target (3.8 hops below its root, not 2.1).
"""

import random
from collections.abc import Sequence

from coconut.errors import CoconutError
from coconut.tasks.graphs import adjacency, hops_from
from coconut.tasks.recipe import MAX_NODES, Choice, Draft, Recipe

HALF_RECIPE = Recipe(nodes=13, mean_parents=1.8, first_share=0.1, second_share=0.1, depth_weight=3.0)
"""The half graph whose double is about as large as a released graph."""

HOPS_SHARES = {3: 0.41, 4: 0.42, 5: 0.14, 6: 0.03}
"""Shares of shortest-path lengths in the released files; other lengths are drawn only where none of these may be."""

MAX_EXTENSION = 2
"""Edges by which an end may be moved down."""

MAX_TURNS = 30
"""Directions tried for one half graph before another is drawn."""

Edge = tuple[int, int]


def require_room(recipe: Recipe) -> None:
    """Checks that the double of a recipe's graph has names enough for its nodes.

    Raises:
      CoconutError: naming the number of nodes that is too large.
    """
    largest = 2 * (recipe.nodes - 2) + 2 + 2 * MAX_EXTENSION
    if largest > MAX_NODES:
        raise CoconutError(
            f"depth-matched graphs are two copies of the recipe's: nodes={recipe.nodes} gives up to {largest} nodes, "
            f"more than {MAX_NODES}"
        )


def draw_hops(rng: random.Random, recipe: Recipe) -> int:
    """Draws the distance from root to target: before any graph, so that rejected graphs cannot shift it."""
    lengths = range(recipe.min_hops, recipe.max_hops + 1)
    shares = [HOPS_SHARES.get(length, 0) for length in lengths]
    return rng.choices(lengths, shares if any(shares) else None)[0]


def choose(rng: random.Random, draft: Draft, hops: int) -> Choice | None:
    """Doubles a half graph into a question of ``hops`` hops; ``None`` where it has no end to suit."""
    num_nodes = len(draft.below)
    # Ends by depth, each with its own root; the root it is not below must be near enough to take its place.
    fitting: dict[int, list[tuple[int, int]]] = {}
    neighbors: list[list[int]] = []
    for own in (0, 1):
        leaves = [leaf for leaf in draft.leaves(own + 1) if hops - MAX_EXTENSION <= draft.depth[leaf] <= hops]
        if leaves:
            neighbors = neighbors or adjacency(num_nodes, draft.edges, "both")
            around_other = hops_from(neighbors, 1 - own)
            for leaf in leaves:
                if around_other.get(leaf, hops + 1) <= draft.depth[leaf]:
                    fitting.setdefault(draft.depth[leaf], []).append((leaf, own))
    if not fitting:
        return None
    depth = max(fitting)
    end, own = rng.choice(fitting[depth])
    turned = _turn(rng, draft.edges, neighbors, own, end, depth)
    if turned is None:
        return None
    twin = [node if node < 2 else num_nodes + node for node in range(num_nodes)]
    edges = draft.edges + [(twin[parent], twin[child]) for parent, child in turned]
    ends = [end, twin[end]]
    num_nodes *= 2
    for _ in range(hops - depth):
        edges += [(ends[0], num_nodes), (ends[1], num_nodes + 1)]
        ends = [num_nodes, num_nodes + 1]
        num_nodes += 2
    roots = [own, 1 - own]
    if not is_matched(num_nodes, edges, roots, ends):
        return None
    asked = int(rng.random() < 0.5)
    return Choice(edges, roots[asked], ends[asked], ends[1 - asked])


def is_matched(num_nodes: int, edges: Sequence[Edge], roots: Sequence[int], ends: Sequence[int]) -> bool:
    """Whether two leaves are depth-matched; every emitted question passes.

    Args:
      num_nodes: node ids are below this.
      edges: ``(parent, child)`` pairs.
      roots: the two roots.
      ends: the option below the first root alone, and the one below the second alone.
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


def _turn(
    rng: random.Random, edges: list[Edge], neighbors: list[list[int]], own: int, end: int, depth: int
) -> list[Edge] | None:
    """Points the edges so that ``end`` is ``depth`` below the other root and not below its own."""
    for _ in range(MAX_TURNS):
        rank = {node: place for place, node in enumerate(_search_order(rng, neighbors, end))}
        turned = [(first, second) if rank[first] < rank[second] else (second, first) for first, second in edges]
        children = adjacency(len(neighbors), turned)
        if hops_from(children, 1 - own).get(end) == depth and end not in hops_from(children, own):
            return turned
    return None


def _search_order(rng: random.Random, neighbors: list[list[int]], end: int) -> list[int]:
    """The order of a random search from both roots, ``end`` last.

    Every node found has an earlier neighbor, so that no new person arises; what cannot be found keeps its order.
    """
    order, waiting, seen = [], [0, 1], {0, 1, end}
    while waiting:
        node = waiting.pop(int(rng.random() * len(waiting)) if len(order) > 1 else 0)  # the roots first
        order.append(node)
        new = [neighbor for neighbor in neighbors[node] if neighbor not in seen]
        waiting += new
        seen.update(new)
    return [*order, *(node for node in range(len(neighbors)) if node not in seen), end]
