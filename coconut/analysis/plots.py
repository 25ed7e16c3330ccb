"""Pictures of runs: learning curves, a question's graph with the model's belief, accuracy by number of thoughts.

Every function draws a `matplotlib.figure.Figure` of its own, without pyplot and its global state, writes it to a file
whose suffix is the format (``png``, ``svg``, ``pdf``), whole or not at all, and returns it.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from coconut.analysis.curves import Axis, Records, StageSpan, band, curve, mean_spans, read_metrics, stage_spans
from coconut.analysis.drawing import BELIEF, COLUMN, INK, LAYER, belief_legend, draw_belief
from coconut.analysis.layout import layered_positions
from coconut.errors import CoconutError
from coconut.evaluation.evaluate import Evaluation
from coconut.storage_path import StoragePath
from coconut.types import Graph

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5c5c5c")
"""Okabe and Ito's palette, told apart by colour-blind readers; repeated with other dashes after the seventh."""
_DASHES = ("-", "--", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DPI = 150

Accuracy = Evaluation | Mapping[str, Any] | tuple[float, float, float]
"""An evaluation, its `Evaluation.to_json`, or ``(accuracy, low, high)`` with the ends of the 95 % interval."""


# --- Learning curves ----------------------------------------------------------------------------------------------


Run = StoragePath | Records
"""A workdir, its ``metrics.jsonl``, or the records of one."""


def plot_learning_curves(
    runs: Mapping[str, Run | Sequence[Run]],
    path: Path | str,
    *,
    axis: Axis = "seconds",
    loss: str = "first_loss",
    stages_of: str | None = None,
    chance: float | None = None,
) -> Figure:
    """Draws validation accuracy above a training loss, a colour for each run, with the stage boundaries of one of them.

    Several runs under one name, such as those of several seeds, are one line: their mean, in a band from the least to
    the most of them (`coconut.analysis.curves.band`). Where one of them ends, the others go on as thin lines. The
    legend says how many they are.

    Args:
      runs: by the name to show, a run or several.
      path: file to write.
      axis: optimizer ``steps``, or ``seconds`` of training, which is the fair one where methods' steps differ in cost.
      loss: the training metric below: ``first_loss`` is that of the first thing written after the prompt or the
        thoughts, which a new stage makes harder; ``loss`` that of everything written.
      stages_of: the run whose stages are marked; None for the first one with more than one stage. Of several runs under
        that name they are marked where all went through the same ones, at their mean.
      chance: accuracy of a coin, drawn as a line; None for none.

    Raises:
      CoconutError: no runs, a run without records, an unknown ``stages_of``, or a file that cannot be read.
      OSError: the picture cannot be written.
    """
    if not runs:
        raise CoconutError("plot_learning_curves: there are no runs to draw")
    records = {name: _read(own) for name, own in runs.items()}
    for name, seeds in records.items():
        if not (seeds and all(seeds)):
            raise CoconutError(f"plot_learning_curves: run {name!r} has no records")
    if stages_of is not None and stages_of not in records:
        raise CoconutError(f"stages_of = {stages_of!r} is none of the runs {', '.join(records)}")

    figure = Figure(figsize=(8.5, 6.0), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.15, 1))
    styles = {name: line_style(index) for index, name in enumerate(records)}
    handles: list[Line2D] = []
    for name, seeds in records.items():
        color, dashes, marker = styles[name]
        style = {"color": color, "linestyle": dashes}
        line = _draw_runs(above, seeds, "validation", "accuracy", axis, marker=marker, markersize=4.5, **style)
        line.set_label(name if len(seeds) == 1 else f"{name} (n = {len(seeds)})")
        handles.append(line)
        _draw_runs(below, seeds, "train", loss, axis, linewidth=1.2, alpha=0.9, **style)
    above.set(ylabel="validation accuracy", ylim=(-0.03, 1.03))
    above.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    below.set(ylabel=_LOSS_LABELS.get(loss, f"training {loss}"), xlabel=_X_LABELS[axis])
    if not below.dataLim.y0 < 0:
        below.set_ylim(bottom=0)
    below.set_xlim(left=0)
    _draw_chance(above, chance)
    spans = {name: mean_spans([stage_spans(own, axis) for own in seeds]) for name, seeds in records.items()}
    if stages_of is None:
        stages_of = next((name for name, own in spans.items() if len(own) > 1), None)
    if stages_of is not None:
        _draw_stages((above, below), stages_of, spans[stages_of], styles[stages_of][0])
    for axes in (above, below):
        clean_axes(axes)
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 5), frameon=False)
    save_figure(figure, path)
    return figure


