"""What the benchmarks share: alternatives timed in turn, and the report.

Alternatives take turns within one process, so that whatever slows the machine down for a while slows all of them, and
ratios are taken within a round and only then summarised.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from coconut.provenance import provenance
from coconut.storage import write_atomically

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


class Report:
    """What a benchmark has found, written to its file after each case: one that is stopped keeps what it measured.

    Until `finish` the file says ``"unfinished": true``.

    Attributes:
      cases: what was found, by case.
    """

    def __init__(self, benchmark: str, options: argparse.Namespace) -> None:
        """``options`` are those of a `parser`."""
        self.cases: dict[str, Any] = {}
        self._output: Path | None = options.output
        self._head: dict[str, Any] | None = None
        self._benchmark, self._smoke = benchmark, options.smoke

    def add(self, name: str, case: Any) -> None:
        """Adds a case, or replaces it, and writes the file."""
        self.cases[name] = case
        self._write({"unfinished": True})

    def finish(self) -> None:
        """Writes the file, and prints the result as one line of JSON."""
        print(self._write({}), flush=True)

    def _write(self, more: dict[str, Any]) -> str:
        if self._head is None:  # It looks for devices, which a benchmark's own processes may need first.
            self._head = {"benchmark": self._benchmark, "provenance": provenance()}
            self._head |= {"smoke": True} if self._smoke else {}
        line = json.dumps({**self._head, **more, "cases": self.cases})
        if self._output is not None:
            self._output.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._output, line + "\n")
        return line


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
