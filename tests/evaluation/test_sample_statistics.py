"""Measures of several samples: hand-made tables, and obvious slow versions that look at every subset."""

import itertools

import numpy as np
import pytest

from coconut.errors import CoconutError
from coconut.evaluation.sample_statistics import (
    best,
    expected_largest,
    of_chosen,
    pass_at,
    sizes_up_to,
    subsets_of,
    vote,
)


def test_sizes_double_up_to_all_samples() -> None:
    assert sizes_up_to(16) == [1, 2, 4, 8, 16]
    assert sizes_up_to(6, (3, 6)) == [1, 2, 3, 4, 6]
    assert sizes_up_to(1) == [1]
    for size in (0, 7):
        with pytest.raises(CoconutError, match=f"pass@{size}: .* at most the 6 that are drawn"):
            sizes_up_to(6, (size,))


def test_pass_at_k_by_hand() -> None:
    """One right of four: two samples hold it in 3 of 6 pairs. Two right: 5 of 6 pairs hold one."""
    right = np.asarray([[0, 0, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
    np.testing.assert_allclose(pass_at(right, 1), right.mean(1))
    np.testing.assert_allclose(pass_at(right, 2), [3 / 6, 5 / 6, 0, 1])
    np.testing.assert_allclose(pass_at(right, 4), [1, 1, 0, 1])


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_one() -> None:
    right = np.random.default_rng(0).random((20, 7)) < 0.3
    for k in range(1, 8):
        slow = np.mean([right[:, own].any(1) for own in itertools.combinations(range(7), k)], 0)
        np.testing.assert_allclose(pass_at(right, k), slow, atol=1e-12)
        np.testing.assert_allclose(expected_largest(right.astype(float), k), slow, atol=1e-12)


def test_the_largest_of_a_subset_on_average() -> None:
    """Of 1, 5 and 9 the pairs' largest are 5, 9 and 9; their smallest 1, 1 and 5."""
    values = np.asarray([[5.0, 1.0, 9.0]])
    np.testing.assert_allclose(expected_largest(values, 2), [23 / 3])
    np.testing.assert_allclose(-expected_largest(-values, 2), [7 / 3])
    np.testing.assert_allclose(expected_largest(values, 3), [9])


def test_votes() -> None:
    answers = np.asarray(
        [
            [0, 1, 1, 2],  # Two votes win.
            [2, 1, 1, 2],  # Of equals the one seen first, whatever its number.
            [0, 1, 2, 3],
            [-1, -1, -1, 0],  # What is no answer has no vote.
            [-1, -1, -1, -1],
        ]
    )
    assert vote(answers).tolist() == [1, 0, 0, 3, 0]


def test_the_best_is_the_first_of_equals() -> None:
    scores = np.asarray([[0.1, 0.9, 0.9], [-np.inf, -np.inf, -np.inf], [-np.inf, -5.0, -6.0]])
    assert best(scores).tolist() == [1, 0, 1]


def test_subsets_are_all_there_are_or_drawn_without_replacement() -> None:
    assert subsets_of(4, 3, 4, 0).tolist() == [[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]]
    assert subsets_of(9, 9, 1, 0).tolist() == [list(range(9))]
    drawn = subsets_of(16, 8, 50, 0)
    assert drawn.shape == (50, 8)
    assert (np.diff(drawn, axis=1) > 0).all() and drawn.min() >= 0 and drawn.max() < 16
    assert len({tuple(own) for own in drawn.tolist()}) > 40
    np.testing.assert_array_equal(drawn, subsets_of(16, 8, 50, 0))
    assert (drawn != subsets_of(16, 8, 50, 1)).any()


def test_what_is_chosen_is_right_as_often_as_over_all_subsets() -> None:
    rng = np.random.default_rng(2)
    right, scores, answers = rng.random((30, 6)) < 0.5, rng.random((30, 6)), rng.integers(-1, 3, (30, 6))
    for values, choose in ((scores, best), (answers, vote)):
        for size in (1, 3, 6):
            subsets = list(itertools.combinations(range(6), size))
            slow = [
                np.mean([right[q, own[choose(values[q : q + 1, list(own)])[0]]] for own in subsets]) for q in range(30)
            ]
            found = of_chosen(right, values, choose, size, subsets=20)
            np.testing.assert_allclose(found, slow, atol=1e-12)
    # One sample leaves nothing to choose; all of them leave nothing to draw.
    np.testing.assert_allclose(of_chosen(right, scores, best, 1), right.mean(1))
    np.testing.assert_array_equal(of_chosen(right, scores, best, 6, seed=1), right[np.arange(30), scores.argmax(1)])
    # Drawn subsets come near all of them.
    wide_right, wide = rng.random((400, 12)) < 0.5, rng.random((400, 12))
    drawn = of_chosen(wide_right, wide, best, 4, subsets=100).mean()
    assert drawn == pytest.approx(of_chosen(wide_right, wide, best, 4, subsets=495).mean(), abs=0.02)
