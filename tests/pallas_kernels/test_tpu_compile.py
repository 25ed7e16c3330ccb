"""The real TPU compiler takes every kernel, on every generation."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.benchmarks import tpu_compile


# Sizes that are no multiple of anything find what a compiler has to object; the large ones are slow, and in the results.
@pytest.mark.parametrize("generation", tpu_compile.TOPOLOGIES)
def test_kernels_compile(generation: str) -> None:
    pytest.importorskip("libtpu")
    # In a process of its own, since it must know before it imports JAX that there is no TPU to look for.
    child = subprocess.run(
        [sys.executable, "-m", "experiments.benchmarks.tpu_compile", "--generation", generation, "--case", "odd sizes"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    cases = json.loads(child.stdout.splitlines()[-1])["cases"][generation]
    assert cases.keys() == tpu_compile.CASES.keys()
    for case in cases.values():
        for found in case.values():
            assert all(0 < size < 48 * 2**20 for size in found["vmem_bytes"])


def test_what_the_compiler_does_not_tell_is_no_number() -> None:
    with pytest.raises(ValueError, match="no kernel"):
        tpu_compile.kernel_memory("ROOT %add = f32[] add(%a, %b)")
