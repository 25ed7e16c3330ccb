"""Pictures of means that come in a table, such as layer by thought."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from coconut.analysis.drawing import BELIEF, COLUMN_WIDTH, INK
from coconut.analysis.intervals import Means
from coconut.analysis.plots import save_figure
from coconut.errors import CoconutError


def plot_matrices(panels: Mapping[str, Means], path: Path | str, *, rows: str, columns: str) -> Figure:
    """Draws means as cells, each with its value and the number of questions behind it; a cell of none stays empty.

    Colours go from 0 to 1; a value outside has the colour of the nearer end, and its number says what it is.

    Args:
      panels: by the name below each, means ``[R, C]``.
      path: file to write; png, svg or pdf.
      rows: what a row is; rows are counted from 1, from the top.
      columns: what a column is.

    Raises:
      CoconutError: there is nothing to draw.
      OSError: the picture cannot be written.
    """
    if not any(means.number.any() for means in panels.values()):
        raise CoconutError("plot_matrices: there is nothing to draw")
    height, width = next(iter(panels.values())).mean.shape
    size = (max(COLUMN_WIDTH * len(panels), 0.62 * width * len(panels) + 1.0), 0.42 * height + 1.0)
    figure = Figure(figsize=size, layout="constrained")
    for axes, (name, means) in zip(np.ravel(figure.subplots(1, len(panels), sharey=True)), panels.items(), strict=True):
        axes.imshow(np.ma.masked_invalid(means.mean), cmap=BELIEF, vmin=0, vmax=1, aspect="auto")
        for row, column in np.argwhere(means.number > 0):
            value = round(float(means.mean[row, column]), 2)  # Which may be minus zero.
            axes.text(
                column,
                row,
                f"{value + 0.0:.2f}\nn={means.number[row, column]}",
                ha="center",
                va="center",
                fontsize=6.5,
                color="white" if value > 0.5 else INK,
            )
        axes.set_xticks(range(width), [str(number + 1) for number in range(width)])
        axes.set_yticks(range(height), [str(number + 1) for number in range(height)])
        axes.set_xlabel(columns if len(panels) == 1 else f"{columns}\n{name}", fontsize=8)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=8)
    figure.axes[0].set_ylabel(rows, fontsize=8)
    save_figure(figure, path)
    return figure