def _read(runs: Any) -> list[Records]:
    """The records of each run under one name. Records are a sequence, too, but of mappings."""
    if not isinstance(runs, Sequence):
        return [read_metrics(runs)]
    if all(isinstance(record, Mapping) for record in runs):
        return [runs]
    return [records for run in runs for records in _read(run)]


def _draw_runs(axes: Axes, runs: Sequence[Records], kind: str, metric: str, axis: Axis, **style: Any) -> Line2D:
    """One line of one run, or of several: their mean, their band, and what is longer than the shortest of them."""
    if len(runs) == 1:
        return axes.plot(*curve(runs[0], kind, metric, axis), **style)[0]
    steps, x, mean, least, most = band(runs, kind, metric, axis)
    [line] = axes.plot(x, mean, **style)
    axes.fill_between(x, least, most, color=style["color"], alpha=0.18, linewidth=0)
    end = steps[-1] if len(steps) else -np.inf
    for records in runs:
        rest = curve(records, kind, metric, "steps").x >= end
        if rest.sum() > 1:
            own = curve(records, kind, metric, axis)
            axes.plot(own.x[rest], own.y[rest], **{**style, "marker": "", "linewidth": 0.7, "alpha": 0.5})
    return line


_LOSS_LABELS = {"first_loss": "training loss, first thing written", "loss": "training loss"}
_X_LABELS = {"steps": "optimizer steps", "seconds": "seconds of training"}


