"""What the benchmarks share: alternatives timed in turn, and the report.

Alternatives take turns within one process, so that whatever slows the machine down for a while slows all of them, and
ratios are taken within a round and only then summarised.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from coconut.provenance import provenance

Seconds = dict[str, np.ndarray]
"""Seconds of each variant, one number a round."""


def interleave(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    title: str = "",
    after_round: Callable[[Seconds], object] = lambda seconds: None,
) -> Seconds:
    """Times every variant once a round, after one round that is not counted.

    A variant is called twice in a row, and the second call is timed: outside of benchmarks a step follows its like, and
    does not find the memory and the caches that something else has left. Every second round runs backwards, so that no
    variant always follows the same other one.

    Args:
      variants: what to time; a call returns when its work is done.
      rounds: rounds that count.
      title: shown beside the progress, on standard error.
      after_round: is given what was timed so far after each round that counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)

    def counted() -> Seconds:
        return {name: np.asarray(values[1:]) for name, values in seconds.items()}

    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in range(rounds + 1):
            for name in reversed(names) if index % 2 else names:
                variants[name]()
                start = time.perf_counter()
                variants[name]()
                seconds[name].append(time.perf_counter() - start)
            gc.collect()
            print(f"{title} round {index}/{rounds}", file=sys.stderr, flush=True)
            if index:
                after_round(counted())
    finally:
        if collecting:
            gc.enable()
    return counted()


def summary(seconds: np.ndarray) -> dict[str, float]:
    """Median, quartiles and minimum of a variant's seconds."""
    lower, median, upper = np.quantile(seconds, [0.25, 0.5, 0.75])
    return {
        "median_seconds": float(median),
        "lower_quartile_seconds": float(lower),
        "upper_quartile_seconds": float(upper),
        "min_seconds": float(seconds.min()),
    }


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> dict[str, float]:
    """The ratio of two variants, round by round: ``ratio`` is the median over rounds, beside its quartiles."""
    return quartiles("ratio", numerator / denominator)


def quartiles(name: str, values: np.ndarray) -> dict[str, float]:
    """The median over rounds under ``name``, and its quartiles beside it."""
    lower, median, upper = np.quantile(values, [0.25, 0.5, 0.75])
    return {name: float(median), f"{name}_lower_quartile": float(lower), f"{name}_upper_quartile": float(upper)}


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--repeats", type=_positive, help="rounds that are counted")
    options.add_argument("--output", type=Path, help="a file the JSON object is written to, besides the last line")
    # Sizes that run in seconds and say nothing about speed: to check that the benchmark itself works.
    options.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    return options


def report(benchmark: str, cases: Mapping[str, Any], *, smoke: bool, output: Path | None) -> None:
    """Prints the result as one line of JSON, and writes it to ``output`` completely or not at all."""
    result = {"benchmark": benchmark, "provenance": provenance(), "cases": cases}
    if smoke:
        result["smoke"] = True
    line = json.dumps(result)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_name(f".{output.name}.{os.getpid()}")
        temporary.write_text(line + "\n", encoding="utf-8")
        temporary.replace(output)
    print(line, flush=True)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
