"""Sides of a comparison, timed in turn; one that does not run is named, and the others are measured."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from experiments.benchmarks import timing

Prepare = Callable[[], tuple[Callable[[], object], Mapping[str, Any]]]
"""Gives what is timed, and what is known of the side besides its time."""

SLOW = 1.0
"""Seconds from which a call is slow: such sides take turns with the first side alone, and in one round only."""


def compare(sides: Mapping[str, Prepare], rounds: int, *, title: str) -> dict[str, Any]:
    """Times all sides in turn.

    Args:
      sides: how to come to each; the first is ours, to which all others are compared.
      rounds: rounds that count.
      title: of the progress.

    Returns:
      ``sides``, by name; ``ratios``, of the first side's time to that of each other one, round by round; ``refused``,
      the sides that do not run, and why.
    """
    refused: dict[str, str] = {}
    calls: dict[str, Callable[[], object]] = {}
    known: dict[str, dict[str, Any]] = {}
    slow: list[str] = []
    for name, prepare in sides.items():
        with _refusal(refused, name):
            start = time.perf_counter()
            call, about = prepare()
            call()
            known[name] = {**about, "seconds_until_first_call": time.perf_counter() - start}
            start = time.perf_counter()
            call()
            if time.perf_counter() - start > SLOW:
                slow.append(name)
            calls[name] = call
    first = next(iter(sides))
    fast = {name: call for name, call in calls.items() if name not in slow}
    measured, ratios = {}, {}
    groups = [(fast, rounds)]
    groups += [({x: calls[x] for x in dict.fromkeys((first, name)) if x in calls}, 1) for name in slow]
    for group, count in groups:
        if not group:
            continue
        seconds = timing.interleave(group, count, title=title)
        for name, values in seconds.items():
            if name not in measured:
                measured[name] = {**known[name], **timing.summary(values), "rounds": count}
            if name != first and first in seconds:
                ratios[f"{first} / {name}"] = timing.ratio(seconds[first], values)
    for name, side in measured.items():
        print(f"  {name}: {1e3 * side['median_seconds']:.2f} ms")
    for name, ratio in ratios.items():
        print(f"  {name}: {ratio['ratio']:.3f} of the time", flush=True)
    return {"sides": measured, "ratios": ratios, "refused": refused}


@contextlib.contextmanager
def _refusal(failures: dict[str, str], name: str) -> Iterator[None]:
    """Notes an exception under ``name`` and goes on: one side of a comparison does not run here."""
    try:
        yield
    # As in `experiments.on_gpu.record.Record.measure`.
    except Exception as error:
        failures[name] = f"{type(error).__name__}: {error}"[:500]
        print(f"{name} does not run: {failures[name]}", flush=True)