def _draw_stages(panels: Sequence[Axes], name: str, spans: Sequence[StageSpan], color: str) -> None:
    """A line where a stage gives way to the next, each stage's number above it."""
    top = panels[0]
    right = top.get_xlim()[1]
    for index, span in enumerate(spans):
        if index:
            for axes in panels:
                axes.axvline(span.start, color=color, linewidth=0.9, linestyle=(0, (4, 3)), alpha=0.7, zorder=1)
        # Named in full where there is room, at least in the first; the number alone elsewhere.
        room = (span.end - span.start) / right
        text = f"stage {span.stage}" if room > 0.075 else f"{span.stage}"
        if not index and room > 0.075 + 0.012 * len(name):
            text = f"{name} {text}"
        top.annotate(
            text,
            ((span.start + span.end) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
            color=color,
        )


# --- Belief -------------------------------------------------------------------------------------------------------


def plot_belief(
    graph: Graph,
    beliefs: Float[np.ndarray, "R N"],
    path: Path | str,
    title: str = "",
    *,
    measure: str = "belief",
    notes: Sequence[str] = (),
) -> Figure:
    """Draws a question's graph once for each number of thoughts, its nodes coloured and sized by the model's belief.

    Nodes stand in layers by hops from the root asked about; those that it does not reach have a block of their own,
    by hops from the other root.

    Args:
      graph: the graph.
      beliefs: row ``k`` holds the belief in each node after ``k`` thoughts, as
        `coconut.analysis.probes.belief_over_nodes` or `coconut.analysis.search_tree.node_values` return it; a row may
        sum to less than 1.
      path: file to write.
      title: stands above the panels.
      measure: what is drawn, beside its scale.
      notes: a line for each panel, under its number of thoughts; empty for none.

    Raises:
      CoconutError: the beliefs do not fit the graph, or are no probabilities; or there is not a note for each row.
      OSError: the picture cannot be written.
    """
    rows, size = beliefs.shape
    if size != len(graph.symbols) or not rows:
        raise CoconutError(f"beliefs of shape {beliefs.shape} do not fit a graph of {len(graph.symbols)} nodes")
    if not (np.isfinite(beliefs).all() and beliefs.min() >= 0 and beliefs.max() <= 1 + 1e-6):
        raise CoconutError("beliefs must be probabilities: finite, and between 0 and 1")
    if notes and len(notes) != rows:
        raise CoconutError(f"{len(notes)} notes do not fit {rows} panels")
    places = layered_positions(graph)
    width = max(x for x, _ in places.values()) + 1.0
    depth = 1.0 - min(y for _, y in places.values())
    # Panels wrap where more than four stand in a row, and are as wide as their graphs need.
    columns = min(rows, 4 if width <= 9 else 2 if width <= 16 else 1)
    lines = math.ceil(rows / columns)
    panel_width, panel_height = max(2.2, COLUMN * width + 0.3), LAYER * depth + 0.45
    figure = Figure(figsize=(columns * panel_width + 0.9, lines * panel_height + 0.95), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for count, axes in enumerate(panels):
        axes.set_axis_off()
        if count >= rows:
            continue
        draw_belief(axes, graph, places, beliefs[count])
        name = f"after {count} thought{'s' * (count != 1)}"
        axes.set_title("\n".join([name, *notes[count : count + 1]]), fontsize=10, color=INK)
    mappable = ScalarMappable(Normalize(0, 1), BELIEF)
    bar = figure.colorbar(mappable, ax=list(panels), fraction=0.03, pad=0.01, aspect=30, shrink=0.8)
    bar.set_label(measure, color=INK)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue] - typed as the base class
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.legend(handles=belief_legend(graph), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11, color=INK)
    save_figure(figure, path)
    return figure


# --- Accuracy by thoughts -----------------------------------------------------------------------------------------


def plot_accuracy_by_thoughts(
    results: Mapping[str, Mapping[int, Accuracy]],
    path: Path | str,
    *,
    chance: float | None = None,
    chance_name: str = "chance",
) -> Figure:
    """Draws accuracy over the number of thoughts chosen at test time (Hao et al. 2024, section 5), with 95 % intervals.

    Args:
      results: by the name to show, for each number of thoughts an `Accuracy`.
      path: file to write.
      chance: accuracy of a coin, drawn as a line; None for none. It belongs to a choice between options: a model that
        writes whatever it likes has no such chance, and may well fall below it.
      chance_name: stands beside that line.

    Raises:
      CoconutError: there is nothing to draw.
      OSError: the picture cannot be written.
    """
    if not any(results.values()):
        raise CoconutError("plot_accuracy_by_thoughts: there are no results to draw")
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for index, (name, by_count) in enumerate(results.items()):
        counts = sorted(by_count)
        # Set apart a little, so that intervals of equal accuracy stay readable.
        x = np.asarray(counts) + 0.06 * (index - (len(results) - 1) / 2)
        draw_accuracies(axes, x, [by_count[count] for count in counts], index, name)
    axes.set(xlabel="thoughts at test time", ylabel="accuracy", ylim=(-0.03, 1.03))
    axes.set_xticks(sorted({count for by_count in results.values() for count in by_count}))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _draw_chance(axes, chance, chance_name)
    clean_axes(axes)
    # Long names stand one below the other.
    columns = 1 if max(map(len, results)) > 24 else min(len(results), 4)
    figure.legend(loc="outside upper center", ncols=columns, frameon=False)
    save_figure(figure, path)
    return figure


def plot_accuracy_by_mean_thoughts(results: Mapping[str, Sequence[Mapping[str, Any]]], path: Path | str) -> Figure:
    """Draws accuracy over the mean number of thoughts, a point for each threshold of a stop, with 95 % intervals.

    Args:
      results: by the name to show, for each threshold what ``coconut evaluate`` says of it: ``threshold``,
        ``thoughts``, ``accuracy`` and ``interval_95``.
      path: file to write.

    Raises:
      CoconutError: there is nothing to draw.
      OSError: the picture cannot be written.
    """
    if not any(results.values()):
        raise CoconutError("plot_accuracy_by_mean_thoughts: there are no results to draw")
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for index, (name, points) in enumerate(results.items()):
        points = sorted(points, key=lambda point: point["thoughts"])
        draw_accuracies(axes, np.asarray([point["thoughts"] for point in points]), points, index, name)
        for point in points:
            place = (point["thoughts"], point["accuracy"])
            text = f"{point['threshold']:g}"
            axes.annotate(
                text, place, xytext=(4, 4), textcoords="offset points", fontsize=8, color=line_style(index)[0]
            )
    axes.set(xlabel="mean thoughts (threshold beside each point)", ylabel="accuracy", ylim=(-0.03, 1.03))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    clean_axes(axes)
    figure.legend(loc="outside upper center", ncols=min(len(results), 4), frameon=False)
    save_figure(figure, path)
    return figure


def draw_accuracies(axes: Axes, x: Float[np.ndarray, " R"], results: Sequence[Accuracy], index: int, name: str) -> None:
    """A line of accuracies with their intervals, in the style of the line's number."""
    color, dashes, marker = line_style(index)
    accuracy, low, high = np.asarray([_with_interval(result) for result in results], float).T
    axes.errorbar(
        x,
        accuracy,
        yerr=np.maximum([accuracy - low, high - accuracy], 0),
        color=color,
        linestyle=dashes,
        marker=marker,
        markersize=5,
        capsize=3,
        elinewidth=1,
        label=name,
    )


def _with_interval(result: Accuracy) -> tuple[float, float, float]:
    if isinstance(result, Evaluation):
        return (result.accuracy, *result.interval)
    if isinstance(result, Mapping):
        low, high = result["interval_95"]
        return result["accuracy"], low, high
    return result


# --- Methods ------------------------------------------------------------------------------------------------------


def plot_table(rows: Mapping[str, Mapping[str, Any]], path: Path | str, *, shortcut: float | None = None) -> Figure:
    """Draws each method's accuracy with its 95 % interval, those of its seeds, and those with altered thoughts.

    A line for each method, from top to bottom.

    Args:
      rows: by the name to show, ``accuracy``, ``interval_95``, the ``accuracies`` of the seeds, and ``interventions``:
        by name an ``accuracy``, or None (`coconut.commands.table`).
      path: file to write; png, svg or pdf.
      shortcut: accuracy of the best rule that answers without reasoning, drawn as a line; None for none.

    Raises:
      CoconutError: there is nothing to draw.
      OSError: the picture cannot be written.
    """
    if not rows:
        raise CoconutError("plot_table: there are no methods to draw")
    figure = Figure(figsize=(7.0, 1.6 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(name for row in rows.values() for name in row["interventions"]))
    if shortcut is not None:
        axes.axvline(shortcut, color=INK, linewidth=0.8, linestyle=(0, (1, 3)), zorder=1, label="best shortcut")
    for y, row in enumerate(rows.values()):
        if y % 2:
            axes.axhspan(y - 0.5, y + 0.5, color="#f5f5f5", linewidth=0, zorder=0)
        low, high = row["interval_95"]
        error = np.maximum([[row["accuracy"] - low], [high - row["accuracy"]]], 0)
        label = "as trained" if y == 0 else None
        axes.errorbar(row["accuracy"], y, xerr=error, color=INK, marker="|", markersize=12, capsize=3, label=label)
        axes.plot(row["accuracies"], [y] * len(row["accuracies"]), ".", color=INK, alpha=0.6)
    for index, name in enumerate(names):
        color, _, marker = line_style(index)
        found = [(row["interventions"].get(name), y) for y, row in enumerate(rows.values())]
        # Set apart, so that equal accuracies stay readable.
        apart = 0.1 * (index - (len(names) - 1) / 2)
        points = [(entry["accuracy"], y + apart) for entry, y in found if entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=color, markersize=4, label=f"thoughts: {name}")
    axes.set(xlabel="accuracy", xlim=(-0.03, 1.03), ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), list(rows))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    clean_axes(axes)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8, columnspacing=1.2)
    save_figure(figure, path)
    return figure


