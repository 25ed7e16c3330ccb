"""Which blocks are visited, against every pair of a query and a key looked at on its own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.flash_attention import tpu_blocks
from pallas_kernels.flash_attention.tpu_blocks import Blocks, cut_blocks
from pallas_kernels.flash_attention.visibility import Options

sizes = st.sampled_from([4, 8])


@st.composite
def layouts(draw):
    causal = draw(st.booleans())
    window = draw(st.none() | st.integers(1, 12)) if causal else None
    options = Options(causal=causal, window=window, scale=1.0, soft_cap=None)
    cut = Blocks(options, draw(st.integers(1, 30)), draw(st.integers(1, 30)), draw(sizes), draw(sizes))
    return cut, (draw(st.integers(0, 25)), draw(st.integers(0, cut.S)), draw(st.integers(0, cut.S)))


def seen_pairs(cut, offset, start, end):
    """``[T, S]``, by the definition."""
    column, key = offset + np.arange(cut.T)[:, None], np.arange(cut.S)
    seen = (key >= start) & (key < end) & np.ones_like(column, bool)
    if cut.options.causal:
        seen &= key <= column
    if cut.options.window is not None:
        seen &= column - key < cut.options.window
    return seen


@given(layouts())
@settings(max_examples=40)
def test_blocks_that_see_each_other_meet_once(layout):
    cut, row = layout
    seen = seen_pairs(cut, *row)
    padded = np.zeros((cut.query_blocks * cut.query_size, cut.key_blocks * cut.key_size), bool)
    padded[: cut.T, : cut.S] = seen
    tiles = padded.reshape(cut.query_blocks, cut.query_size, cut.key_blocks, cut.key_size)
    some, all_of_it = tiles.any((1, 3)), tiles.all((1, 3))

    by_queries = np.zeros_like(some, int)
    for i in range(cut.query_blocks):
        for step in range(cut.key_steps):
            j, live = cut.key_block(i, step, *row)
            assert 0 <= j < cut.key_blocks
            by_queries[i, int(j)] += bool(live)
    by_keys = np.zeros_like(some, int)
    for j in range(cut.key_blocks):
        for step in range(cut.query_steps):
            i, live = cut.query_block(j, step, *row)
            assert 0 <= i < cut.query_blocks
            by_keys[int(i), j] += bool(live)
    for met in (by_queries, by_keys):
        assert met.max() <= 1
        assert met[some].all()
    for i, j in np.ndindex(some.shape):
        assert not cut.unmasked(i, j, *row) or all_of_it[i, j]


def test_whole_blocks_are_not_masked_and_dead_ones_not_visited():
    options = Options(causal=True, window=None, scale=1.0, soft_cap=None)
    cut, row = Blocks(options, 16, 16, 4, 4), (0, 0, 16)
    unmasked = [[bool(cut.unmasked(i, j, *row)) for j in range(4)] for i in range(4)]
    visited = [[bool(cut.key_block(i, step, *row)[1]) for step in range(4)] for i in range(4)]
    np.testing.assert_array_equal(unmasked, np.tri(4, k=-1))
    np.testing.assert_array_equal(visited, np.tri(4))
    assert not any(cut.key_block(i, step, 0, 9, 9)[1] for i in range(4) for step in range(4))


@pytest.mark.parametrize(
    ("length", "size", "count"),
    [(1, 16, 1), (17, 32, 1), (127, 128, 1), (300, 384, 1), (512, 512, 1), (640, 384, 2), (2048, 512, 4)],
)
def test_block_sizes(length, size, count):
    cut = cut_blocks(length, 1, Options(causal=False, window=None, scale=1.0, soft_cap=None))
    assert (cut.query_size, cut.query_blocks) == (size, count)
    assert size <= tpu_blocks.BLOCK


def test_a_window_shortens_the_grid():
    options = Options(causal=True, window=256, scale=1.0, soft_cap=None)
    assert cut_blocks(16384, 16384, options).key_steps == 3
