"""Pictures of `coconut.analysis.experts`; what they show belongs into a caption."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from coconut.analysis.drawing import BELIEF, COLUMN_WIDTH, INK
from coconut.analysis.experts import ExpertUse
from coconut.analysis.plots import clean_axes, save_figure
from coconut.analysis.search_tree_plots import SMALL

_IN_A_ROW = 3
_MOST_WRITTEN = 16
"""Experts up to which their shares are written as numbers."""


def plot_expert_shares(use: ExpertUse, path: Path | str) -> Figure:
    """Draws the share of each expert in what each kind of column chooses, a panel a layer.

    Args:
      use: what is drawn.
      path: file to write.

    Raises:
      OSError: the picture cannot be written.
    """
    number, (kinds, count) = len(use.layers), use.shares.shape[1:]
    across = min(_IN_A_ROW, number)
    down = -(-number // across)
    width = max(COLUMN_WIDTH, min(0.28 * count, 6.0) + 0.4)
    figure = Figure(figsize=(width * across + 1.0, (0.24 * kinds + 0.7) * down), layout="constrained")
    panels = np.ravel(figure.subplots(down, across, squeeze=False, sharey=True))
    most = float(use.shares.max())
    for index, axes in enumerate(panels):
        axes.set_axis_off()
        if index >= number:
            continue
        axes.set_axis_on()
        axes.imshow(use.shares[index], cmap=BELIEF, vmin=0, vmax=most, aspect="auto")
        if count <= _MOST_WRITTEN:
            for (row, column), value in np.ndenumerate(use.shares[index]):
                color = "white" if value > most / 2 else INK
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=6, color=color)
            axes.set_xticks(range(count), [str(expert + 1) for expert in range(count)])
        axes.set_yticks(range(kinds), [f"{name} ({n:,})" for name, n in zip(use.kinds, use.columns, strict=True)])
        axes.set_xlabel(f"expert of layer {use.layers[index]}", fontsize=8)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=SMALL)
    save_figure(figure, path)
    return figure


def plot_expert_distances(use: ExpertUse, path: Path | str) -> Figure:
    """Draws how far thoughts are from tokens in each layer, and how far as many tokens are.

    Args:
      use: what is drawn.
      path: file to write.

    Raises:
      OSError: the picture cannot be written.
    """
    figure = Figure(figsize=(COLUMN_WIDTH, 2.4), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(use.layers))
    series = (
        ("thoughts to tokens", use.distance, use.interval, "#5b3fa8", "o", -0.08),
        ("as many tokens to the others", use.of_tokens, use.of_tokens_interval, "#8a8a8a", "s", 0.08),
    )
    for label, values, (low, high), color, marker, shift in series:
        bars = np.maximum([values - low, high - values], 0)
        axes.errorbar(places + shift, values, bars, label=label, color=color, marker=marker, linestyle="", capsize=2)
    axes.set_xticks(places, [str(layer) for layer in use.layers])
    axes.set_xlabel("layer", fontsize=8)
    axes.set_ylabel("total variation distance", fontsize=8)
    axes.set_ylim(0, None)
    axes.legend(fontsize=SMALL, frameon=False)
    clean_axes(axes)
    save_figure(figure, path)
    return figure
