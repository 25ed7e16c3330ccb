"""What a chip can do at most, by its maker, and slices of chips that the TPU compiler can compile for without them."""

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
      closes: a dimension of so many chips, or a multiple of it, is a ring; a shorter one is a line.
    """

    name: str
    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
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
                closes=4,
            ),
            Chip(
                name="v5e",
                flops=197e12,
                memory=16 * 2**30,
                memory_bandwidth=819e9,
                link_bandwidth=50e9,
                closes=16,
            ),
            Chip(
                name="v5p",
                flops=459e12,
                memory=95e9,
                memory_bandwidth=2765e9,
                link_bandwidth=100e9,
                closes=4,
            ),
            Chip(
                name="v6e",
                flops=918e12,
                memory=32 * 2**30,
                memory_bandwidth=1640e9,
                link_bandwidth=100e9,
                closes=16,
            ),
            Chip(
                name="tpu7x",
                flops=2307e12,
                memory=192 * 2**30,
                memory_bandwidth=7380e9,
                link_bandwidth=100e9,
                closes=4,
            ),
        )
    }
)

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


@dataclasses.dataclass(frozen=True)
class Slice:
    """Devices to plan for.

    Attributes:
      name: such as ``v5p:4x4x4``, or `HERE`.
      chip: each chip's figures.
      shape: of the torus.
      devices: to compile for: there, or abstract.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    devices: tuple[Any, ...]

    def closes(self, size: int) -> bool:
        """Whether a dimension of the torus of so many chips is a ring."""
        return size % self.chip.closes == 0


def make_slice(topology: str) -> Slice:
    """The slice of a topology name.

    Args:
      topology: ``CHIP:AxB`` or ``CHIP:AxBxC``, or `HERE` for the devices at hand, whose figures are measured.

    Raises:
      CoconutError: the name or its chip is unknown (the message lists those known), libtpu is missing, or the compiler
        refuses the topology.
    """
    if topology == HERE:
        return Slice(HERE, measured_chip(), (len(jax.devices()),), tuple(jax.devices()))
    name, colon, shape = topology.partition(":")
    known = f"known are {', '.join(TOPOLOGIES)} (and others of these chips), and {HERE!r}"
    if name not in CHIPS or not colon or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise CoconutError(f"topology {topology!r} is unknown; {known}")
    if importlib.util.find_spec("libtpu") is None:
        raise CoconutError(
            f"topology {topology}: the TPU compiler is missing; `pip install coconut-jax[tpu]` brings libtpu, on Linux "
            "machines without a TPU, too"
        )
    # Nothing is run on a TPU, so several processes may load the compiler, and none asks where it is.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # Of libtpu or of JAX, which raises whatever its plugin gave.
        raise CoconutError(f"topology {topology!r}: the TPU compiler refuses it ({error}); {known}") from error
    sizes, chip = tuple(map(int, shape.split("x"))), CHIPS[name]
    cores = len(devices) // math.prod(sizes)
    # Two devices of a tpu7x are one chip and share what it has.
    shared = ("flops", "memory", "memory_bandwidth", "link_bandwidth")
    share = dataclasses.replace(chip, **{field: getattr(chip, field) / cores for field in shared})
    return Slice(topology, share, sizes, tuple(devices))


def measured_chip(seconds: float = 0.2) -> Chip:
    """The figures of the first device at hand: its fastest float32 or bfloat16 matrix product, and its fastest copy.

    Args:
      seconds: time spent on each measurement.
    """
    device = jax.devices()[0]
    size = 1024 if device.platform == "cpu" else 8192
    rate = 0.0
    for dtype in (jnp.float32, jnp.bfloat16):
        matrix = jnp.ones((size, size), dtype)
        rate = max(rate, 2 * size**3 / _fastest(jax.jit(jnp.matmul), (matrix, matrix), seconds))
    array = jnp.ones(2**26, jnp.float32)
    copied = 2 * array.nbytes / _fastest(jax.jit(lambda x: x + 1), (array,), seconds)
    statistics = device.memory_stats() or {}
    memory = statistics.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Devices of one host share its memory and its processor.
    count = len(jax.devices()) if device.platform == "cpu" else 1
    return Chip(
        name=device.device_kind,
        flops=rate / count,
        memory=memory / count,
        memory_bandwidth=copied / count,
        link_bandwidth=copied / count,
        closes=1,
    )


def _fastest(function: Any, arguments: tuple[Any, ...], seconds: float) -> float:
    jax.block_until_ready(function(*arguments))
    times, until = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < until:
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - started)
    return float(np.min(times))
