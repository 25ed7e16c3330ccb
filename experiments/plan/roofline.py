"""How long a step takes at least: its arithmetic, its memory traffic and its collectives at a chip's peak figures."""

import dataclasses
from collections.abc import Sequence

from experiments.plan.collectives import Collective
from experiments.plan.hardware import Chip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds a step spends on each resource of a chip, if it used it at its peak.

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
        """Seconds of a step whose arithmetic, memory traffic and collectives all overlap."""
        return max(self.compute, self.memory, self.interconnect)

    @property
    def expected(self) -> float:
        """Seconds of a step whose collectives wait for its arithmetic and the other way round: nothing hides them."""
        return max(self.compute, self.memory) + self.interconnect

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(("compute", "memory", "interconnect"), key=lambda name: getattr(self, name))


def collective_seconds(collective: Collective, chip: Chip) -> float:
    """Seconds of all runs of one collective.

    In a ring of ``n`` chips each sends ``(n - 1) / n`` of the whole array on in an all-gather, as much in a
    reduce-scatter, both in an all-reduce; half of each goes either way round, over two links. A group that spans
    several dimensions of the torus uses the links of one here, so the estimate is on the slow side for it.

    Args:
      collective: of one device; its ``bytes`` are those of its results.
      chip: whose links.
    """
    n = collective.group
    if n == 1 or not chip.link_bandwidth:
        return 0.0
    share = (n - 1) / n if n else 1.0
    # A reduce-scatter's result is one shard, an all-gather's the whole.
    sent = {
        "all-gather": collective.bytes * share,
        "reduce-scatter": collective.bytes * max(n - 1, 1),
        "all-reduce": 2 * collective.bytes * share,
        "all-to-all": collective.bytes * share / 2,
        "collective-permute": 2 * collective.bytes,  # One way only.
    }[collective.kind]
    return collective.times * sent / (2 * chip.link_bandwidth)


def roofline(*, flops: float, traffic: float, collectives: Sequence[Collective], chip: Chip) -> Roofline:
    """The roofline of a program.

    Args:
      flops: floating point operations on each chip.
      traffic: bytes each chip reads from and writes to its memory.
      collectives: of each chip.
      chip: its peaks.
    """
    return Roofline(
        compute=flops / chip.flops,
        memory=traffic / chip.memory_bandwidth,
        interconnect=sum(collective_seconds(collective, chip) for collective in collectives),
    )
