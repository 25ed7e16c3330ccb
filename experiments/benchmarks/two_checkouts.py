"""A benchmark of two checkouts of this repository, side by side in one run: what a change costs.

    python -m experiments.benchmarks.two_checkouts --before ../before --benchmark latent_step --output FILE -- --case a

Each checkout has a process of its own, which runs its own `experiments.benchmarks` up to where variants are timed. From
there on the two take turns, variant by variant, so that whatever slows the machine down slows both.
"""

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from coconut.errors import CoconutError
from experiments.benchmarks import timing

MARK = "@"
"""Begins the lines of a `Side` that are for us."""

SERVER = f"""
import importlib, json, sys, time
import numpy as np
from experiments.benchmarks import timing

def say(value):
    print({MARK!r} + json.dumps(value), flush=True)

def take_turns(variants, *_, **__):
    seconds = {{name: [] for name in variants}}
    say(list(variants))
    while (name := json.loads(sys.stdin.readline())) is not None:
        variants[name]()
        start = time.perf_counter()
        variants[name]()
        seconds[name].append(time.perf_counter() - start)
        say(seconds[name][-1])
    return {{name: np.asarray(values[1:]) for name, values in seconds.items()}}

timing.interleave = take_turns
importlib.import_module("experiments.benchmarks." + sys.argv[1]).main(sys.argv[2:])
"""


class Side:
    """A benchmark of one checkout, which waits for its turns.

    Attributes:
      variants: what it times.
    """

    def __init__(self, checkout: Path, benchmark: str, arguments: list[str]) -> None:
        self._checkout = checkout
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, benchmark, *arguments],
            cwd=checkout,  # From where -c imports first.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.variants: list[str] = self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line[1:])
        raise CoconutError(f"{self._checkout}: its benchmark ended before its variants were timed")

    def seconds(self, variant: str) -> float:
        """Of the second of two calls of a variant."""
        self._tell(variant)
        return self._answer()

    def result(self) -> dict[str, Any]:
        """What the benchmark itself reports, when all turns are taken."""
        self._tell(None)
        assert self._process.stdout is not None
        lines = self._process.stdout.read().splitlines()
        if self._process.wait():
            raise CoconutError(f"{self._checkout}: its benchmark failed")
        return json.loads(lines[-1])

    def _tell(self, value: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()

    def end(self) -> None:
        """Ends the process, wherever it is."""
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def started(checkout: Path, benchmark: str, arguments: list[str]) -> Iterator[Side]:
    """A `Side` whose process is over behind this."""
    side = Side(checkout, benchmark, arguments)
    try:
        yield side
    finally:
        side.end()


def compare(before: Path, after: Path, benchmark: str, arguments: list[str], rounds: int) -> dict[str, Any]:
    """Times the variants that both checkouts have.

    Args:
      before: a checkout.
      after: another one.
      benchmark: a module of `experiments.benchmarks` that times by `timing.interleave`, once.
      arguments: of its command.
      rounds: rounds that count; one before them does not.

    Returns:
      ``variants``: for each the seconds of both, and ``after_over_before``, round by round. ``before`` and ``after``:
      what the benchmark itself reports of each, memory and commit among it.

    Raises:
      CoconutError: a benchmark ends early.
    """
    with started(before, benchmark, arguments) as old, started(after, benchmark, arguments) as new:
        shared = [name for name in old.variants if name in new.variants]
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in shared}
        for index in range(rounds + 1):
            for name in reversed(shared) if index % 2 else shared:
                # Neither always follows the other.
                if index % 2:
                    later = new.seconds(name)
                    seconds[name].append((old.seconds(name), later))
                else:
                    seconds[name].append((old.seconds(name), new.seconds(name)))
            print(f"{benchmark} round {index}/{rounds}", file=sys.stderr, flush=True)
        variants = {}
        for name, both in seconds.items():
            earlier, later = np.asarray(both[1:]).T
            ratio = timing.quartiles("after_over_before", later / earlier)
            variants[name] = {"before": timing.summary(earlier), "after": timing.summary(later), **ratio}
            print(f"{name}: {variants[name]['after_over_before']:.3f} of the time before")
        return {"arguments": arguments, "variants": variants, "before": old.result(), "after": new.result()}


def main(arguments: list[str] | None = None) -> None:
    """Compares what is asked for."""
    parser = timing.parser("A benchmark of two checkouts, side by side.")
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the repository")
    parser.add_argument(
        "--after", type=Path, default=Path(), help="another one; that in the working directory if not given"
    )
    parser.add_argument("--benchmark", required=True, help="latent_step, or generate")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="behind --: those of the benchmark")
    options = parser.parse_args(arguments)
    own = [word for word in options.arguments if word != "--"] + (["--smoke"] if options.smoke else [])
    report = timing.Report("two_checkouts", options)
    compared = compare(options.before, options.after, options.benchmark, own, options.repeats or 9)
    report.add(options.benchmark, compared)
    report.finish()


if __name__ == "__main__":
    main()
