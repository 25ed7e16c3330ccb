"""Pictures of the latent search tree, for one column of a paper (3.3 inches); what they show belongs into a caption."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coconut.analysis.drawing import COLUMN_WIDTH, INK
from coconut.analysis.levels import LevelMeans
from coconut.analysis.plots import clean_axes, line_style, save_figure
from coconut.analysis.search_tree import PercentileCurves
from coconut.analysis.written_paths import OUTPUT_CLASSES, OutputClass, OutputCounts
from coconut.errors import CoconutError
from coconut.evaluation.evaluate import wilson_interval
from coconut.tasks.graphs import Height

SMALL = 6.5
"""Points of the smallest text."""

_RIGHT: tuple[OutputClass, ...] = ("correct_path", "correct_label")
_STACK: tuple[OutputClass, ...] = (*_RIGHT, *(name for name in OUTPUT_CLASSES if name not in _RIGHT))
"""From the bottom up: what is right first, so that its share can be read from the axis."""
_CLASS_STYLE = {
    "correct_path": ("#009e73", ""),
    "correct_label": ("#56b4e9", ""),
    "longer_path": ("#f0e442", ""),
    "wrong_target": ("#e69f00", ""),
    "hallucination": ("#d55e00", "..."),
    "incorrect_label": ("#cc79a7", "\\\\\\"),
    "other": ("#5c5c5c", ""),
}
"""Okabe and Ito's colours, with hatches where two that may meet are of one lightness."""


def plot_output_classes(counts: Mapping[int, OutputCounts], path: Path | str) -> Figure:
    """Draws what the model writes after each number of thoughts as stacked bars (Hao et al. 2024, section 4).

    The interval at the top of the right outputs (correct paths and correct labels together) is Wilson's, 95 %. How many
    outputs a bar stands for is written above it.

    Args:
      counts: by number of thoughts (`coconut.analysis.written_paths.count_outputs`).
      path: file to write.

    Raises:
      CoconutError: there is nothing to draw.
      OSError: the picture cannot be written.
    """
    if not counts:
        raise CoconutError("plot_output_classes: there are no outputs to draw")
    figure = Figure(figsize=(COLUMN_WIDTH, 2.9), layout="constrained")
    axes = figure.subplots()
    x = np.arange(len(counts))
    bottom = np.zeros(len(counts))
    for name in _STACK:
        shares = np.asarray([own.share(name) for own in counts.values()])
        color, hatch = _CLASS_STYLE[name]
        label = name.replace("_", " ")
        axes.bar(x, shares, 0.75, bottom, color=color, hatch=hatch, edgecolor="white", linewidth=0.4, label=label)
        bottom += shares
    for place, own in zip(x, counts.values(), strict=True):
        right = sum(own.counts[name] for name in _RIGHT)
        low, high = wilson_interval(right, own.number)
        share = right / own.number
        error = np.maximum([[share - low], [high - share]], 0)
        axes.errorbar(place, share, error, color=INK, capsize=2, elinewidth=0.9, linestyle="")
        axes.annotate(
            f"{own.number}", (place, 1), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=SMALL
        )
    axes.set_xticks(x, [str(count) for count in counts])
    axes.set(ylim=(0, 1.07))
    axes.set_xlabel("thoughts before language", fontsize=8)
    axes.set_ylabel("share of outputs (number above)", fontsize=8)
    _percent(axes)
    clean_axes(axes)
    axes.tick_params(labelsize=7)
    figure.legend(
        loc="outside upper center", ncols=3, frameon=False, fontsize=SMALL, columnspacing=1.0, handlelength=1.4
    )
    save_figure(figure, path)
    return figure


def plot_percentile_curves(curves: Mapping[int, PercentileCurves], path: Path | str) -> Figure:
    """Draws the cumulative value of the best candidates against its percentile, a panel for each number of thoughts.

    Args:
      curves: by number of thoughts (`coconut.analysis.search_tree.percentile_curves`).
      path: file to write.

    Raises:
      CoconutError: there is nothing to draw.
      OSError: the picture cannot be written.
    """
    if not any(own.values.size for own in curves.values()):
        raise CoconutError("plot_percentile_curves: there are no values to draw")
    # Two panels fit one column; more take as much of both as they need.
    width = max(COLUMN_WIDTH, min(len(curves) * COLUMN_WIDTH / 2, 2 * COLUMN_WIDTH))
    figure = Figure(figsize=(width, 2.4), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False).flatten()
    for axes, (count, own) in zip(panels, curves.items(), strict=True):
        for index, values in enumerate(own.values):
            color, _, _ = line_style(index)
            dashes = ("-", "--", "-.", ":")[index % 4]
            label = f"top {index + 1}"
            axes.plot(own.percentiles, values, color=color, linestyle=dashes, linewidth=1.4, label=label)
        axes.set(xlim=(0, 100), ylim=(-0.03, 1.03))
        axes.set_xticks((0, 50, 100))
        # Panels differ in how many questions have so many candidates.
        name = f"after {count} thought{'s' * (count != 1)}, n = {len(own.percentiles)}"
        axes.set_xlabel(f"percentile of questions\n{name}", fontsize=7)
        clean_axes(axes)
        axes.tick_params(labelsize=7)
    panels[0].set_ylabel("cumulative value", fontsize=8)
    _percent(panels[0])
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=7
    )
    save_figure(figure, path)
    return figure


def plot_values_by_height(found: Mapping[bool, LevelMeans], kind: Height, path: Path | str) -> Figure:
    """Draws mean values against the nodes' height, with 95 % intervals and the number of candidates at each point.

    Args:
      found: by whether candidates lead to the target (`coconut.analysis.search_tree.values_by_height`).
      kind: of height.
      path: file to write.

    Raises:
      CoconutError: there is nothing to draw.
      OSError: the picture cannot be written.
    """
    if not any(len(own.levels) for own in found.values()):
        raise CoconutError("plot_values_by_height: there are no candidates to draw")
    figure = Figure(figsize=(COLUMN_WIDTH, 2.5), layout="constrained")
    axes = figure.subplots()
    for index, (leads, own) in enumerate(found.items()):
        color, dashes, marker = ("#009e73", "-", "D") if leads else ("#d55e00", "--", "p")
        error = np.maximum([own.means - own.low, own.high - own.means], 0)
        x = own.levels + 0.08 * (index - (len(found) - 1) / 2)
        name = "leads to the target" if leads else "does not lead to it"
        axes.errorbar(
            x, own.means, error, color=color, linestyle=dashes, marker=marker, markersize=4, capsize=2, label=name
        )
        for place, mean, number in zip(x, own.means, own.number, strict=True):
            axes.annotate(
                f"{number}",
                (place, mean),
                xytext=(4, 4 if leads else -9),
                textcoords="offset points",
                fontsize=SMALL,
                color=color,
                path_effects=[patheffects.withStroke(linewidth=2, foreground="white")],
            )
    axes.set_xlabel(f"height of the node ({kind} way to a leaf)", fontsize=8)
    axes.set_ylabel("mean value (nodes beside)", fontsize=8)
    axes.set(ylim=(-0.03, 1.08))
    axes.set_xticks(sorted({int(level) for own in found.values() for level in own.levels}))
    axes.margins(x=0.12)
    _percent(axes)
    clean_axes(axes)
    axes.tick_params(labelsize=7)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=7)
    save_figure(figure, path)
    return figure


def _percent(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
