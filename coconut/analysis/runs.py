"""Runs as tables: what became of each, and their metrics in one."""

import dataclasses
import datetime
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from coconut.analysis.curves import Records, read_metrics
from coconut.errors import CoconutError
from coconut.storage import exists, explained, is_held, read_text
from coconut.storage_path import StoragePath, is_remote, parse_path
from coconut.training.events import EVENTS_FILE
from coconut.training.workdir import RUN_FILE, find_workdirs, latest_manifest, read_run_file, swept_values

METRICS_FILE = "metrics.jsonl"
State = Literal["running", "running?", "finished", "stopped", "diverged", "broken"]
"""``running``: a process holds the workdir. ``running?``: in an object store, which has no locks, it has started and
not said that it stopped. ``broken``: it cannot be read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What became of a run; what it does not say yet is None.

    Attributes:
      workdir: its folder.
      state: see `State`.
      method: name of its method.
      seed: of parameters and data order.
      stage: of the curriculum, the last one it wrote of.
      step: the last optimizer step it wrote of.
      accuracy: on the validation split, as last measured: a share.
      best_accuracy: the highest of that stage, since a later stage is always better (`coconut evaluate --which best`).
      written: when it last wrote, in UTC (ISO 8601).
      problem: of a broken run, what is wrong.
      swept: of a run of a sweep, the value of each swept field by its gin name.
    """

    workdir: str
    state: State
    method: str | None = None
    seed: int | None = None
    stage: int | None = None
    step: int | None = None
    accuracy: float | None = None
    best_accuracy: float | None = None
    written: str | None = None
    problem: str | None = None
    swept: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def summarize_run(workdir: StoragePath) -> RunSummary:
    """What became of a run. One that cannot be read is `RunSummary.state` ``broken``: nothing is raised."""
    try:
        return _summary(workdir)
    except CoconutError as error:
        return RunSummary(workdir=str(workdir), state="broken", problem=str(error))


def metrics_of_runs(runs: str | StoragePath | Iterable[str | StoragePath]) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` of several runs as one table: ``pandas.DataFrame(metrics_of_runs("runs"))``.

    Args:
      runs: workdirs, or folders with workdirs below them.

    Returns:
      A record for each line: ``run`` (the workdir as text), ``method`` and ``seed``, then what the line says: ``kind``
      (``train``, ``validation``, ..), ``step``, ``stage`` and its metrics. A value that was not finite is None. Records
      of different kinds have different fields, which pandas fills with NaN.

    Raises:
      CoconutError: there is no run, or one cannot be read.
    """
    given = [runs] if isinstance(runs, str) or not isinstance(runs, Iterable) else runs
    table = []
    for workdir in workdirs_of(given):
        method, seed = method_and_seed(workdir, read_run_file(workdir))
        own = {"run": str(workdir), "method": method, "seed": seed}
        table += [own | record for record in metrics_so_far(workdir)]
    return table


def metrics_so_far(workdir: StoragePath) -> list[dict[str, Any]]:
    """The records of a run (`read_metrics`); none where it has not begun to write.

    Raises:
      CoconutError: they cannot be read.
    """
    return read_metrics(workdir) if exists(workdir / METRICS_FILE) else []


def workdirs_of(runs: Iterable[str | StoragePath]) -> list[StoragePath]:
    """The workdirs among paths, and those below a path that is none itself.

    Raises:
      CoconutError: there is no run at a path or below it, or a run is named twice.
    """
    found: list[StoragePath] = []
    for run in runs:
        path = parse_path(run) if isinstance(run, str) else run
        own = [path] if exists(path / RUN_FILE) else find_workdirs(path)
        if not own:
            raise CoconutError(f"{path}: there is no run here and none below: no folder has a {RUN_FILE}")
        if twice := [workdir for workdir in own if workdir in found]:
            raise CoconutError(f"{twice[0]}: is named twice")
        found += own
    return found


def method_and_seed(workdir: StoragePath, content: Mapping[str, Any]) -> tuple[str, int]:
    """The method and the seed of a run, of what `read_run_file` returned.

    Raises:
      CoconutError: its config does not say.
    """
    config = content.get("config")
    if not isinstance(config, Mapping):
        raise CoconutError(f"{workdir / RUN_FILE}: config = {config!r:.80}: must be an object")
    method, seed = config.get("method"), config.get("seed")
    if not isinstance(method, str) or not isinstance(seed, int):
        raise CoconutError(
            f"{workdir / RUN_FILE}: config: method = {method!r:.80}, seed = {seed!r:.80}: must be a name and a number"
        )
    return method, seed


def validations(workdir: StoragePath, records: Records) -> list[tuple[int, float]]:
    """The stage and the accuracy of each validation, in order.

    Raises:
      CoconutError: one of them is no number.
    """
    found = []
    for record in records:
        if record["kind"] == "validation" and record.get("accuracy") is not None:
            stage, accuracy = record.get("stage"), record["accuracy"]
            if not isinstance(stage, int) or not isinstance(accuracy, (int, float)):
                raise CoconutError(
                    f"{workdir / METRICS_FILE}: step {record['step']}: stage = {stage!r:.80}, accuracy = "
                    f"{accuracy!r:.80}: must be numbers"
                )
            found.append((stage, float(accuracy)))
    return found


def _summary(workdir: StoragePath) -> RunSummary:
    method, seed = method_and_seed(workdir, read_run_file(workdir))
    # Before the files are read: a run that ends meanwhile is running rather than stopped.
    held = is_held(workdir)
    manifest = latest_manifest(workdir)
    records = metrics_so_far(workdir)
    measured = validations(workdir, records)
    stage, step = None, None
    if manifest is not None:
        stage, step = manifest.progress.stage, manifest.progress.step
    # A run that was killed may have written lines behind its checkpoint.
    if records and (step is None or records[-1]["step"] > step):
        stage, step = records[-1].get("stage"), records[-1]["step"]
    state: State = "stopped"
    if held:
        state = "running"
    elif manifest is not None and manifest.progress.finished:
        state = "finished"
    elif records and records[-1]["kind"] == "diverged":
        state = "diverged"
    elif is_remote(workdir) and _has_not_stopped(workdir):
        state = "running?"
    return RunSummary(
        workdir=str(workdir),
        state=state,
        method=method,
        seed=seed,
        stage=stage if isinstance(stage, int) else None,
        step=step,
        accuracy=measured[-1][1] if measured else None,
        best_accuracy=max(measured)[1] if measured else None,
        written=_written(workdir),
        swept=swept_values(workdir),
    )


def _has_not_stopped(workdir: StoragePath) -> bool:
    path = workdir / EVENTS_FILE
    lines = read_text(path).splitlines() if exists(path) else []
    return bool(lines) and '"kind": "stop"' not in lines[-1]


def _written(workdir: StoragePath) -> str | None:
    """When one of its files last changed; None where the store does not say."""
    times = []
    for path in (workdir / name for name in (RUN_FILE, METRICS_FILE, EVENTS_FILE)):
        if exists(path):
            with explained(path):
                status: Any = path.stat()
            # That of an object store has another name for it.
            times.append(status.mtime if is_remote(path) else status.st_mtime)
    known = [time for time in times if time is not None]
    return datetime.datetime.fromtimestamp(max(known), datetime.UTC).isoformat(timespec="seconds") if known else None
