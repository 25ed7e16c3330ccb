"""Groups of nodes on a graph drawn by hand."""

import numpy as np
import pytest

from coconut.analysis.paths import NODE_GROUPS, group_means, group_nodes
from coconut.errors import CoconutError
from coconut.types import Graph

#      0           7
#    / | \         |
#   1  2  3        8
#   | /   |
#   4     5 -> 6 (6 is also below 8)
#   9 is below 4; the target.
GRAPH = Graph(
    symbols=tuple("0123456789"),
    edges=((0, 1), (0, 2), (0, 3), (1, 4), (2, 4), (3, 5), (5, 6), (8, 6), (7, 8), (4, 9)),
    root=0,
    target=9,
    negative=8,
)


@pytest.mark.parametrize(
    ("k", "reachable", "frontier", "optimal"),
    [
        (0, (), (), (0,)),
        (1, (0,), (3,), (1, 2)),
        (2, (0, 1, 2, 3), (5,), (4,)),
        (3, (0, 1, 2, 3, 4, 5), (6,), (9,)),
        (4, (0, 1, 2, 3, 4, 5, 6, 9), (), ()),
    ],
)
def test_groups_follow_the_search(k, reachable, frontier, optimal):
    expected = dict.fromkeys(range(10), "unreachable")
    for group, nodes in (("reachable", reachable), ("frontier", frontier), ("optimal", optimal)):
        expected |= dict.fromkeys(nodes, group)
    assert group_nodes(GRAPH, k) == expected


def test_a_search_takes_no_negative_steps():
    with pytest.raises(CoconutError, match="k = -1"):
        group_nodes(GRAPH, -1)


def test_means_follow_the_groups_of_each_row():
    values = np.asarray([np.arange(10.0), 10 * np.arange(10.0)])
    means = group_means(GRAPH, values)
    assert tuple(means) == NODE_GROUPS
    np.testing.assert_allclose(means["optimal"], [1.5, 40])
    np.testing.assert_allclose(means["frontier"], [3, 50])
    np.testing.assert_allclose(means["reachable"], [0, 15])
    np.testing.assert_allclose(means["unreachable"], [(4 + 5 + 6 + 7 + 8 + 9) / 6, 10 * (6 + 7 + 8 + 9) / 4])
    assert np.isnan(group_means(GRAPH, values, first_hop=3)["optimal"][1])
    with pytest.raises(CoconutError, match="3 values a row"):
        group_means(GRAPH, values[:, :3])
