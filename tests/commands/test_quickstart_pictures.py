"""What the quickstart's pictures show, and what they say they show."""

import numpy as np
from matplotlib.container import ErrorbarContainer

from coconut.commands import quickstart
from coconut.tasks import small_graphs


def share(accuracy: float) -> dict:
    return {"accuracy": accuracy, "interval_95": [accuracy - 0.1, accuracy + 0.1]}


def test_chance_is_that_of_choosing(tmp_path):
    coconut = {
        "trained": {**share(0.9), "thoughts": 2.0},
        "thoughts": {"0": share(0.1), "1": share(0.3)},
        "choices": {"0": share(0.5), "1": share(0.6), "2": share(0.8), "trained": share(0.7)},
    }
    path = tmp_path / "accuracy.png"
    (axes,) = quickstart.plot_accuracies({"methods": {"coconut": coconut}}, path).axes
    written, chosen = (bars for bars in axes.containers if isinstance(bars, ErrorbarContainer))
    assert [str(bars.get_label())[:6] for bars in (written, chosen)] == ["writes", "choose"]
    assert written.lines[0] is not None and chosen.lines[0] is not None
    np.testing.assert_allclose(np.asarray(written.lines[0].get_ydata(), float), [0.1, 0.3, 0.9])
    np.testing.assert_allclose(np.asarray(chosen.lines[0].get_ydata(), float), [0.5, 0.6, 0.8])
    assert [text.get_text() for text in axes.texts] == ["chance\nof choosing"]
    # Written answers alone have no chance to draw.
    (axes,) = quickstart.plot_accuracies({"methods": {"coconut": {**coconut, "choices": {}}}}, path).axes
    assert len(axes.containers) == 1 and not axes.texts


def test_the_next_node_is_drawn_with_nothing_forced(tmp_path, monkeypatch):
    (example,) = small_graphs.generate(1, seed=1, config="e8")
    graph = example.graph
    assert graph is not None
    step, answer = np.zeros((2, 10)), np.zeros((2, 10))
    step[0, [3, 5]], answer[1, graph.target], step[1, graph.target] = [0.5, 0.25], 0.5, 0.25
    asked = []

    def first_nodes(subject, example, thoughts):
        asked.append((example, list(thoughts)))
        return step, answer

    monkeypatch.setattr(quickstart, "first_nodes", first_nodes)
    figure = quickstart.plot_next_node(None, example, 1, tmp_path / "beliefs.png")  # pyright: ignore[reportArgumentType]
    assert asked == [(example, [0, 1])]
    *panels, bar = figure.axes
    assert [axes.get_title() for axes in panels] == [
        "after 0 thoughts\nas a step 75%, as its answer 0%",
        "after 1 thought\nas a step 25%, as its answer 50%",
    ]
    assert [sorted(text.get_text() for text in axes.texts if "%" in text.get_text()) for axes in panels] == [
        ["25%", "50%"],
        ["75%"],
    ]
    assert bar.get_ylabel() == "probability to be written next"
    assert figure.get_suptitle().endswith("The node the model would write next, nothing forced")
