"""Metrics of a run: sums on the host, lines of JSON on disk, a bar on the terminal."""

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from coconut.storage import LineLog, exists, read_text, write_atomically
from coconut.storage_path import StoragePath
from coconut.training.trackers.feeding import Trackers
from coconut.training.trackers.writer import Outcome

LOG = logging.getLogger(__name__)


class Meter:
    """Averages of ratios over steps; waits for the device only when asked."""

    def __init__(self, sums: Mapping[str, list[float]] | None = None):
        self._sums: dict[str, list[float]] = {name: list(pair) for name, pair in (sums or {}).items()}
        self._pending: list[Mapping[str, Any]] = []

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Adds one step: ratios that may still be under way on the device."""
        self._pending.append(metrics)

    @property
    def sums(self) -> dict[str, list[float]]:
        """Total and weight by name, added up in float64 in the order of the steps: they survive JSON to the bit."""
        for metrics in jax.device_get(self._pending):
            for name, (total, weight) in metrics.items():
                before = self._sums.get(name, [0.0, 0.0])
                self._sums[name] = [before[0] + float(total), before[1] + float(weight)]
        self._pending.clear()
        return self._sums

    def averages(self) -> dict[str, float]:
        """The means; a metric that nothing was weighed for is left out."""
        return {name: total / weight for name, (total, weight) in self.sums.items() if weight}


class SkippedSteps:
    """Steps that were skipped, counted on the host in the order of the steps.

    Args:
      total: those of the run so far.
      in_a_row: how many of them were the last steps of all.

    Attributes:
      seen: those that the last call of `count` found: the step's number, the examples that it held, and why.
    """

    def __init__(self, *, total: int = 0, in_a_row: int = 0):
        self.total, self.in_a_row = total, in_a_row
        self.seen: list[tuple[int, list[int], str]] = []
        self._pending: list[tuple[Any, int, Any]] = []

    def add(self, metrics: Mapping[str, Any], step: int, examples: Any) -> None:
        """Adds one step: its metrics, which may still be under way on the device, its number, its examples' ids."""
        flags = [metrics[name].total for name in ("skipped", "spikes") if name in metrics]
        self._pending.append((flags, step, examples))

    def count(self) -> int:
        """Counts the steps added since the last call.

        Returns:
          Length of the longest row of skipped steps that reached into them.
        """
        longest, self.seen = 0, []
        flags = jax.device_get([own for own, *_ in self._pending])
        for (skipped, *spikes), (_, step, examples) in zip(flags, self._pending, strict=True):
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            self.total += bool(skipped)
            longest = max(longest, self.in_a_row)
            if skipped:
                why = "is a spike" if any(spikes) else "is not finite"
                self.seen.append((step, [int(example) for example in examples if example >= 0], why))
        self._pending.clear()
        return longest


class MetricsLog:
    """``metrics.jsonl``: one JSON object a line, each with a ``kind`` and a ``step``.

    Of several processes the first one writes. A value that is not finite is written as null. Started again at some
    step, the log forgets what came after it, so that a resumed run leaves the file an uninterrupted one would.

    Args:
      workdir: of the run.
      start: optimizer steps taken so far.
      trackers: who gets the same lines, and first those of before that they lack; None for nobody.

    Attributes:
      outcome: how this start of the run ended, which trackers are told; who knows better than ``failed`` sets it.
    """

    def __init__(self, workdir: StoragePath, *, start: int, trackers: Trackers | None = None):
        self._lines: LineLog | None = None
        self._trackers = trackers or Trackers()
        self.outcome: Outcome = "failed"
        if jax.process_index():
            return
        self.path = workdir / "metrics.jsonl"
        kept: list[str] = []
        if exists(self.path):
            lines = read_text(self.path).splitlines()
            steps = [_step_of(line) for line in lines]
            # The last line of a run that was killed may be torn. Others were not written so.
            if damaged := [number for number, step in enumerate(steps[:-1], 1) if step is None]:
                kept_at = self.path.with_name(f"{self.path.name}.damaged")
                write_atomically(kept_at, "\n".join(lines) + "\n")
                LOG.warning("%s: left out lines %s, which are damaged; all is in %s", self.path, damaged, kept_at)
            kept = [line for line, step in zip(lines, steps, strict=True) if step is not None and step <= start]
        self._lines = LineLog(self.path, kept)
        self._trackers.catch_up(record for record in map(json.loads, kept) if "kind" in record)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line; trackers get it behind the file, so that they hold no step which it never held."""
        if self._lines is None:
            return
        line = {"kind": kind, "step": step, **{name: _finite(value) for name, value in values.items()}}
        self._lines.write(json.dumps(line))
        self._trackers.write(kind, step, values)

    def flush(self) -> None:
        """Returns when every line so far is on disk, or in the object store."""
        if self._lines is not None:
            self._lines.flush()
            self._trackers.flush()

    def close(self) -> None:
        """Closes the file, and what trackers have of the run."""
        if self._lines is not None:
            try:
                self._lines.close()
            finally:
                self._trackers.close(self.outcome)


def _step_of(line: str) -> int | None:
    """The step of a line of metrics; None if it is none."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Numbers(ProgressColumn):
    """A task's numbers, as many as there is room for."""

    def __init__(self) -> None:
        # Columns that may wrap are the first to shrink.
        super().__init__(Column(no_wrap=False))

    def render(self, task: Task) -> Text:
        """One line, cut where it is too long."""
        numbers = task.fields["numbers"] or ("compiling" if not task.completed else "")
        return Text(numbers, no_wrap=True, overflow="ellipsis")


def progress_bar(console: Console | None) -> Progress:
    """A bar with what is running, the time left, and its numbers; silent where ``console`` is no terminal.

    On a narrow terminal the numbers are cut. Without any a task compiles its programs until its first step is done.
    """
    console = console or Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24 if console.width > 100 else 8),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        _Numbers(),
        console=console,
        disable=not console.is_terminal or jax.process_index() > 0,
    )
