"""Sides of a comparison, timed in turn; one that does not run is named, and the others are measured."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from experiments.benchmarks import timing

Prepare = Callable[[], tuple[Callable[[], object], Callable[[], Mapping[str, Any]]]]
"""Gives what is timed, and what says after the first call what else is known of the side."""

SLOW, VERY_SLOW = 1.0, 8.0
"""Seconds from which a call is slow: such a side takes turns with the first side alone, twice or once."""


def compare(
    sides: Mapping[str, Prepare], rounds: int, *, title: str, progress: Callable[[Mapping[str, Any]], object]
) -> dict[str, Any]:
    """Times all sides in turn.

    Args:
      sides: how to come to each; the first is ours, to which all others are compared.
      rounds: rounds that count.
      title: of the progress.
      progress: is given what is measured so far.

    Returns:
      ``sides``, by name; ``ratios``, of the first side's time to that of each other one, round by round; ``refused``,
      the sides that do not run, and why.

    Raises:
      RuntimeError: the first side does not run: there is nothing to compare, though what was timed of the others was
        given to ``progress``.
    """
    refused: dict[str, str] = {}
    calls: dict[str, Callable[[], object]] = {}
    known: dict[str, dict[str, Any]] = {}
    slow: dict[str, int] = {}
    for name, prepare in sides.items():
        with _refusal(refused, name):
            start = time.perf_counter()
            call, about = prepare()
            seconds = _seconds(call)
            known[name] = {**about(), "seconds_until_first_call": time.perf_counter() - start}
            if seconds > VERY_SLOW:
                slow[name] = 1
            # The first call of a library may have loaded it.
            elif seconds > SLOW and _seconds(call) > SLOW:
                slow[name] = 2
            calls[name] = call
            print(f"  {name}: ready after {known[name]['seconds_until_first_call']:.1f} s", flush=True)
    first = next(iter(sides))
    result: dict[str, Any] = {"sides": {}, "ratios": {}, "refused": refused}

    def add(seconds: Mapping[str, np.ndarray], names: Iterable[str]) -> None:
        for name in names:
            result["sides"][name] = {**known[name], **timing.summary(seconds[name]), "rounds": len(seconds[name])}
            if name != first and first in seconds:
                result["ratios"][f"{first} / {name}"] = timing.ratio(seconds[first], seconds[name])
        progress(result)

    fast = {name: call for name, call in calls.items() if name not in slow}
    timing.interleave(fast, rounds, title=title, after_round=lambda seconds: add(seconds, fast))
    for name, turns in slow.items():
        group = dict.fromkeys(x for x in (first, name) if x in calls)
        seconds = [[_seconds(calls[x]) for x in group] for _ in range(turns)]
        add(dict(zip(group, np.asarray(seconds).T, strict=True)), group if first in slow else [name])
    if first in refused:
        raise RuntimeError(f"{first}: {refused[first]}")
    for name, side in result["sides"].items():
        print(f"  {name}: {1e3 * side['median_seconds']:.2f} ms")
    for name, ratio in result["ratios"].items():
        print(f"  {name}: {ratio['ratio']:.3f} of the time", flush=True)
    return result


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextlib.contextmanager
def _refusal(failures: dict[str, str], name: str) -> Iterator[None]:
    """Notes an exception under ``name`` and goes on: one side of a comparison does not run here."""
    try:
        yield
    # As in `experiments.on_gpu.record.Record.measure`.
    except Exception as error:
        failures[name] = f"{type(error).__name__}: {error}"[:500]
        print(f"{name} does not run: {failures[name]}", flush=True)
