"""The real TPU compiler takes every kernel, on every generation."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.benchmarks import tpu_compile


@pytest.mark.slow
def test_kernels_compile() -> None:
    pytest.importorskip("libtpu")
    # Sizes that are no multiple of anything find what a compiler has to object to. The large ones take minutes and are
    # in experiments/results/benchmarks. A process of its own, since the compiler holds on to the one it runs in.
    child = subprocess.run(
        [sys.executable, "-m", "experiments.benchmarks.tpu_compile", "--case", "odd sizes"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    generations = json.loads(child.stdout.splitlines()[-1])["cases"]
    for generation in tpu_compile.TOPOLOGIES:
        assert generations[generation].keys() == tpu_compile.CASES.keys()
        for case in generations[generation].values():
            for found in case.values():
                assert all(0 < size < 48 * 2**20 for size in found["vmem_bytes"])


def test_what_the_compiler_does_not_tell_is_no_number() -> None:
    with pytest.raises(ValueError, match="no kernel"):
        tpu_compile.kernel_memory("ROOT %add = f32[] add(%a, %b)")
