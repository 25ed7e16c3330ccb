"""The benchmark of kernels, case by case: the marks the project has set itself first, then the shapes it runs at."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks import kernels
from experiments.benchmarks.kernel_cases import CASES, SMOKE
from experiments.on_gpu.record import Measurement, Progress

ROUNDS = 8
ORDER = (
    ("flash_attention", "target, forward", "bfloat16"),
    ("flash_attention", "target, backward", "bfloat16"),
    ("decode_attention", "target", "bfloat16"),
    ("linear_cross_entropy", "target", "bfloat16"),
    ("flash_attention", "GPT-2 small on questions, forward", "bfloat16"),
    ("flash_attention", "GPT-2 small on questions, backward", "bfloat16"),
    ("decode_attention", "GPT-2 small on questions", "bfloat16"),
    ("linear_cross_entropy", "GPT-2 small on questions", "bfloat16"),
    ("flash_attention", "GPT-2 small, forward", "bfloat16"),
    ("flash_attention", "GPT-2 small, backward", "bfloat16"),
    ("flash_attention", "long, forward", "bfloat16"),
    ("flash_attention", "long, backward", "bfloat16"),
    ("flash_attention", "GPT-2 small on questions, forward", "float32"),
    ("flash_attention", "GPT-2 small on questions, backward", "float32"),
    ("decode_attention", "GPT-2 small on questions", "float32"),
    ("linear_cross_entropy", "GPT-2 small on questions", "float32"),
    ("flash_attention", "target, forward", "float32"),
    ("flash_attention", "target, backward", "float32"),
    ("flash_attention", "ProsQA's prompts, forward", "bfloat16"),
    ("flash_attention", "ProsQA's prompts, backward", "bfloat16"),
)


def measurements(*, smoke: bool, work: Path) -> Mapping[str, Measurement]:
    """A measurement for each op, case and dtype."""
    del work
    cases = [(op, name, "float32") for op, names in SMOKE.items() for name in names] if smoke else ORDER
    return {
        f"{op}, {name}, {dtype}": functools.partial(measure, op, name, dtype, smoke=smoke) for op, name, dtype in cases
    }


def measure(op: str, name: str, dtype: str, progress: Progress, *, smoke: bool) -> dict[str, Any]:
    """One case of `experiments.benchmarks.kernels`."""
    del progress
    make = (SMOKE if smoke else CASES)[op][name]
    implementations = kernels.OURS[jax.default_backend()]
    title = f"{op}, {name}, {dtype}"
    result, unit = kernels.measure_case(make, dtype, implementations, 2 if smoke else ROUNDS, title=title, smoke=smoke)
    print(kernels.describe(result, unit), flush=True)
    return result
