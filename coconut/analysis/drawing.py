"""One question's graph on one pair of axes, coloured by a belief over its nodes."""

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch

from coconut.tasks.graphs import adjacency, reachable
from coconut.types import Graph

INK = "#222222"
COLUMN_WIDTH = 3.3
"""Inches of a column of a paper."""
BELIEF = LinearSegmentedColormap.from_list("belief", ["#ffffff", "#dcd6f0", "#9d8fd0", "#5b3fa8", "#33107c"])
"""Colours of a belief from 0 to 1."""
COLUMN, LAYER = 0.54, 0.68
"""Inches between neighbouring nodes of a layer, and between layers."""

_EDGE, _FAINT_EDGE = "#6e6e6e", "#c4c4c4"
_NODE, _FAINT_NODE = "#8a8a8a", "#b5b5b5"
_TARGET, _NEGATIVE = "#009e73", "#d55e00"
_CLEAR = 0.17
"""Inches an edge stays away from the middle of a node that is not its own."""
_ROOM = {"p": 1.3}
"""Factors on the areas of shapes that hold less text than their area says."""
_WRITTEN = 0.05
"""The least belief that is written as a number."""


def draw_belief(
    axes: Axes, graph: Graph, places: Mapping[int, tuple[float, float]], belief: Float[np.ndarray, " N"]
) -> None:
    """Draws a graph, its nodes coloured and sized by a belief; beliefs of 5 % and more are written beside them.

    Args:
      axes: what to draw on.
      graph: the graph.
      places: of the nodes; `coconut.analysis.layout.layered_positions`.
      belief: by node id.
    """
    below = reachable(graph, graph.root)
    parents = adjacency(len(places), graph.edges, "up")
    area = {node: 190.0 + 330.0 * float(belief[node]) for node in places}
    for parent, child in graph.edges:
        axes.add_patch(
            FancyArrowPatch(
                places[parent],
                places[child],
                arrowstyle="-|>,head_length=4,head_width=2",
                connectionstyle=f"arc3,rad={_bend(places, parent, child)}",
                shrinkA=0.55 * math.sqrt(area[parent]),
                shrinkB=0.55 * math.sqrt(area[child]) + 1,
                linewidth=0.9,
                clip_on=False,  # A curved one may leave the nodes' box.
                color=_EDGE if parent in below else _FAINT_EDGE,
                zorder=2,
            )
        )
    for node, (x, y) in places.items():
        shape, edge, line = _node_style(graph, node)
        axes.scatter(
            x,
            y,
            s=area[node] * _ROOM.get(shape, 1.0),
            marker=shape,
            color=BELIEF(float(belief[node])),
            edgecolors=edge,
            linewidths=line,
            zorder=3,
        )
        dark = belief[node] > 0.5
        axes.text(
            x,
            y,
            graph.symbols[node],
            ha="center",
            va="center_baseline",
            fontsize=8.5,
            zorder=4,
            color="white" if dark else INK,
        )
        if belief[node] >= _WRITTEN:
            # On the side that no edge from above comes from.
            side = -1 if sum(places[parent][0] - x for parent in parents[node]) > 0 else 1
            offset = 0.4 * math.sqrt(area[node])
            axes.annotate(
                f"{belief[node]:.0%}",
                (x, y),
                xytext=(side * offset, offset),
                textcoords="offset points",
                ha="left" if side == 1 else "right",
                va="bottom",
                fontsize=7,
                color="#33107c",
                zorder=5,
                path_effects=[patheffects.withStroke(linewidth=2, foreground="white")],
            )
    right, bottom = max(x for x, _ in places.values()), min(y for _, y in places.values())
    axes.set(xlim=(-0.6, right + 0.75), ylim=(bottom - 0.45, 0.45))


def _bend(places: Mapping[int, tuple[float, float]], parent: int, child: int) -> float:
    """How much an edge curves (matplotlib's ``arc3``): as little as keeps it clear of the other nodes."""
    scale = np.asarray([COLUMN, LAYER])
    start, end = (np.asarray(places[node]) * scale for node in (parent, child))
    others = np.asarray([place for node, place in places.items() if node not in (parent, child)]).reshape(-1, 2) * scale
    if not len(others):
        return 0.0
    along = np.linspace(0, 1, 33)[:, None]
    across = np.asarray([end[1] - start[1], start[0] - end[0]])
    clearances = {}
    for bend in (0.0, 0.15, -0.15, 0.3, -0.3, 0.45, -0.45):
        control = (start + end) / 2 + bend * across
        points = (1 - along) ** 2 * start + 2 * along * (1 - along) * control + along**2 * end
        clearances[bend] = float(np.linalg.norm(points[:, None] - others, axis=-1).min())
        if clearances[bend] > _CLEAR:
            return bend
    return max(clearances, key=clearances.__getitem__)


def _node_style(graph: Graph, node: int) -> tuple[str, str, float]:
    """Marker, outline colour and outline width: the special nodes differ in all three, for whoever sees one of them."""
    if node == graph.root:
        return "s", INK, 1.8
    if node == graph.target:
        return "D", _TARGET, 2.2
    if node == graph.negative:
        return "p", _NEGATIVE, 2.2
    return "o", _NODE if node in reachable(graph, graph.root) else _FAINT_NODE, 0.9


def belief_legend(graph: Graph) -> list[Line2D]:
    """What the shapes and the pale edges mean."""
    names = {graph.root: "root asked about", graph.target: "right option", graph.negative: "wrong option"}
    handles = []
    for node, name in names.items():
        shape, edge, line = _node_style(graph, node)
        handles.append(
            Line2D(
                [],
                [],
                linestyle="",
                marker=shape,
                markersize=10,
                markerfacecolor="white",
                markeredgecolor=edge,
                markeredgewidth=line,
                label=name,
            )
        )
    return [*handles, Line2D([], [], color=_FAINT_EDGE, label="edge the root does not reach")]
