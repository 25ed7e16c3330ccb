"""``coconut compare``: runs side by side: what differs in their configs, their last metrics, their learning curves."""

import dataclasses
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from coconut.analysis.curves import Axis, Records
from coconut.analysis.plots import plot_learning_curves, save_figure
from coconut.analysis.runs import METRICS_FILE, method_and_seed, metrics_so_far, validations, workdirs_of
from coconut.commands.evaluate import markdown_table
from coconut.commands.terminal import print_table
from coconut.errors import CoconutError
from coconut.storage import make_folder, write_atomically
from coconut.storage_path import StoragePath
from coconut.training.config import differences
from coconut.training.workdir import read_run_file

LONGEST = 40
"""Characters of a value in a table; the JSON has all of it."""
LOSSES = ("first_loss", "loss", "reward")
"""What is drawn of the training where nobody says it; a run that learns from rewards alone has the last."""
MISSING = "(missing)"
TRAINING = "training "
"""What stands before a metric of the training: validation has some of the same name."""
PERCENT = ("accuracy", "best accuracy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """A run that is compared.

    Attributes:
      workdir: its folder.
      method: name of its method.
      seed: of parameters and data order.
      identity: all that its numbers come of, but the seed, as JSON holds it: the config, the tokenizer's and the
        splits' fingerprints, and fields that were changed while it went on.
      records: its metrics.
    """

    workdir: StoragePath
    method: str
    seed: int
    identity: Mapping[str, Any]
    records: Records


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ by their seed alone: one column, one line.

    Attributes:
      name: to show.
      runs: in the order of their seeds.
    """

    name: str
    runs: tuple[ComparedRun, ...]


def compare_runs(
    workdirs: Sequence[StoragePath], output: Path | None = None, *, axis: Axis = "steps", loss: str | None = None
) -> dict[str, Any]:
    """Compares runs.

    Args:
      workdirs: of runs, or folders with runs below them.
      output: folder for ``compare.json``, ``compare.md`` and ``learning_curves`` as PNG and SVG; None writes nothing.
      axis: of the curves: optimizer ``steps`` or ``seconds`` of training.
      loss: the training metric that is shown and drawn; None for the first of `LOSSES` that a run has.

    Returns:
      The content of ``compare.json``. ``groups``: a ``name``, the ``workdirs``, ``method`` and ``seeds`` of each, and
      ``metrics``: by name the ``values`` in the order of the seeds, None where a run has none, with their ``mean``,
      ``least`` and ``most`` over the runs that have it. ``differences``: by dotted field, its value in each group.

    Raises:
      CoconutError: fewer than two runs, one that is named twice or cannot be read or has no metrics yet, or ``loss`` is
        in none of them.
    """
    runs = [_read_run(workdir) for workdir in workdirs_of(workdirs)]
    if len(runs) < 2:
        raise CoconutError(f"{runs[0].workdir}: is one run, and a comparison needs two at least")
    known = {name for run in runs for record in run.records if record["kind"] == "train" for name in record}
    if loss is None:
        loss = next((name for name in LOSSES if name in known), LOSSES[0])
    if loss not in known:
        raise CoconutError(f"--loss {loss}: no run has this metric of training; they have {', '.join(sorted(known))}")
    groups = group_runs(runs)
    content = {
        "groups": [
            {
                "name": group.name,
                "method": group.runs[0].method,
                "seeds": [run.seed for run in group.runs],
                "workdirs": [str(run.workdir) for run in group.runs],
                "metrics": _metrics(group, loss),
            }
            for group in groups
        ],
        "differences": config_differences(groups),
    }
    if output is not None:
        make_folder(output)
        curves = {group.name: [run.records for run in group.runs] for group in groups}
        figure = plot_learning_curves(curves, output / "learning_curves.png", axis=axis, loss=loss)
        save_figure(figure, output / "learning_curves.svg")
        write_atomically(output / "compare.json", json.dumps(content, indent=1) + "\n")
        write_atomically(output / "compare.md", describe(content) + "\n")
    return content


def group_runs(runs: Sequence[ComparedRun]) -> list[Group]:
    """Puts runs together that differ by their seed alone, in the order of the first of each.

    A run of a seed that its group has already, such as a repeated one, is a group of its own.
    """
    found: list[list[ComparedRun]] = []
    for run in runs:
        fits = lambda own, run=run: own[0].identity == run.identity and run.seed not in {x.seed for x in own}
        own = next((own for own in found if fits(own)), None)
        if own is None:
            found.append([run])
        else:
            own.append(run)
    found = [sorted(own, key=lambda run: run.seed) for own in found]
    return [Group(name=name, runs=tuple(own)) for name, own in zip(_names(found), found, strict=True)]


def config_differences(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """The dotted fields in which groups differ, each with its value in every group."""
    first = groups[0].runs[0].identity
    fields = dict.fromkeys(name for group in groups[1:] for name in differences(first, group.runs[0].identity))
    return {field: [_value(group.runs[0].identity, field) for group in groups] for field in sorted(fields)}


def describe(content: Mapping[str, Any]) -> str:
    """Markdown tables of a comparison: metrics, then what differs."""
    return "\n\n".join(part if isinstance(part, str) else markdown_table(*part) for part in _parts(content))


def print_comparison(content: Mapping[str, Any], console: Console) -> None:
    """Prints a comparison; on a terminal long names and values are broken so that it fits, and nothing is left out."""
    if not console.is_terminal:
        console.file.write(describe(content) + "\n")
        return
    for part in _parts(content):
        if isinstance(part, str):
            console.print(part, highlight=False, markup=False)
            continue
        # Of a group's name and of a field's, words are the parts of a path.
        print_table(*part, console, breakable=part[0])
        console.print()


def _parts(content: Mapping[str, Any]) -> list[str | tuple[Sequence[str], Sequence[Sequence[str]]]]:
    """Sentences, and tables as a header and rows."""
    groups = content["groups"]
    header = ("", *(group["name"] for group in groups))
    rows = [["seed", *(", ".join(map(str, group["seeds"])) for group in groups)]]
    names = dict.fromkeys(name for group in groups for name in group["metrics"])
    # Those of the training stand first, also where the first group has none of a name.
    for name in sorted(names, key=lambda name: not name.startswith(("steps", "seconds", TRAINING))):
        title = f"{name} %" if name in PERCENT else name
        rows.append([title, *(_cell(name, group["metrics"].get(name)) for group in groups)])
    parts: list[str | tuple[Sequence[str], Sequence[Sequence[str]]]] = [(header, rows)]
    if any(len(group["seeds"]) > 1 for group in groups):
        parts.append("Several seeds: mean (least to most).")
    if content["differences"]:
        rows = [[field, *map(_short, values)] for field, values in content["differences"].items()]
        parts.append((("what differs", *header[1:]), rows))
    else:
        parts.append("The runs differ by their seeds alone.")
    return parts


def _read_run(workdir: StoragePath) -> ComparedRun:
    content = read_run_file(workdir)
    method, seed = method_and_seed(workdir, content)
    # Where the numbers go changes none of them.
    config = {name: value for name, value in content["config"].items() if name not in ("seed", "tracking")}
    others = ("tokenizer_fingerprint", "splits", "changes")
    identity = config | {name: content[name] for name in others if name in content}
    records = metrics_so_far(workdir)
    if not records:
        raise CoconutError(f"{workdir / METRICS_FILE}: the run has no metrics yet")
    return ComparedRun(workdir=workdir, method=method, seed=seed, identity=identity, records=records)


def _names(groups: Sequence[Sequence[ComparedRun]]) -> list[str]:
    """A name for each group: of its own folder where its runs share one, as short as tells all apart."""
    places = []
    for own in groups:
        parents = {run.workdir.parent for run in own}
        others = {run.workdir.parent for group in groups if group is not own for run in group}
        together = len(own) > 1 and len(parents) == 1 and not parents & others
        place = own[0].workdir.parent if together else own[0].workdir
        places.append((place.absolute() if isinstance(place, Path) else place).parts)
    most = max(map(len, places))
    for length in range(1, most):
        names = ["/".join(parts[-length:]) for parts in places]
        if len(set(names)) == len(names):
            return names
    return [str(own[0].workdir) for own in groups]


def _metrics(group: Group, loss: str) -> dict[str, Any]:
    """Each metric of the runs of a group: their values, mean, least and most."""
    own = [_last_metrics(run, loss) for run in group.runs]
    found = {}
    for name in dict.fromkeys(name for metrics in own for name in metrics):
        values = [metrics.get(name) for metrics in own]
        there = [value for value in values if value is not None]
        spread = (statistics.fmean(there), min(there), max(there)) if there else (None, None, None)
        found[name] = {"values": values, **dict(zip(("mean", "least", "most"), spread, strict=True))}
    return found


def _last_metrics(run: ComparedRun, loss: str) -> dict[str, float | None]:
    """The numbers that a run ended with, or holds so far."""
    last = {record["kind"]: record for record in run.records}
    training, validation = last.get("train", {}), last.get("validation", {})
    found: dict[str, Any] = {"steps": run.records[-1]["step"]}
    found |= {"seconds": training["seconds"]} if "seconds" in training else {}
    found |= {TRAINING + name: training[name] for name in (loss, "reward") if name in training}
    if measured := validations(run.workdir, run.records):
        found |= {"accuracy": measured[-1][1], "best accuracy": max(measured)[1]}
    found |= {name: value for name, value in validation.items() if name not in ("kind", "step", "stage", "accuracy")}
    return {name: value for name, value in found.items() if value is None or isinstance(value, (int, float))}


def _value(identity: Mapping[str, Any], field: str) -> Any:
    """The value at a dotted path; `MISSING` where there is none."""
    value: Any = identity
    for part in field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return MISSING
        value = value[part]
    return value


def _cell(name: str, spread: Mapping[str, Any] | None) -> str:
    if spread is None or spread["mean"] is None:
        return "-"
    show = (lambda value: f"{100 * value:.1f}") if name in PERCENT else _number
    if len(spread["values"]) == 1:
        return show(spread["mean"])
    count = sum(value is not None for value in spread["values"])
    some = "" if count == len(spread["values"]) else f", {count} of {len(spread['values'])}"
    return f"{show(spread['mean'])} ({show(spread['least'])} to {show(spread['most'])}{some})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.4g}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if re.fullmatch("[0-9a-f]{64}", text):
        return text[:12]  # A fingerprint: enough of it to be told apart.
    text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    return text.replace("\n", " ")
