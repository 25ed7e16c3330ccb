"""Pictures of the search tree and of superposition, by their structure."""

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.patches import StepPatch

from coconut.analysis.levels import LevelMeans
from coconut.analysis.paths import NodeGroup
from coconut.analysis.search_tree import PercentileCurves
from coconut.analysis.search_tree_plots import (
    COLUMN_WIDTH,
    plot_output_classes,
    plot_percentile_curves,
    plot_values_by_height,
)
from coconut.analysis.superposition import Histograms
from coconut.analysis.superposition_plots import plot_edge_attention, plot_first_columns, plot_histograms
from coconut.analysis.written_paths import OUTPUT_CLASSES, OutputCounts
from coconut.errors import CoconutError


def assert_picture(figure, path, *labels: str) -> None:
    """It is written, as wide as a column, and its axes are named."""
    assert path.stat().st_size > 3_000 and figure.get_size_inches()[0] == COLUMN_WIDTH
    named = {text for axes in figure.axes for text in (axes.get_xlabel(), axes.get_ylabel())}
    assert set(labels) <= named | {figure.get_supylabel()}
    assert not figure.get_suptitle() and not any(axes.get_title() for axes in figure.axes)


def means(levels, values, number) -> LevelMeans:
    low, high = np.asarray(values) - 0.1, np.asarray(values) + 0.2
    return LevelMeans(np.asarray(levels, int), np.asarray(values), low, high, *[np.asarray(number, int)] * 2)


def error_ends(bars: ErrorbarContainer) -> list[tuple[float, float]]:
    (segments,) = bars.lines[2]
    assert isinstance(segments, LineCollection)
    return [tuple(np.asarray(part)[:, 1]) for part in segments.get_segments()]


def test_output_classes_are_stacked(tmp_path):
    none = dict.fromkeys(OUTPUT_CLASSES, 0)
    counts = {
        0: OutputCounts(counts={**none, "correct_path": 2, "hallucination": 1, "correct_label": 1}, right=none),
        2: OutputCounts(counts={**none, "other": 5, "correct_label": 5}, right=none),
    }
    path = tmp_path / "classes.pdf"
    figure = plot_output_classes(counts, path)
    assert_picture(figure, path, "thoughts before language", "share of outputs (number above)")
    (axes,) = figure.axes
    bars = {str(bar.get_label()): bar for bar in axes.containers if isinstance(bar, BarContainer)}
    assert sorted(bars) == sorted(name.replace("_", " ") for name in OUTPUT_CLASSES)
    assert [patch.get_height() for patch in bars["correct path"]] == [0.5, 0]
    # What is right stands at the bottom, and the interval at its top.
    assert [patch.get_y() for patch in bars["correct label"]] == [0.5, 0]
    assert [patch.get_y() for patch in bars["hallucination"]] == [0.75, 0.5]
    assert [patch.get_y() + patch.get_height() for patch in bars["other"]] == [1, 1]
    first, second = (bar for bar in axes.containers if isinstance(bar, ErrorbarContainer))
    np.testing.assert_allclose(error_ends(first), [(0.30064, 0.95441)], atol=1e-5)  # Wilson, 3 of 4
    np.testing.assert_allclose(error_ends(second), [(0.23659, 0.76341)], atol=1e-5)  # 5 of 10
    assert [text.get_text() for text in axes.texts] == ["4", "10"]
    with pytest.raises(CoconutError, match="no outputs"):
        plot_output_classes({}, path)


