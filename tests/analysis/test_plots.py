"""Pictures by their structure, not their pixels; and the curves they are drawn from."""

import json

import numpy as np
import pytest
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.container import ErrorbarContainer

from coconut.analysis.curves import band, curve, read_metrics, stage_spans
from coconut.analysis.plots import (
    plot_accuracy_by_mean_thoughts,
    plot_accuracy_by_thoughts,
    plot_belief,
    plot_learning_curves,
    plot_table,
)
from coconut.errors import CoconutError
from coconut.evaluation.evaluate import Evaluation
from coconut.tasks import small_graphs

PNG = b"\x89PNG\r\n\x1a\n"


def records(stages: int, seconds_per_step: float = 0.5) -> list[dict]:
    """A run of 40 steps a stage, trained records every 20 steps, validated at each end."""
    lines: list[dict] = [{"kind": "compile", "step": 0, "stage": 0, "compile_seconds": 9.0}]
    for stage in range(stages):
        for step in (40 * stage + 20, 40 * stage + 40):
            loss = None if step == 20 else 1 / step
            lines.append(
                {"kind": "train", "step": step, "stage": stage, "first_loss": loss, "seconds": seconds_per_step * step}
            )
        lines.append({"kind": "stage", "step": 40 * stage + 40, "stage": stage, "steps": 40, "learnt": stage < 2})
        lines.append({"kind": "validation", "step": 40 * stage + 40, "stage": stage, "accuracy": 0.5 + 0.1 * stage})
    return lines


def boundaries(axes) -> list[float]:
    """Where vertical lines stand."""
    ends = [np.asarray(line.get_xdata(), float) for line in axes.lines]
    return [x[0] for x in ends if len(x) == 2 and x[0] == x[1]]


def assert_png(path) -> None:
    content = path.read_bytes()
    assert content.startswith(PNG) and len(content) > 5_000
    assert [file.name for file in path.parent.iterdir() if file.name.startswith(".")] == []


def test_curves_of_a_run():
    run = records(2)
    np.testing.assert_array_equal(curve(run, "train", "first_loss", "steps").x, [20, 40, 60, 80])
    np.testing.assert_array_equal(curve(run, "train", "first_loss", "seconds").y, [np.nan, 1 / 40, 1 / 60, 1 / 80])
    # Validation records carry no seconds: they stand where their step does.
    early = {"kind": "validation", "step": 10, "stage": 0, "accuracy": 0.0}
    np.testing.assert_allclose(curve([early, *run], "validation", "accuracy", "seconds").x, [5, 20, 40])
    assert [tuple(span) for span in stage_spans(run, "seconds")] == [(0, 0, 20, True), (1, 20, 40, True)]
    stopped = [record for record in run if record["kind"] != "stage" or record["stage"] == 0]
    assert [tuple(span) for span in stage_spans(stopped, "steps")] == [(0, 0, 40, True), (1, 40, 80, None)]


def test_a_band_over_seeds():
    """Of two runs that log at different steps, one of them slower and shorter; by hand."""

    def run(points: dict[int, float | None], seconds: float) -> list[dict]:
        lines = [{"kind": "train", "step": step, "stage": 0, "loss": loss} for step, loss in points.items()]
        return [{**line, "seconds": seconds * line["step"]} for line in lines]

    one, other = run({10: 1.0, 20: 3.0, 40: 5.0}, 1), run({15: 4.0, 25: 2.0, 30: None}, 3)
    steps, x, mean, least, most = band([one, other], "train", "loss", "seconds")
    np.testing.assert_array_equal(steps, [15, 20, 25, 30])
    np.testing.assert_array_equal(x, [30, 40, 50, 60])
    np.testing.assert_array_equal(mean, [(2 + 4) / 2, (3 + 3) / 2, (3.5 + 2) / 2, np.nan])
    np.testing.assert_array_equal([least, most], [[2, 3, 2, np.nan], [4, 3, 3.5, np.nan]])
    assert all(len(part) == 0 for part in band([one, run({50: 1.0}, 1)], "train", "loss", "steps"))
    assert all(len(part) == 0 for part in band([one, []], "train", "loss", "steps"))


def test_metrics_are_read_from_a_workdir(tmp_path):
    lines = [json.dumps(record) for record in records(1)]
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join([*lines, '{"kind": "tr']))
    assert read_metrics(tmp_path) == read_metrics(file) == records(1)
    file.write_text("\n".join([lines[0], "torn", lines[1]]))
    with pytest.raises(CoconutError, match=r"metrics.jsonl, line 2: not JSON"):
        read_metrics(tmp_path)
    file.write_text('{"step": 3}\n')
    with pytest.raises(CoconutError, match="line 1: a record is a JSON object with kind and step"):
        read_metrics(tmp_path)
    with pytest.raises(CoconutError, match="No such file"):
        read_metrics(tmp_path / "nothing")


