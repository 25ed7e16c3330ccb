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
    """

    what: str
    seconds: float


PARTS = {
    "kernel_tests": Part("tests of the kernels: values, gradients, and results that repeat", 60),
    "kernels": Part("time and memory of the kernels against XLA, cuDNN and PyTorch", 90),
    "training_step": Part("a step with thoughts against plain steps and loops of thoughts in PyTorch", 150),
    "generation": Part("generation with thoughts against Hugging Face's without", 60),
    "superposition": Part("superposition.gin: Coconut, CoT and No-CoT", 60),
    "memory": Part("memory of GPT-2 medium and large with thoughts", 40),
    "quickstart": Part("the table of the quickstart", 60),
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