def test_percentile_curves(tmp_path):
    path = tmp_path / "curves.svg"
    curves = {
        1: PercentileCurves(np.asarray([25.0, 75.0]), np.asarray([[0.1, 0.4], [0.3, 0.9]])),
        2: PercentileCurves(np.asarray([50.0]), np.asarray([[0.5], [0.6]])),
    }
    figure = plot_percentile_curves(curves, path)
    names = ("percentile of questions\nafter 1 thought, n = 2", "percentile of questions\nafter 2 thoughts, n = 1")
    assert_picture(figure, path, *names, "cumulative value")
    lines = figure.axes[0].lines
    np.testing.assert_allclose(np.asarray(lines[1].get_xydata(), float), [(25, 0.3), (75, 0.9)])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["top 1", "top 2"]
    assert lines[0].get_linestyle() != lines[1].get_linestyle()
    with pytest.raises(CoconutError, match="no values"):
        plot_percentile_curves({1: PercentileCurves(np.zeros(0), np.zeros((2, 0)))}, path)


def test_values_by_height_and_edge_attention(tmp_path):
    path = tmp_path / "height.png"
    found = {True: means([1, 2], [0.5, 0.4], [7, 3]), False: means([0], [0.2], [9])}
    figure = plot_values_by_height(found, "longest", path)
    assert_picture(figure, path, "height of the node (longest way to a leaf)", "mean value (nodes beside)")
    (axes,) = figure.axes
    right, wrong = (bars for bars in axes.containers if isinstance(bars, ErrorbarContainer))
    np.testing.assert_allclose(error_ends(right), [(0.4, 0.7), (0.3, 0.6)])
    assert wrong.get_label() == "does not lead to it" and axes.get_xticks().tolist() == [0, 1, 2]
    assert [text.get_text() for text in axes.texts] == ["7", "3", "9"]

    nothing = means([], [], [])
    groups: dict[NodeGroup, LevelMeans] = {
        "optimal": found[True],
        "frontier": found[False],
        "reachable": nothing,
        "unreachable": nothing,
    }
    figure = plot_edge_attention(groups, path)
    assert_picture(figure, path, "thoughts so far (k)", "mean attention to an edge")
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["unreachable (n = 0)", "reachable (n = 0)", "frontier (n = 9)", "optimal (n = 10)"]
    for draw, empty in (
        (lambda: plot_values_by_height({True: nothing, False: nothing}, "shortest", path), "no candidates"),
        (lambda: plot_edge_attention(dict.fromkeys(groups, nothing), path), "no edges"),
    ):
        with pytest.raises(CoconutError, match=empty):
            draw()


def test_maps_and_histograms(tmp_path):
    path = tmp_path / "map.png"
    attention = np.asarray([[2.0, 0, 0], [1, 1, 0], [0.5, 0, 1.5]])
    figure = plot_first_columns(attention, ["<eos>", "1", "|"], path)
    assert_picture(figure, path, "token looked at", "token that looks", "attention, summed over heads")
    shown = np.ma.filled(np.ma.masked_invalid(figure.axes[0].images[0].get_array()), -1)  # pyright: ignore
    np.testing.assert_array_equal(shown, [[2, -1, -1], [1, 1, -1], [0.5, 0, 1.5]])
    with pytest.raises(CoconutError, match="2 tokens do not fit attention among 3"):
        plot_first_columns(attention, ["1", "2"], path)

    counts: dict[NodeGroup, list] = {
        "unreachable": [[3, 1, 0]],
        "reachable": [[0, 0, 0]],
        "frontier": [[0, 1, 0]],
        "optimal": [[0, 0, 2]],
    }
    histograms = Histograms(np.arange(4.0), {group: np.asarray(own) for group, own in counts.items()})
    figure = plot_histograms(histograms, path)
    assert_picture(figure, path, "inner product of thought and node embedding", "share of the group's nodes")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["thought 1: n = 4, 0, 1, 2"]
    # A line and a filling for each group that has nodes, each summing to 1.
    drawn = [patch.get_data()[0] for patch in axes.patches if isinstance(patch, StepPatch)]
    assert len(drawn) == 6 and all(sum(values) == 1 for values in drawn)
    with pytest.raises(CoconutError, match="no thoughts"):
        plot_histograms(Histograms(np.arange(4.0), {group: np.zeros((0, 3), int) for group in counts}), path)
