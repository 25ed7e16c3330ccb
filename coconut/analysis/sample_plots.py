"""Pictures of what several samples of each question are worth."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from coconut.analysis.plots import clean_axes, draw_accuracies, save_figure
from coconut.errors import CoconutError


def plot_samples(content: Mapping[str, Any], names: Mapping[str, str], path: Path | str) -> Figure:
    """Draws the accuracy of several samples, a line for each measure, with 95 % intervals.

    Of one budget over the number of samples; of several ones over the thoughts that were allowed, with all samples, and
    with one.

    Args:
      content: what ``coconut evaluate --samples`` says: ``count``, and ``budgets``, each with its ``thoughts`` and
        ``curves``.
      names: of the measures, and what they are called in the picture.
      path: file to write.

    Raises:
      CoconutError: there is nothing to draw.
      OSError: the picture cannot be written.
    """
    budgets = content["budgets"]
    if not budgets:
        raise CoconutError("plot_samples: there are no samples to draw")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    if len(budgets) == 1:
        lines = {text: budgets[0]["curves"][name] for name, text in names.items()}
        x = [point["samples"] for point in next(iter(lines.values()))]
        axes.set_xscale("log", base=2)
        axes.set(xlabel="samples of a question, n")
        # Set apart a little, so that intervals of equal accuracy stay readable.
        places = lambda index: np.asarray(x) * 1.035 ** (index - (len(lines) - 1) / 2)
    else:
        budgets = sorted(budgets, key=lambda budget: budget["thoughts"])
        lines = {"one sample": [budget["curves"]["pass_at"][0] for budget in budgets]}
        lines |= {text: [budget["curves"][name][-1] for budget in budgets] for name, text in names.items()}
        x = [budget["thoughts"] for budget in budgets]
        axes.set(xlabel=f"thoughts allowed, n = {content['count']} samples of a question")
        places = lambda index: np.asarray(x) + 0.05 * (index - (len(lines) - 1) / 2)
    for index, (text, points) in enumerate(lines.items()):
        draw_accuracies(axes, places(index), points, index, text)
    axes.set_xticks(x, [str(number) for number in x])
    axes.minorticks_off()
    axes.set(ylabel="accuracy", ylim=(-0.03, 1.03))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    clean_axes(axes)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    save_figure(figure, path)
    return figure
