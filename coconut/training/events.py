"""``events.jsonl``: what happened to a run, when, and in which process; nothing in it is ever taken back."""

import datetime
import json
import os
from collections.abc import Mapping
from typing import Any

import jax

from coconut.storage import LineLog, exists, read_text
from coconut.storage_path import StoragePath

EVENTS_FILE = "events.jsonl"


class Events:
    """Starts, stops, saves, restores, skipped steps, stages, and checkpoints that were set aside: one JSON object each.

    Of several processes the first one writes. Unlike ``metrics.jsonl``, which holds what an uninterrupted run would
    have written, it tells what has happened, so a step may occur in it twice.

    Raises:
      CoconutError: it cannot be written.
    """

    def __init__(self, workdir: StoragePath) -> None:
        self._lines: LineLog | None = None
        if jax.process_index() == 0:
            path = workdir / EVENTS_FILE
            # A line that is torn stays as it is, with a line of its own.
            self._lines = LineLog(path, read_text(path).splitlines() if exists(path) else [])

    def write(self, kind: str, values: Mapping[str, Any]) -> None:
        """Writes one line.

        Args:
          kind: what happened.
          values: what belongs to it.

        Raises:
          CoconutError: it cannot be written.
        """
        if self._lines is not None:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            self._lines.write(json.dumps({"time": now, "process": os.getpid(), "kind": kind, **values}))

    def close(self) -> None:
        """Closes the file."""
        if self._lines is not None:
            self._lines.close()