def test_learning_curves(tmp_path):
    file = tmp_path / "run.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records(1)))
    runs = {"no_cot": file, "coconut": records(4), "cot": records(1), "pause": records(2), "without": records(1)}
    path = tmp_path / "curves.png"
    figure = plot_learning_curves(runs, path, chance=0.5)
    assert_png(path)
    above, below = figure.axes
    assert below.get_xlabel() == "seconds of training"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(runs)
    assert len({line.get_color() for line in above.lines[:5]}) == 5
    for axes in (above, below):
        assert boundaries(axes) == [20, 40, 60]
    texts = [text.get_text() for text in above.texts]
    assert texts == ["chance", "coconut stage 0", "stage 1", "stage 2", "stage 3"]

    figure = plot_learning_curves(runs, path, axis="steps", stages_of="pause")
    assert [boundaries(axes) for axes in figure.axes] == [[40], [40]]
    assert boundaries(plot_learning_curves({"cot": records(1)}, path).axes[0]) == []


def test_learning_curves_of_several_seeds(tmp_path):
    file = tmp_path / "run.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records(3)))
    # The one in the middle was stopped after two stages.
    runs = {"coconut": [records(3), records(2), file], "cot": records(1)}
    figure = plot_learning_curves(runs, tmp_path / "curves.svg", axis="steps")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["coconut (n = 3)", "cot"]
    for axes in figure.axes:
        assert len(axes.collections) == 1
        mean, *longer = [line for line in axes.lines if line.get_color() == axes.lines[0].get_color()]
        assert [np.size(line.get_xdata()) for line in longer] == ([2, 2] if axes is figure.axes[0] else [3, 3])
        assert np.max(mean.get_xdata()) == 80 and boundaries(axes) == []
    figure = plot_learning_curves({"coconut": [records(3, 0.5), records(3, 1.5)]}, tmp_path / "curves.svg")
    assert boundaries(figure.axes[0]) == [40, 80]


