"""Pictures of `coconut.analysis.superposition`, for one column of a paper; what they show belongs into a caption."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from coconut.analysis.drawing import BELIEF, COLUMN_WIDTH, INK
from coconut.analysis.levels import LevelMeans
from coconut.analysis.paths import NODE_GROUPS, NodeGroup
from coconut.analysis.plots import clean_axes, save_figure
from coconut.analysis.search_tree_plots import SMALL
from coconut.analysis.superposition import Histograms
from coconut.errors import CoconutError

_GROUP_STYLE: Mapping[NodeGroup, tuple[str, str, str]] = {
    "unreachable": ("#5c5c5c", ":", "X"),
    "reachable": ("#e69f00", "-.", "s"),
    "frontier": ("#0072b2", "--", "o"),
    "optimal": ("#009e73", "-", "D"),
}


def plot_first_columns(attention: Float[np.ndarray, "T T"], tokens: Sequence[str], path: Path | str) -> Figure:
    """Draws the first layer's attention among the first columns as a map (Zhu et al. 2025, figure on layer 1).

    Args:
      attention: summed over heads (`coconut.analysis.superposition.first_columns`).
      tokens: what stands in each column.
      path: file to write.

    Raises:
      CoconutError: there is not a token for each column.
      OSError: the picture cannot be written.
    """
    if len(tokens) != len(attention):
        raise CoconutError(f"{len(tokens)} tokens do not fit attention among {len(attention)} columns")
    figure = Figure(figsize=(COLUMN_WIDTH, 2.9), layout="constrained")
    axes = figure.subplots()
    # A column does not see the ones behind it: these stay white.
    shown = np.where(np.tri(len(attention), dtype=bool), attention, np.nan)
    image = axes.imshow(shown, cmap=BELIEF, vmin=0, aspect="equal")
    axes.set_xticks(range(len(tokens)), tokens, fontsize=SMALL, rotation=90)
    axes.set_yticks(range(len(tokens)), tokens, fontsize=SMALL)
    axes.set_xlabel("token looked at", fontsize=8)
    axes.set_ylabel("token that looks", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("attention, summed over heads", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    save_figure(figure, path)
    return figure


def plot_edge_attention(found: Mapping[NodeGroup, LevelMeans], path: Path | str) -> Figure:
    """Draws mean attention to an edge by group at each step, with 95 % intervals.

    Args:
      found: `coconut.analysis.superposition.edge_attention_by_group`.
      path: file to write.

    Raises:
      CoconutError: there is nothing to draw.
      OSError: the picture cannot be written.
    """
    if not any(len(own.levels) for own in found.values()):
        raise CoconutError("plot_edge_attention: there are no edges to draw")
    figure = Figure(figsize=(COLUMN_WIDTH, 2.6), layout="constrained")
    axes = figure.subplots()
    for index, group in enumerate(NODE_GROUPS):
        own = found[group]
        color, dashes, marker = _GROUP_STYLE[group]
        axes.errorbar(
            own.levels + 0.06 * (index - 1.5),
            own.means,
            np.maximum([own.means - own.low, own.high - own.means], 0),
            color=color,
            linestyle=dashes,
            marker=marker,
            markersize=4,
            capsize=2,
            label=f"{group} (n = {own.number.sum()})",
        )
    axes.set_xticks(sorted({int(level) for own in found.values() for level in own.levels}))
    axes.set_xlabel("thoughts so far (k)", fontsize=8)
    axes.set_ylabel("mean attention to an edge", fontsize=8)
    axes.set_ylim(bottom=0)
    clean_axes(axes)
    axes.tick_params(labelsize=7)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=SMALL)
    save_figure(figure, path)
    return figure


def plot_histograms(histograms: Histograms, path: Path | str) -> Figure:
    """Draws the inner products of each thought with the nodes' embeddings, a panel for each thought.

    Each group's bars sum to 1, so that groups of few nodes can be seen; their numbers stand above the panel,
    in the order of the legend.

    Args:
      histograms: `coconut.analysis.superposition.histograms_by_group`.
      path: file to write.

    Raises:
      CoconutError: there are no thoughts.
      OSError: the picture cannot be written.
    """
    count = len(histograms.counts["optimal"])
    if not count:
        raise CoconutError("plot_histograms: there are no thoughts to draw")
    figure = Figure(figsize=(COLUMN_WIDTH, 1.15 * count + 0.7), layout="constrained")
    panels = figure.subplots(count, 1, sharex=True, squeeze=False).flatten()
    for thought, axes in enumerate(panels):
        numbers = []
        for group in NODE_GROUPS:
            own = histograms.counts[group][thought]
            numbers.append(f"{own.sum()}")
            if not own.sum():
                continue
            color, dashes, _ = _GROUP_STYLE[group]
            axes.stairs(own / own.sum(), histograms.edges, color=color, linestyle=dashes, linewidth=1.2)
            axes.stairs(own / own.sum(), histograms.edges, fill=True, color=color, alpha=0.15)
        # Above the panel, where no bar can hide it: it names what the panel shows.
        text = f"thought {thought + 1}: n = {', '.join(numbers)}"
        axes.annotate(text, (0, 1), xycoords="axes fraction", va="bottom", fontsize=SMALL, color=INK)
        clean_axes(axes)
        axes.tick_params(labelsize=7)
    handles = [
        panels[0].plot([], [], color=_GROUP_STYLE[group][0], linestyle=_GROUP_STYLE[group][1], label=group)[0]
        for group in NODE_GROUPS
    ]
    panels[-1].set_xlabel("inner product of thought and node embedding", fontsize=8)
    figure.supylabel("share of the group's nodes", fontsize=8)
    figure.legend(
        handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=SMALL, columnspacing=0.9
    )
    save_figure(figure, path)
    return figure
