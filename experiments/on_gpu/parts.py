"""The parts, in order of worth, and how long each may take."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path

from experiments.on_gpu.record import Measurement


@dataclasses.dataclass(frozen=True)
class Part:
    """One file of results.

    Attributes:
      what: what it measures.
      seconds: after which it is stopped.
      xla_flags: what XLA is told, unless the user says something else.
    """

    what: str
    seconds: float
    xla_flags: str = ""


WITHOUT_TRITON = "--xla_gpu_enable_triton_gemm=false"
"""XLA then tries no products of Triton's for each of a hundred shapes.

On an H100 no step of 12 layers, one by one, was compiled within 150 s; with this and layers scanned it took 16 s. How
much of it is due to which was not measured.
"""


PARTS = {
    "kernel_tests": Part("tests of the kernels: values, gradients, and results that repeat", 80),
    "kernels": Part("time and memory of the kernels against XLA, cuDNN and PyTorch", 90),
    "training_step": Part(
        "a step with thoughts against plain steps and loops of thoughts in PyTorch", 150, WITHOUT_TRITON
    ),
    "generation": Part("generation with thoughts against Hugging Face's without", 60, WITHOUT_TRITON),
    "superposition": Part("superposition.gin: Coconut, CoT and No-CoT", 60, WITHOUT_TRITON),
    "memory": Part("memory of GPT-2 medium and large with thoughts", 40, WITHOUT_TRITON),
    "quickstart": Part("the table of the quickstart", 60, WITHOUT_TRITON),
}


def measurements(part: str, *, smoke: bool, work: Path) -> Mapping[str, Measurement]:
    """What a part measures, by name.

    Args:
      part: its name.
      smoke: tiny sizes that say nothing about speed.
      work: a folder for what runs write besides numbers.
    """
    make: Callable[..., Mapping[str, Measurement]] = importlib.import_module(f"experiments.on_gpu.{part}").measurements
    return make(smoke=smoke, work=work)
