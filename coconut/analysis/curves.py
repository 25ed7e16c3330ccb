"""A run's ``metrics.jsonl`` as series of points."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from coconut.errors import CoconutError
from coconut.storage import read_text
from coconut.storage_path import StoragePath, as_path

Axis = Literal["steps", "seconds"]
Records = Sequence[Mapping[str, Any]]


class Curve(NamedTuple):
    """Points of one metric.

    Attributes:
      x: optimizer steps, or seconds of training (without compilation, evaluation and saving).
      y: the metric; NaN where it was not finite.
    """

    x: np.ndarray
    y: np.ndarray


class Band(NamedTuple):
    """One metric of several runs as one, such as of those that differ by seed alone.

    Attributes:
      steps: those that any of the runs has a point at, wherever all of them are.
      x: these, or the seconds after which the runs took them, at their mean.
      mean: of the runs, each read linearly between its own points; NaN where one was not finite.
      least: of the runs.
      most: of the runs.
    """

    steps: np.ndarray
    x: np.ndarray
    mean: np.ndarray
    least: np.ndarray
    most: np.ndarray


class StageSpan(NamedTuple):
    """One stage of a run, on the same axis as its curves.

    Attributes:
      stage: its number.
      start: where it began.
      end: where it ended.
      learnt: whether it ended by its metric; None where it could not.
    """

    stage: int
    start: float
    end: float
    learnt: bool | None


def read_metrics(path: StoragePath | str) -> list[dict[str, Any]]:
    """The records of a run, from its workdir or from the ``.jsonl`` file itself.

    Raises:
      CoconutError: there is no such file, or a line before its last one is no JSON object (the last one of a run that
        was killed may be torn, and is left out).
    """
    path = as_path(path)
    file = path if path.suffix == ".jsonl" else path / "metrics.jsonl"
    lines = read_text(file).splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise CoconutError(f"{file}, line {number}: not JSON: {error}") from error
        if not isinstance(record, dict) or not {"kind", "step"} <= record.keys():
            raise CoconutError(f"{file}, line {number}: a record is a JSON object with kind and step")
        if not isinstance(record["step"], int):
            raise CoconutError(f"{file}, line {number}: step = {record['step']!r:.80}: must be a whole number")
        records.append(record)
    return records


def curve(records: Records, kind: str, metric: str, axis: Axis) -> Curve:
    """The points of one metric; empty where the run has none.

    Args:
      records: of one run.
      kind: ``train`` or ``validation``.
      metric: name of the metric.
      axis: what ``x`` is.
    """
    points = [(record["step"], record[metric]) for record in records if record["kind"] == kind and metric in record]
    return Curve(
        _along(records, [step for step, _ in points], axis),
        np.asarray([np.nan if value is None else value for _, value in points], float),
    )


def band(runs: Sequence[Records], kind: str, metric: str, axis: Axis) -> Band:
    """The mean, the least and the most of a metric of several runs, step by step; empty where they share no step.

    Args:
      runs: the records of each.
      kind: as `curve` takes it, like the others.
      metric: name of the metric.
      axis: what ``x`` is.
    """
    curves = [curve(records, kind, metric, "steps") for records in runs]
    if not all(len(own.x) for own in curves):
        return Band(*np.empty((5, 0)))
    steps = np.unique(np.concatenate([own.x for own in curves]))
    steps = steps[(steps >= max(own.x[0] for own in curves)) & (steps <= min(own.x[-1] for own in curves))]
    values = np.stack([np.interp(steps, *own) for own in curves])
    x = np.mean([_along(records, steps, axis) for records in runs], 0)
    return Band(steps, x, values.mean(0), values.min(0), values.max(0))


def stage_spans(records: Records, axis: Axis) -> list[StageSpan]:
    """The stages a run went through, the one it was stopped in included."""
    ended = [(record["stage"], record["step"], record.get("learnt")) for record in records if record["kind"] == "stage"]
    last = max((record["step"] for record in records), default=0)
    running = [record["stage"] for record in records if record["kind"] == "train" and record["step"] == last]
    if running and (not ended or ended[-1][1] < last):
        ended.append((running[0], last, None))
    ends = _along(records, [step for _, step, _ in ended], axis)
    starts = [0.0, *ends[:-1]]
    return [
        StageSpan(stage, float(start), float(end), learnt)
        for (stage, _, learnt), start, end in zip(ended, starts, ends, strict=True)
    ]


def mean_spans(runs: Sequence[Sequence[StageSpan]]) -> list[StageSpan]:
    """The stages of several runs at their mean; none where the runs went through others."""
    if len({tuple(span.stage for span in spans) for spans in runs}) != 1:
        return []
    return [
        own[0]._replace(start=float(np.mean([x.start for x in own])), end=float(np.mean([x.end for x in own])))
        for own in zip(*runs, strict=True)
    ]


def _along(records: Records, steps: Iterable[int] | np.ndarray, axis: Axis) -> np.ndarray:
    """Steps as they are, or as the seconds the run had trained when it took them."""
    steps = np.asarray(list(steps), float)
    if axis == "steps":
        return steps
    # Only training records carry the time; a validation stands at the step that it followed.
    clock = [(record["step"], record["seconds"]) for record in records if record["kind"] == "train"]
    if not clock:
        raise CoconutError("there are no training records, which carry the seconds: plot over steps")
    known_steps, seconds = np.asarray([(0, 0.0), *clock], float).T
    return np.interp(steps, known_steps, seconds)
