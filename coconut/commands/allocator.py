"""Memory that XLA frees on a CPU stays with the process, so that the next step need not ask the system for it again."""

import ctypes
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

LOG = logging.getLogger(__name__)

# The numbers of `mallopt`'s options in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_LARGEST = 2**31 - 1
_ACCELERATORS = ("nvidiactl", "accel0", "vfio/0", "kfd")
"""What a driver puts under /dev."""


def keep_freed_memory(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> bool:
    """Tells glibc to give nothing back to the system; before JAX starts threads, and on a machine that runs on its CPU.

    XLA takes its scratch memory anew in each step. What is larger than 32 MiB glibc takes from the system and gives
    back each time, and each page of it costs a fault and is filled with zeros.

    Args:
      environment: of this process. Who tunes glibc's malloc there is left alone.
      devices: the folder of the machine's devices.

    Returns:
      Whether it was told: not where an accelerator is used, and not by other C libraries.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in environment):
        return False
    if environment.get("JAX_PLATFORMS", "") != "cpu" and any((devices / name).exists() for name in _ACCELERATORS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # In arenas of their own, threads would be given at most 64 MiB that stay.
    options = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: _LARGEST}
    told = mallopt is not None and all(mallopt(option, value) for option, value in options.items())
    LOG.debug("memory that is freed %s", "stays" if told else "may go back to the system")
    return told
