"""The random graphs of ProsQA, and which question is asked of one (`coconut.tasks.prosqa` words it)."""

import dataclasses
import math
import random
from typing import NamedTuple

from coconut.errors import CoconutError

MAX_NODES = 35
"""Nodes a recipe may draw; with the five marks of the symbol form, Reasoning by Superposition's 40-entry vocabulary."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the random graph depends on.

    Attributes:
      nodes: nodes drawn, before isolated ones go.
      mean_parents: mean of the Poisson number of parents.
      first_share: chance that a node's parents are sought below root 0 only.
      second_share: otherwise, chance that they are sought below root 1 only; the rest seek among all nodes.
      depth_weight: below a single root, a parent at depth d has weight ``1 + depth_weight * d``.
      min_hops: least distance from root to target.
      max_hops: largest distance from root to target.

    Raises:
      CoconutError: naming the value that cannot be.
    """

    nodes: int = 28
    mean_parents: float = 1.5
    first_share: float = 0.35
    second_share: float = 0.70
    depth_weight: float = 1.5
    min_hops: int = 3
    max_hops: int = 6

    def __post_init__(self) -> None:
        if not 4 <= self.nodes <= MAX_NODES:
            raise CoconutError(f"nodes must lie in 4..{MAX_NODES}, got {self.nodes}")
        if not 0 < self.mean_parents < self.nodes:
            raise CoconutError(f"mean_parents must lie between 0 and nodes={self.nodes}, got {self.mean_parents}")
        for name in ("first_share", "second_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise CoconutError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        if not 0 <= self.depth_weight < math.inf:
            raise CoconutError(f"depth_weight must be finite and not negative, got {self.depth_weight}")
        if not 1 <= self.min_hops <= self.max_hops:
            raise CoconutError(f"hops must satisfy 1 <= min <= max, got {self.min_hops}..{self.max_hops}")


class Draft(NamedTuple):
    """A graph before relabelling; the roots are nodes 0 and 1, and every edge goes from a smaller to a larger node.

    Attributes:
      edges: ``(parent, child)`` pairs.
      below: for each node, bit 0 where it lies below root 0 (or is it), bit 1 likewise for root 1.
      depth: for each node below a root, hops from the nearest root; 0 otherwise.
    """

    edges: list[tuple[int, int]]
    below: list[int]
    depth: list[int]

    def leaves(self, side: int) -> list[int]:
        """The childless nodes whose ``below`` is exactly ``side``."""
        parents = {parent for parent, _ in self.edges}
        return [node for node, below in enumerate(self.below) if below == side and node not in parents]


class Choice(NamedTuple):
    """What is asked of a draft: its edges, and the roles of four of its nodes."""

    edges: list[tuple[int, int]]
    root: int
    target: int
    negative: int


def draw_draft(rng: random.Random, recipe: Recipe) -> Draft | None:
    """Draws a graph; ``None`` where a root is left without children."""
    edges: list[tuple[int, int]] = []
    below, depth = [1, 2], [0, 0]
    everyone, weight = [0, 1], [1.0, 1.0]
    side: dict[int, list[int]] = {0: [], 1: [0], 2: [1], 3: []}
    no_parent = math.exp(-recipe.mean_parents)
    for node in range(2, recipe.nodes):
        num_parents, product = 0, rng.random()
        while product > no_parent:  # Knuth's Poisson: uniforms multiplied until their product is below exp(-mean)
            num_parents, product = num_parents + 1, product * rng.random()
        if rng.random() <= recipe.first_share:
            hosts = side[1]
        elif rng.random() <= recipe.second_share:
            hosts = side[2]
        else:
            hosts = everyone
        # An exponential race: the first to arrive are a weighted draw without replacement.
        arrival = {host: rng.expovariate(weight[host]) for host in hosts} if num_parents else {}
        parents = sorted(arrival, key=arrival.__getitem__)[:num_parents]
        edges += [(parent, node) for parent in parents]
        label = 0
        for parent in parents:
            label |= below[parent]
        below.append(label)
        depth.append(1 + min(depth[parent] for parent in parents if below[parent]) if label else 0)
        weight.append(1 + recipe.depth_weight * depth[node] if label in (1, 2) else 1.0)
        side[label].append(node)
        everyone.append(node)
    parents = {parent for parent, _ in edges}
    return Draft(edges, below, depth) if 0 in parents and 1 in parents else None


def choose_official(rng: random.Random, draft: Draft, recipe: Recipe) -> Choice | None:
    """Asks about the root with the deeper own leaf; ``None`` where that depth does not suit the recipe."""
    own_leaves = draft.leaves(1), draft.leaves(2)
    if not all(own_leaves):
        return None
    farthest = [max(draft.depth[leaf] for leaf in leaves) for leaves in own_leaves]
    root = int(rng.random() < 0.5) if farthest[0] == farthest[1] else int(farthest[1] > farthest[0])
    if not recipe.min_hops <= farthest[root] <= recipe.max_hops:
        return None
    target = rng.choice([leaf for leaf in own_leaves[root] if draft.depth[leaf] == farthest[root]])
    return Choice(draft.edges, root, target, rng.choice(own_leaves[1 - root]))
