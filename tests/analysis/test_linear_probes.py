"""Probes of states in which it is known where the label is."""

from typing import Any

import numpy as np
import pytest

from coconut.analysis.linear_probes import probe, ridge_weights
from coconut.errors import CoconutError
from coconut.evaluation.evaluate import wilson_interval

RNG = np.random.default_rng(0)
QUESTIONS, WIDTH = 240, 12
LABELS = RNG.integers(3, size=QUESTIONS)
TYPES = RNG.integers(8, size=QUESTIONS)
DIRECTIONS = RNG.normal(size=(8, WIDTH))


def noise(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape)


@pytest.mark.parametrize("rows", [9, 40])  # Fewer rows than features, and more.
def test_ridge_weights_are_those_of_least_squares(rows):
    x, z, y = noise(rows, WIDTH), noise(5, WIDTH), noise(rows, 2)
    found = ridge_weights(x, z, 0.3) @ y
    strength = 0.3 * ((x - x.mean(0)) ** 2).sum() / WIDTH
    # The penalty as further rows whose target is nothing; the intercept has none.
    system = np.concatenate([np.c_[x, np.ones(rows)], np.c_[np.sqrt(strength) * np.eye(WIDTH), np.zeros(WIDTH)]])
    slopes, *_ = np.linalg.lstsq(system, np.concatenate([y, np.zeros((WIDTH, 2))]), rcond=None)
    np.testing.assert_allclose(found, np.c_[z, np.ones(5)] @ slopes, atol=1e-10)
    np.testing.assert_allclose(ridge_weights(np.ones((4, 2)), z[:, :2], 0.3) @ np.arange(4.0), np.full(5, 1.5))


def test_the_label_is_found_where_it_is():
    # Layer 1 has the label in its second thought alone, which the last forty questions lack.
    states = noise(2, QUESTIONS, 3, WIDTH)
    states[1, :, 1] += 4 * DIRECTIONS[LABELS]
    present = np.ones((QUESTIONS, 3), bool)
    present[-40:, 1:] = False
    present[:, 2] = False
    # What stands where there is no thought must not count.
    states[1, -40:, 1] = 1e3 * DIRECTIONS[(LABELS[-40:] + 1) % 3]
    found = probe(states, present, LABELS, TYPES, permutations=99)
    assert found.number.tolist() == [240, 200, 0]
    assert found.accuracy[1, 1] > 0.97 and found.p_value[1, 1] == 0.01
    assert found.control[1, 1] < 0.5 and found.selectivity[1, 1] > 0.5
    others = found.accuracy[[0, 0, 1], [0, 1, 0]]
    assert (np.abs(others - 1 / 3) < 0.12).all() and (found.p_value[[0, 0, 1], [0, 1, 0]] > 0.01).all()
    assert np.isnan(found.accuracy[:, 2]).all() and np.isnan(found.majority[2])
    counts = np.bincount(LABELS[:200])
    assert found.majority[1] == counts.max() / 200
    right = round(found.accuracy[1, 1] * 200)
    assert (found.low[1, 1], found.high[1, 1]) == wilson_interval(right, 200)


def test_what_the_type_alone_says_is_not_selective():
    # The label is the type's own, and the states hold the type: accurate, and so is every control task.
    by_type = np.arange(8) % 2
    states = (3 * DIRECTIONS[TYPES] + 0.3 * noise(QUESTIONS, WIDTH))[None, :, None]
    found = probe(states, np.ones((QUESTIONS, 1), bool), by_type[TYPES], TYPES, permutations=9)
    assert found.accuracy[0, 0] > 0.97 and found.control[0, 0] > 0.9 and abs(found.selectivity[0, 0]) < 0.08


def test_control_labels_have_the_frequencies_of_the_real_ones():
    # One label of ten is rare. A state that says nothing makes the probe say the frequent one: as often right with
    # control tasks as with the real one.
    labels = (np.arange(QUESTIONS) % 10 == 0).astype(int)
    states, present = np.ones((1, QUESTIONS, 1, 2)), np.ones((QUESTIONS, 1), bool)
    found = probe(states, present, labels, np.arange(QUESTIONS) // 2, permutations=9)
    assert found.accuracy[0, 0] == found.majority[0] == 0.9 and found.p_value[0, 0] == 1.0
    assert found.control[0, 0] == pytest.approx(0.9, abs=1e-9)
    # Nor do few types make a few labels frequent: eight of eight equally frequent ones.
    even = np.arange(QUESTIONS) % 8
    found = probe(noise(1, QUESTIONS, 1, 2), present, even, np.arange(QUESTIONS) // 30, permutations=9)
    assert found.majority[0] == 1 / 8 and found.control[0, 0] < 0.2


def test_questions_without_a_label_count_nowhere():
    labels = LABELS.copy()
    labels[:100] = -1
    states = noise(1, QUESTIONS, 1, WIDTH)
    whole = probe(states, np.ones((QUESTIONS, 1), bool), labels, TYPES, permutations=9)
    rest = probe(states[:, 100:], np.ones((140, 1), bool), labels[100:], TYPES[100:], permutations=9)
    assert whole.number.tolist() == [140]
    np.testing.assert_array_equal(whole.accuracy, rest.accuracy)


def test_what_cannot_be_probed_is_refused():
    states, present = noise(1, QUESTIONS, 1, WIDTH), np.ones((QUESTIONS, 1), bool)
    with pytest.raises(CoconutError, match="labels: 1 different ones"):
        probe(states, present, np.zeros(QUESTIONS, int), TYPES)
    with pytest.raises(CoconutError, match="types: no two questions share one"):
        probe(states, present, LABELS, np.arange(QUESTIONS))
    refused: list[dict[str, Any]] = [{"folds": 1}, {"penalty": 0.0}, {"permutations": 0}, {"controls": 0}]
    for setting in refused:
        [(name, value)] = setting.items()
        with pytest.raises(CoconutError, match=f"{name} = {value}"):
            probe(states, present, LABELS, TYPES, **setting)
