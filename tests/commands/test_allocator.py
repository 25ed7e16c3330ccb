"""Memory that is freed stays with a process that computes on its CPU."""

import subprocess
import sys
from pathlib import Path

import pytest

from coconut.commands.allocator import keep_freed_memory

FAULTS = """
import resource
import threading

import numpy as np

from coconut.commands.allocator import keep_freed_memory

if {asked}:
    assert keep_freed_memory({{"JAX_PLATFORMS": "cpu"}})

def take() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**24, np.float32)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = []
thread = threading.Thread(target=lambda: found.extend([take(), take(), take()]))
thread.start()
thread.join()
print(max(found[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
def test_pages_come_from_the_system_once() -> None:
    """64 MiB, taken three times by a thread, are 16,384 pages of 4 KiB each time, or 32 huge ones."""
    faults = {}
    for asked in (False, True):
        environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", FAULTS.format(asked=asked)]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        faults[asked] = int(found.stdout)
    assert faults[True] < 20 < faults[False]


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, []),
        ({"MALLOC_ARENA_MAX": "4", "JAX_PLATFORMS": "cpu"}, []),
        ({}, ["nvidiactl"]),
        ({"JAX_PLATFORMS": "cuda,cpu"}, ["nvidiactl"]),
        ({}, ["vfio/0"]),
    ],
)
def test_who_tunes_it_and_machines_with_accelerators_are_left_alone(
    environment: dict[str, str], devices: list[str], tmp_path: Path
) -> None:
    for name in devices:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert not keep_freed_memory(environment, tmp_path)
