"""Distances, cosines and ranks of vectors whose answers are known."""

import numpy as np
import pytest

from coconut.analysis.geometry import effective_rank, geometry, nearest_tokens, pairs_of
from coconut.errors import CoconutError


def test_pairs():
    pairs = pairs_of(np.asarray([[3.0, 0.0], [0.0, 4.0], [-3.0, 0.0]]))
    np.testing.assert_allclose(pairs.cosine, [[1, 0, -1], [0, 1, 0], [-1, 0, 1]], atol=1e-12)
    np.testing.assert_allclose(pairs.distance, [[0, 5, 6], [5, 0, 5], [6, 5, 0]])
    assert pairs.means() == pytest.approx((-1 / 3, 16 / 3))
    assert np.isnan(pairs_of(np.ones((1, 2))).means()).all() and pairs_of(np.ones((0, 2))).cosine.shape == (0, 0)
    # Long and near, in single precision.
    near = np.asarray([[1e4, 0.0], [1e4, 1e-2]], np.float32)
    assert pairs_of(near).distance[0, 1] == pytest.approx(1e-2, rel=1e-6)


def test_effective_rank_counts_directions():
    assert effective_rank(np.eye(5)[:3] * 7.0) == pytest.approx(3)
    line = np.outer([1.0, -2.0, 3.0], [1.0, 2.0, 2.0, 0.0])
    assert effective_rank(line) == pytest.approx(1)
    # Two directions of singular values 3 and 1: entropy of (3/4, 1/4).
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert effective_rank(np.asarray([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]])) == pytest.approx(np.exp(entropy))
    # A large common part hides what differs, until it is taken off.
    shifted = np.concatenate([np.eye(2), -np.eye(2)]) + 1000.0
    assert effective_rank(shifted) < 1.02 and effective_rank(shifted, centred=True) == pytest.approx(2)
    assert np.isnan(effective_rank(np.zeros((3, 2)))) and np.isnan(effective_rank(np.ones((3, 2)), centred=True))


def test_the_nearest_token_depends_on_the_measure():
    table = np.asarray([[1.0, 0.0], [0.0, 9.0], [0.0, 0.0], [-2.0, -2.0]])
    found = nearest_tokens(np.asarray([[0.2, 1.0], [5.0, 1.0], [0.0, 0.0]] * 200), table)
    assert found.by_distance[:3].tolist() == [2, 0, 2] and found.by_cosine[:2].tolist() == [1, 0]
    np.testing.assert_allclose(found.distance[:3], [np.sqrt(1.04), np.sqrt(17), 0])
    np.testing.assert_allclose(found.cosine[:3], [1 / np.sqrt(1.04), 5 / np.sqrt(26), np.nan])
    np.testing.assert_allclose(found.to_mean[0], np.hypot(0.2 + 0.25, 1 - 1.75))
    np.testing.assert_array_equal(found.distance, np.tile(found.distance[:3], 200))
    # A little nearer to a token than to nothing.
    assert nearest_tokens(np.asarray([[0.6, 0.0]]), table).by_distance.tolist() == [0]
    with pytest.raises(CoconutError, match="embeddings: there are none"):
        nearest_tokens(np.ones((1, 2)), np.ones((0, 2)))
    assert nearest_tokens(np.ones((0, 2)), table).cosine.shape == (0,)


def test_the_two_kinds_of_collapse_are_told_apart():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    # Every question thinks one thing twice or three times; no two questions think the same.
    inside = geometry([np.tile(basis[question], (2 + question % 2, 1)) for question in range(6)])
    assert inside.cosine == pytest.approx(np.ones(6)) and inside.rank == pytest.approx(np.ones(6))
    assert inside.distance == pytest.approx(np.zeros(6), abs=1e-12)
    assert inside.cosine_between == pytest.approx(np.zeros(3), abs=1e-12)
    assert inside.distance_between == pytest.approx(np.full(3, np.sqrt(2)))
    # Six orthogonal vectors differ from their mean in five directions, alike in all.
    assert inside.rank_between == pytest.approx([5, 5, 2])
    assert inside.counts.tolist() == [6, 6, 3]
    assert np.isnan(inside.norms).sum() == 3 and np.nanmax(abs(inside.norms - 1)) < 1e-12
    # All questions think the same two things.
    between = geometry([basis[:2] * 3.0] * 5)
    assert between.cosine == pytest.approx(np.zeros(5), abs=1e-12) and between.rank == pytest.approx(np.full(5, 2))
    assert between.distance == pytest.approx(np.full(5, 3 * np.sqrt(2)))
    assert between.cosine_between == pytest.approx(np.ones(2)) and between.norms == pytest.approx(np.full((5, 2), 3))


def test_a_question_with_one_thought_has_no_pairs():
    found = geometry([np.ones((1, 2)), np.zeros((0, 2))])
    assert np.isnan([*found.cosine, *found.rank, *found.cosine_between]).all() and found.counts.tolist() == [1]
    with pytest.raises(CoconutError, match="thoughts: there are none"):
        geometry([np.zeros((0, 2))])