# --- All ----------------------------------------------------------------------------------------------------------


def line_style(index: int) -> tuple[str, str, str]:
    """Colour, dashes and marker of a picture's line number ``index``; told apart without colours, too."""
    count = len(_COLORS)
    return _COLORS[index % count], _DASHES[index // count % len(_DASHES)], _MARKERS[index % len(_MARKERS)]


def _draw_chance(axes: Axes, chance: float | None, name: str = "chance") -> None:
    if chance is None:
        return
    axes.axhline(chance, color=INK, linewidth=0.8, linestyle=(0, (1, 3)), zorder=1)
    axes.annotate(
        name,
        (1, chance),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=INK,
    )


def clean_axes(axes: Axes) -> None:
    """Leaves out what says nothing: the frame's upper and right side; and draws pale lines across."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)


def save_figure(figure: Figure, path: Path | str) -> None:
    """Writes under a temporary name, then renames: a reader sees the old picture or the new, whole one."""
    path = Path(path)
    kind = path.suffix.lstrip(".")
    if kind not in figure.canvas.get_supported_filetypes():
        raise CoconutError(f"{path}: a picture cannot be written as {kind!r}; use png, svg or pdf")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    arguments: dict[str, Any] = {"format": kind, "dpi": _DPI}
    try:
        figure.savefig(temporary, **arguments)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
