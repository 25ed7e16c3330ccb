"""Pictures of what interventions on thoughts do."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from coconut.analysis.drawing import COLUMN_WIDTH, INK
from coconut.analysis.interventions import Effect
from coconut.analysis.plots import clean_axes, line_style, save_figure
from coconut.errors import CoconutError


def plot_effects(effects: Sequence[Effect], path: Path | str) -> Figure:
    """Draws accuracy under each intervention, and the share of changed answers, with 95 % intervals.

    The accuracy before is that of the same questions, which are not the same for all interventions: it is drawn for
    each of them. Behind each name stands the number of questions.

    Args:
      effects: of the interventions, from top to bottom.
      path: file to write; png, svg or pdf.

    Raises:
      CoconutError: there is nothing to draw.
      OSError: the picture cannot be written.
    """
    if not effects:
        raise CoconutError("plot_effects: there are no effects to draw")
    figure = Figure(figsize=(2 * COLUMN_WIDTH, 0.9 + 0.24 * len(effects)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    y = np.arange(len(effects))
    for axes, name, shares, intervals in (
        (left, "accuracy", [x.accuracy for x in effects], [x.accuracy_interval for x in effects]),
        (right, "answers that change", [x.flips for x in effects], [x.flips_interval for x in effects]),
    ):
        low, high = np.asarray(intervals).T
        error = np.maximum([np.asarray(shares) - low, high - np.asarray(shares)], 0)
        axes.errorbar(
            shares, y, xerr=error, linestyle="", marker="o", markersize=3.5, color=line_style(0)[0], capsize=2
        )
        axes.set(xlabel=name, xlim=(-0.03, 1.03))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        clean_axes(axes)
        axes.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    left.plot([x.accuracy_before for x in effects], y, "|", color=INK, markersize=9, label="before, same questions")
    left.set_yticks(y, [f"{x.label}{' *' * x.forced}  n={x.examples}" for x in effects], fontsize=7)
    left.invert_yaxis()
    figure.legend(loc="outside upper center", frameon=False, fontsize=8)
    if any(effect.forced for effect in effects):
        figure.supxlabel("* another number of thoughts: the answer is forced behind them", fontsize=7)
    save_figure(figure, path)
    return figure


def plot_effects_by_thought(effects: Sequence[Effect], path: Path | str) -> Figure:
    """Draws the share of changed answers over the one thought that is altered, with 95 % intervals.

    Beside each point stands its number of questions: those that have such a thought.

    Args:
      effects: of interventions on one thought each; a line for each kind and each fate of the thoughts behind.
      path: file to write; png, svg or pdf.

    Raises:
      CoconutError: there is nothing to draw, or an effect is not that of one thought.
      OSError: the picture cannot be written.
    """
    lines: dict[str, list[Effect]] = {}
    for effect in effects:
        if not effect.thoughts.isdecimal() or effect.kind == "number":
            raise CoconutError(f"plot_effects_by_thought: {effect.label!r} is not done to one thought")
        lines.setdefault(f"{effect.kind}, later {effect.later}", []).append(effect)
    if not lines:
        raise CoconutError("plot_effects_by_thought: there are no effects to draw")
    figure = Figure(figsize=(COLUMN_WIDTH, 2.6), layout="constrained")
    axes = figure.subplots()
    for index, (name, own) in enumerate(lines.items()):
        color, dashes, marker = line_style(index)
        x = np.asarray([int(effect.thoughts) for effect in own]) + 0.08 * (index - (len(lines) - 1) / 2)
        flips = np.asarray([effect.flips for effect in own])
        low, high = np.asarray([effect.flips_interval for effect in own]).T
        axes.errorbar(
            x,
            flips,
            yerr=np.maximum([flips - low, high - flips], 0),
            color=color,
            linestyle=dashes,
            marker=marker,
            markersize=4,
            capsize=2,
            linewidth=1,
            label=name,
        )
    first = next(iter(lines.values()))
    numbers = [int(effect.thoughts) for effect in first]
    axes.set_xticks(numbers, [f"{number}\nn={effect.examples}" for number, effect in zip(numbers, first, strict=True)])
    axes.set(xlabel="altered thought", ylabel="answers that change", ylim=(-0.03, 1.03))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    clean_axes(axes)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=7)
    save_figure(figure, path)
    return figure
