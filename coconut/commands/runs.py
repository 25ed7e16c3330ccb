"""``coconut runs``: every run below a folder, and what became of it."""

import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from coconut.analysis.runs import RunSummary, summarize_run
from coconut.commands.terminal import print_table
from coconut.errors import CoconutError
from coconut.storage_path import StoragePath
from coconut.training.workdir import RUN_FILE, find_workdirs

AGES = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
STYLES = {"running": "green", "running?": "green", "diverged": "red", "broken": "red", "stopped": "yellow"}


def list_runs(folder: StoragePath) -> list[RunSummary]:
    """Every run in a folder and below it, by path; one that cannot be read is among them and says so.

    Raises:
      CoconutError: the folder cannot be read, or there is no run.
    """
    found = [summarize_run(workdir) for workdir in find_workdirs(folder)]
    if not found:
        raise CoconutError(f"{folder}: there is no run here and none below: no folder has a {RUN_FILE}")
    return found


def to_json(runs: Sequence[RunSummary]) -> list[dict[str, Any]]:
    """The fields of `coconut.analysis.runs.RunSummary` of each run, as plain values."""
    return [dataclasses.asdict(run) for run in runs]


def print_runs(runs: Sequence[RunSummary], folder: StoragePath, console: Console, now: datetime.datetime) -> None:
    """Prints a line for each run, its path from ``folder``; then one for each that is broken.

    A terminal breaks long names, so that the table fits it; into a file or pipe each run is one line, however long.
    """
    name = lambda run: run.workdir.removeprefix(str(folder)).lstrip("/") or "."
    read, broken = [run for run in runs if run.problem is None], [run for run in runs if run.problem is not None]
    if read:
        swept = _swept(read)
        header = ("run", "state", "method", *swept.values(), "seed", "stage", "step", "last %", "best %", "wrote")
        rows = []
        for run in read:
            values = [str(run.swept.get(field, "-")) for field in swept]
            cells = (run.seed, run.stage, run.step, _percent(run.accuracy), _percent(run.best_accuracy))
            texts = ["-" if cell is None else str(cell) for cell in cells]
            state = Text(run.state, STYLES.get(run.state, ""))
            rows.append([name(run), state, run.method or "-", *values, *texts, _age(run, now)])
        print_table(header, rows, console, breakable=("run", "method"))
    if broken:
        state = Text("broken", STYLES["broken"])
        rows = [[name(run), state, " ".join((run.problem or "").split())] for run in broken]
        print_table(("run", "state", "what is wrong"), rows, console, breakable=("run", "what is wrong"))


def _swept(runs: Sequence[RunSummary]) -> dict[str, str]:
    """The swept fields that have no column of their own, each with its title."""
    fields = dict.fromkeys(field for run in runs for field in run.swept)
    fields = [field for field in fields if field not in ("RunConfig.seed", "RunConfig.method")]
    last = [field.rpartition(".")[2] for field in fields]
    return {field: part if last.count(part) == 1 else field for field, part in zip(fields, last, strict=True)}


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f}"


def _age(run: RunSummary, now: datetime.datetime) -> str:
    """How long ago it last wrote, in the largest unit of which it is one at least."""
    if run.written is None:
        return "-"
    seconds = max(0, int((now - datetime.datetime.fromisoformat(run.written)).total_seconds()))
    size, unit = next(((size, unit) for size, unit in AGES if seconds >= size), AGES[-1])
    return f"{seconds // size} {unit}"