def test_learning_curves_refuse_nothing(tmp_path):
    path = tmp_path / "curves.png"
    for runs, options, message in [
        ({}, {}, "no runs"),
        ({"cot": []}, {}, "run 'cot' has no records"),
        ({"cot": [records(1), []]}, {}, "run 'cot' has no records"),
        ({"cot": records(1)}, {"stages_of": "coconut"}, "stages_of = 'coconut'"),
    ]:
        with pytest.raises(CoconutError, match=message):
            plot_learning_curves(runs, path, **options)
    with pytest.raises(CoconutError, match="written as 'txt'"):
        plot_learning_curves({"cot": records(1)}, tmp_path / "curves.txt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_belief(tmp_path):
    graph = small_graphs.generate(1, seed=1, config="e12_matched")[0].graph
    assert graph is not None
    beliefs = np.full((4, 12), 0.01)
    beliefs[:, graph.target] = [0.89, 0.5, 0.2, 0.89]
    path = tmp_path / "belief.png"
    notes = ["a", "b", "c", "d"]
    figure = plot_belief(graph, beliefs, path, "Which?", measure="share", notes=notes)
    assert_png(path)
    *panels, bar = figure.axes
    assert bar.get_ylabel() == "share"
    counts = ("0 thoughts", "1 thought", "2 thoughts", "3 thoughts")
    titles = [f"after {count}\n{note}" for count, note in zip(counts, notes, strict=True)]
    assert [axes.get_title() for axes in panels] == titles
    for axes, belief in zip(panels, beliefs, strict=True):
        assert len(axes.collections) == 12 and len(axes.patches) == len(graph.edges)
        texts = [text.get_text() for text in axes.texts]
        assert sorted(texts) == sorted([*graph.symbols, f"{belief[graph.target]:.0%}"])
        # The nodes are drawn in the order of their symbols' texts.
        symbols = [text for text in texts if "%" not in text]
        sizes = [collection.get_sizes()[0] for collection in axes.collections if isinstance(collection, PathCollection)]
        assert graph.symbols[graph.target] == symbols[int(np.argmax(sizes))]
    with pytest.raises(CoconutError, match=r"\(4, 11\) do not fit a graph of 12"):
        plot_belief(graph, beliefs[:, :11], path)
    with pytest.raises(CoconutError, match=r"\(0, 12\) do not fit"):
        plot_belief(graph, beliefs[:0], path)
    with pytest.raises(CoconutError, match="3 notes do not fit 4 panels"):
        plot_belief(graph, beliefs, path, notes=notes[1:])
    with pytest.raises(CoconutError, match="probabilities"):
        plot_belief(graph, 2 * beliefs, path)


@pytest.mark.slow
def test_belief_panels_wrap(tmp_path):
    graph = small_graphs.generate(1, seed=1, config="e8")[0].graph
    assert graph is not None
    figure = plot_belief(graph, np.full((6, 10), 0.1), tmp_path / "belief.png")
    assert [axes.get_title() for axes in figure.axes][4:] == ["after 4 thoughts", "after 5 thoughts", "", "", ""]


def test_accuracy_by_thoughts(tmp_path):
    path = tmp_path / "accuracy.png"
    measured = Evaluation(examples=100, correct=90, tokens=4.0, thoughts=2.0, passes=5.0, ended=1.0, cut=0.0)
    results = {"coconut": {2: measured, 0: (0.5, 0.4, 0.6)}, "pause": {1: measured.to_json()}}
    figure = plot_accuracy_by_thoughts(results, path, chance=0.5)
    assert_png(path)
    (axes,) = figure.axes
    np.testing.assert_array_equal(axes.get_xticks(), [0, 1, 2])
    first, second = (container for container in axes.containers if isinstance(container, ErrorbarContainer))
    assert first.lines[0] is not None and second.lines[0] is not None
    np.testing.assert_allclose(np.asarray(first.lines[0].get_ydata(), float), [0.5, 0.9])
    np.testing.assert_allclose(np.asarray(second.lines[0].get_ydata(), float), [0.9])
    (segments,) = first.lines[2]
    assert isinstance(segments, LineCollection)
    np.testing.assert_allclose([part[:, 1] for part in segments.get_segments()], [(0.4, 0.6), measured.interval])
    with pytest.raises(CoconutError, match="no results"):
        plot_accuracy_by_thoughts({"coconut": {}}, path)


def test_accuracy_by_mean_thoughts(tmp_path):
    path = tmp_path / "halting.png"
    point = lambda threshold, thoughts, correct: {
        "threshold": threshold,
        **Evaluation(
            examples=10, correct=correct, tokens=4.0, thoughts=thoughts, ended=1.0, cut=0.0, passes=6.0
        ).to_json(),
    }
    figure = plot_accuracy_by_mean_thoughts({"entropy": [point(0.5, 2.5, 8), point(0.9, 1.5, 6)]}, path)
    assert_png(path)
    (axes,) = figure.axes
    (line,) = (container.lines[0] for container in axes.containers if isinstance(container, ErrorbarContainer))
    assert line is not None
    np.testing.assert_allclose(np.asarray(line.get_xydata(), float), [(1.5, 0.6), (2.5, 0.8)])
    assert [text.get_text() for text in axes.texts] == ["0.9", "0.5"]
    with pytest.raises(CoconutError, match="no results"):
        plot_accuracy_by_mean_thoughts({"entropy": []}, path)


def test_a_table_has_a_place_for_each_method_and_none_for_what_was_not_measured(tmp_path):
    altered = {"removed": {"accuracy": 0.5}, "zero": None, "noise": {"accuracy": 0.25}}
    own = {"accuracy": 0.75, "interval_95": [0.6, 0.8], "accuracies": [0.7, 0.8], "interventions": altered}
    without = {**own, "accuracy": 0.4, "interval_95": [0.3, 0.5], "interventions": dict.fromkeys(altered)}
    path = tmp_path / "table.png"
    figure = plot_table({"coconut": own, "no_cot": without}, path, shortcut=0.9)
    assert_png(path)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["coconut", "no_cot"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first one on top
    bars = [container for container in axes.containers if isinstance(container, ErrorbarContainer)]
    for bar, row in zip(bars, (own, without), strict=True):
        (segments,) = bar.lines[2]
        assert isinstance(segments, LineCollection)
        np.testing.assert_allclose(segments.get_segments()[0][:, 0], row["interval_95"])
    drawn = {str(line.get_label()): line for line in axes.lines if str(line.get_label()).startswith("thoughts")}
    assert {name: np.asarray(line.get_xdata()).tolist() for name, line in drawn.items()} == {
        "thoughts: removed": [0.5],
        "thoughts: noise": [0.25],
    }
    (shortcut,) = (line for line in axes.lines if line.get_label() == "best shortcut")
    assert np.asarray(shortcut.get_xdata()).tolist() == [0.9, 0.9]
    with pytest.raises(CoconutError, match="no methods"):
        plot_table({}, path)
