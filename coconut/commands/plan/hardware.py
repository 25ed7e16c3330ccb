"""Slices of chips that the TPU compiler can compile for without them, and what the machine at hand can do at most."""

import dataclasses
import importlib.util
import math
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coconut.commands.plan.chips import CHIPS, HERE, KINDS, KNOWN, Chip, read_topology
from coconut.errors import CoconutError


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
    chip, sizes = read_topology(topology)
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
        # By itself the compiler thinks of hosts of four chips.
        one = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sizes) == 1 else {}
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **one).devices
    except Exception as error:  # Of libtpu or of JAX, which raises whatever its plugin gave.
        raise CoconutError(f"topology {topology!r}: the TPU compiler refuses it ({error}); {KNOWN}") from error
    return _slice(topology, chip, sizes, devices)


def slice_of(devices: Sequence[Any]) -> Slice | None:
    """The slice that TPUs make up, by their kind and their places.

    None for other devices, unknown TPUs, several slices, and TPUs that fill no box.
    """
    if devices[0].platform != "tpu" or devices[0].device_kind not in KINDS:
        return None
    chip = CHIPS[KINDS[devices[0].device_kind]]
    places = np.asarray([device.coords[: chip.dimensions] for device in devices])
    sizes = tuple((places.max(0) - places.min(0) + 1).tolist())
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1 or len({(*place,) for place in places.tolist()}) != math.prod(sizes):
        return None
    return _slice(f"{chip.name}:{'x'.join(map(str, sizes))}", chip, sizes, devices)


def _slice(name: str, chip: Chip, sizes: tuple[int, ...], devices: Sequence[Any]) -> Slice:
    cores = len(devices) // math.prod(sizes)
    # Two devices of a tpu7x are one chip and share what it has.
    shared = ("flops", "memory", "memory_bandwidth", "link_bandwidth")
    share = dataclasses.replace(chip, **{field: getattr(chip, field) / cores for field in shared})
    return Slice(name, share, sizes, tuple(devices))


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
        dimensions=1,
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
