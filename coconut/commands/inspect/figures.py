"""The figures of ``coconut inspect``, each as PNG to look at and as SVG for a paper."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from coconut.analysis.intervention_plots import plot_effects, plot_effects_by_thought
from coconut.analysis.interventions import Effect

KINDS = ("png", "svg")


class Drawing(NamedTuple):
    """One figure.

    Attributes:
      name: of its files.
      caption: what a paper would say below it.
      draw: draws it into a file.
    """

    name: str
    caption: str
    draw: Callable[[Path], Figure]


def drawings(effects: Sequence[Effect]) -> list[Drawing]:
    """The figures that there is something to draw for."""
    found = []
    if effects:
        drawing = Drawing(
            "interventions",
            "Accuracy and the share of answers that become another one, if thoughts are altered; 95 % intervals "
            "(Wilson). Ticks: accuracy before, of the same questions. n: questions that have such thoughts.",
            lambda path: plot_effects(effects, path),
        )
        found.append(drawing)
    of_one = [effect for effect in effects if effect.thoughts.isdecimal() and effect.kind != "number"]
    if of_one:
        found.append(
            Drawing(
                "interventions_by_thought",
                "The share of answers that become another one, if one thought is replaced by noise of its norm; those "
                "behind it are kept, or made again of it. 95 % intervals (Wilson). n: questions with such a thought.",
                lambda path: plot_effects_by_thought(of_one, path),
            )
        )
    return found


def draw(found: Sequence[Drawing], folder: Path) -> list[dict[str, str]]:
    """Draws them; for each the PNG, by its path from the folder's parent, and the caption."""
    for drawing in found:
        for kind in KINDS:
            drawing.draw(folder / f"{drawing.name}.{kind}")
    return [{"file": f"{folder.name}/{drawing.name}.png", "caption": drawing.caption} for drawing in found]
