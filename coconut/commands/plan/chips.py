"""What a chip can do at most, by its maker, and the names of slices of chips."""

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType

from coconut.errors import CoconutError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Peak figures of one chip (or of one machine).

    Attributes:
      name: as in topology names.
      flops: bfloat16 floating point operations a second.
      memory: bytes of main memory.
      memory_bandwidth: bytes a second from or to it.
      link_bandwidth: bytes a second over one link in one direction; 0 where chips have none.
      dimensions: of the torus that links make.
      closes: a dimension of so many chips, or a multiple of it, is a ring; a shorter one is a line.
    """

    name: str
    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    dimensions: int
    closes: int


# From Google's pages on each system architecture (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x): peak
# compute in bfloat16, HBM and its bandwidth for each chip. Those pages give the interconnect of a chip in both
# directions over all its links: 400 GB/s over 4 (v5e), 1,200 over 6 (v5p, tpu7x), 800 over 4 (v6e); v4's 50 GB/s a link
# are those of Jouppi et al. 2023 (TPU v4, table 4). There, too: slices of whole cubes of 4 x 4 x 4 are tori,
# smaller ones meshes. On v5e and v6e a dimension closes with the 16 chips of a whole pod.
# Written down without those pages at hand: check a figure before you rest a decision on it.
CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        chip.name: chip
        for chip in (
            Chip(
                name="v4",
                flops=275e12,
                memory=32 * 2**30,
                memory_bandwidth=1228e9,
                link_bandwidth=50e9,
                dimensions=3,
                closes=4,
            ),
            Chip(
                name="v5e",
                flops=197e12,
                memory=16 * 2**30,
                memory_bandwidth=819e9,
                link_bandwidth=50e9,
                dimensions=2,
                closes=16,
            ),
            Chip(
                name="v5p",
                flops=459e12,
                memory=95e9,
                memory_bandwidth=2765e9,
                link_bandwidth=100e9,
                dimensions=3,
                closes=4,
            ),
            Chip(
                name="v6e",
                flops=918e12,
                memory=32 * 2**30,
                memory_bandwidth=1640e9,
                link_bandwidth=100e9,
                dimensions=2,
                closes=16,
            ),
            Chip(
                name="tpu7x",
                flops=2307e12,
                memory=192 * 2**30,
                memory_bandwidth=7380e9,
                link_bandwidth=100e9,
                dimensions=3,
                closes=4,
            ),
        )
    }
)

KINDS: Mapping[str, str] = MappingProxyType(
    {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}
)
"""What JAX calls a device -> the name of its chip."""

# Slices the compiler is known to take: it has no list of its own to ask for.
TOPOLOGIES = (
    *("v4:2x2x1", "v4:2x2x2", "v4:4x4x4"),
    *("v5e:1x1", "v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16"),
    *("v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4", "v5p:4x4x8", "v5p:8x8x8", "v5p:16x16x24"),
    *("v6e:1x1", "v6e:2x2", "v6e:2x4", "v6e:4x4", "v6e:4x8", "v6e:8x8", "v6e:16x16"),
    *("tpu7x:2x2x1", "tpu7x:2x2x2", "tpu7x:4x4x4"),
)

HERE = "here"
"""The topology that stands for the devices at hand."""

KNOWN = f"known are {', '.join(TOPOLOGIES)} (and others of these chips), and {HERE!r}"


def read_topology(topology: str) -> tuple[Chip, tuple[int, ...]]:
    """The chip that ``CHIP:AxB`` or ``CHIP:AxBxC`` names, and the sizes behind it.

    Raises:
      CoconutError: the name has another form, or its chip is unknown (the message lists those known).
    """
    name, colon, shape = topology.partition(":")
    if name not in CHIPS or not colon or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise CoconutError(f"topology {topology!r} is unknown; {KNOWN}")
    return CHIPS[name], tuple(map(int, shape.split("x")))
