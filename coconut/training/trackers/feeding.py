"""The writers of a run, fed with what `coconut.training.metrics.MetricsLog` writes."""

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coconut import interruption
from coconut.errors import CoconutError
from coconut.storage import by_first_process, exists, read_text, write_atomically
from coconut.storage_path import StoragePath
from coconut.training.trackers.writer import WRITERS, MetricsWriter, Outcome, TrackedRun, TrackingConfig

LOG = logging.getLogger(__name__)

TRACKERS_FILE = "trackers.json"
"""By writer: the id of the run's own run in that tracker."""


class Trackers:
    """The writers of a run.

    Lines of one step are gathered and given at once, when the next step's come or a checkpoint is saved: a tracker has
    a step as a whole or not at all.

    Args:
      writers: by name, those that are to be written to.
      start: optimizer steps taken when the run was started.
    """

    def __init__(self, writers: Mapping[str, MetricsWriter] | None = None, *, start: int = 0):
        self._writers, self._start = dict(writers or {}), start
        self._held = {name: writer.last_step for name, writer in self._writers.items()}
        self._step = -1
        self._numbers: dict[str, float] = {}
        self._texts: dict[str, Sequence[str]] = {}

    def catch_up(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Gives each tracker what it lacks of the lines of before, each with its ``kind`` and ``step``."""
        # What is still to come of the step at which the run was saved is new; what is there of it is not.
        start, self._start = self._start, -1
        for line in lines:
            self.write(line["kind"], line["step"], {name: line[name] for name in line if name not in ("kind", "step")})
        self._give()
        self._start = start

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Takes a line: its finite numbers, and its lists as lines of JSON."""
        if not self._writers:
            return
        if step != self._step:
            self._give()
            self._step = step
        for name, value in values.items():
            # Not `math.isfinite`: a file may hold an integer that is no float.
            if isinstance(value, (int, float)) and abs(value) <= sys.float_info.max:
                self._numbers[f"{kind}/{name}"] = float(value)
            elif isinstance(value, list):
                self._texts[f"{kind}/{name}"] = [json.dumps(line, ensure_ascii=False) for line in value]

    def flush(self) -> None:
        """Gives what there is of the last step: a checkpoint is saved, so none of it is logged again."""
        self._give()
        for name, writer in [*self._writers.items()]:
            self._try(name, writer.flush)

    def close(self, outcome: Outcome) -> None:
        """Closes the writers. What was not flushed belongs to a step that is done again."""
        for name, writer in [*self._writers.items()]:
            self._try(name, lambda writer=writer: writer.close(outcome))

    def _give(self) -> None:
        numbers, texts, self._numbers, self._texts = self._numbers, self._texts, {}, {}
        for name, writer in [*self._writers.items()]:
            held = self._start < self._step <= self._held[name]
            if (numbers or texts) and not held:
                self._try(name, lambda writer=writer: writer.write(self._step, numbers, texts))

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # Of whatever kind: no tracker may end a run.
            del self._writers[name]
            LOG.warning("%s fails, and gets no more of this run until it is started again: %s", name, _in_a_line(error))


def open_trackers(config: TrackingConfig, run: TrackedRun, *, differs: bool) -> Trackers:
    """Opens the writers of a run; of several processes the first one does.

    Args:
      config: which.
      run: what they are told.
      differs: whether the steps behind ``run.start`` have other numbers or lines than before. A tracker that holds
        some of them then gets a new run, which begins with the lines until there.

    Raises:
      CoconutError: one is set up wrongly, or the file of their ids is damaged.
    """
    writers: dict[str, MetricsWriter] = {}
    if not config.writers:
        return Trackers()

    def open_them() -> None:
        path = run.workdir / TRACKERS_FILE
        ids = before = _read_ids(path)
        for name in config.writers:
            try:
                writer = WRITERS[name].make(run, ids.get(name))
                if differs and writer.last_step > run.start:
                    LOG.warning("%s holds steps that this run now does another way: it gets a new run", name)
                    writer.close("stopped")
                    writer = WRITERS[name].make(run, None)
            except CoconutError:
                for opened in writers.values():
                    with contextlib.suppress(Exception):
                        opened.close("failed")
                if ids != before:
                    write_atomically(path, json.dumps(ids, indent=1) + "\n")
                raise
            except Exception as error:
                interruption.check(error)
                LOG.warning("%s cannot be reached, and gets nothing of this run: %s", name, _in_a_line(error))
                continue
            writers[name] = writer
            if writer.run_id is not None:
                ids = ids | {name: writer.run_id}
        if ids != before:
            write_atomically(path, json.dumps(ids, indent=1) + "\n")

    by_first_process(open_them)
    return Trackers(writers, start=run.start)


def name_of(workdir: StoragePath) -> str:
    """What a run is called where nobody says: the last two parts of its workdir's path."""
    place = workdir.absolute() if isinstance(workdir, Path) else workdir
    return "/".join(place.parts[-2:])


def _read_ids(path: StoragePath) -> dict[str, str]:
    if not exists(path):
        return {}
    try:
        ids = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CoconutError(f"{path}: {error}") from error
    if not (isinstance(ids, dict) and all(isinstance(run_id, str) for run_id in ids.values())):
        raise CoconutError(f"{path}: {ids!r:.80}: must be an object with the id of a run for each tracker")
    return ids


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
