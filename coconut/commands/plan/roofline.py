"""How long a program takes at least: arithmetic, memory traffic and collectives at a chip's peak figures."""

import dataclasses
from collections.abc import Sequence

from coconut.commands.plan.collectives import Collective
from coconut.commands.plan.hardware import Slice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds a program spends on each resource of a chip, if it used it at its peak.

    Attributes:
      compute: matrix products.
      memory: reading and writing main memory.
      interconnect: collectives.
    """

    compute: float
    memory: float
    interconnect: float

    @property
    def fastest(self) -> float:
        """Seconds of a program whose arithmetic, memory traffic and collectives all overlap."""
        return max(self.compute, self.memory, self.interconnect)

    @property
    def expected(self) -> float:
        """Seconds of one whose collectives wait for its arithmetic and the other way round: nothing hides them."""
        return max(self.compute, self.memory) + self.interconnect

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(("compute", "memory", "interconnect"), key=lambda name: getattr(self, name))


def collective_seconds(collective: Collective, where: Slice) -> float:
    """Seconds of all runs of one collective.

    In a ring of ``n`` chips each sends ``(n - 1) / n`` of the whole array on in an all-gather, as much in a
    reduce-scatter, both in an all-reduce; half of each goes either way round, over two links. In a line, which does not
    close, what passes its middle takes twice as long. Several dimensions of the torus work at once, each on its part:
    as many as the compiler says, else the fewest that hold the group.

    Args:
      collective: of one device; its ``bytes`` are those of its results.
      where: whose links.
    """
    n = collective.group
    bandwidth = where.chip.link_bandwidth
    if n == 1 or not bandwidth:
        return 0.0
    if collective.kind == "collective-permute":
        return collective.times * collective.bytes / bandwidth  # To one neighbour, over one link.
    share = (n - 1) / n if n else 1.0
    # A reduce-scatter's result is one shard, an all-gather's the whole.
    sent = {
        "all-gather": collective.bytes * share,
        "reduce-scatter": collective.bytes * max(n - 1, 1),
        "all-reduce": 2 * collective.bytes * share,
        "all-to-all": collective.bytes * share / 2,
    }[collective.kind]
    return collective.times * sent / (links(where, n, collective.dimensions) * bandwidth)


def links(where: Slice, group: int, dimensions: int = 0) -> int:
    """Links of a chip that a collective keeps busy.

    Args:
      where: the slice.
      group: chips that take part together; 0 for all.
      dimensions: of the torus, where the compiler says how many it uses.
    """
    sizes = sorted((size for size in where.shape if size > 1), reverse=True)
    if not dimensions:
        held = 1
        while dimensions < len(sizes) and (held < group or not group):
            held *= sizes[dimensions]
            dimensions += 1
    used = sizes[: max(dimensions, 1)]
    return sum(2 if where.closes(size) else 1 for size in used) or 1


def roofline(*, flops: float, traffic: float, collectives: Sequence[Collective], where: Slice) -> Roofline:
    """The roofline of a program.

    Args:
      flops: floating point operations on each chip.
      traffic: bytes each chip reads from and writes to its memory.
      collectives: of each chip.
      where: the chips and their peaks.
    """
    return Roofline(
        compute=flops / where.chip.flops,
        memory=traffic / where.chip.memory_bandwidth,
        interconnect=sum(collective_seconds(collective, where) for collective in collectives),
    )
