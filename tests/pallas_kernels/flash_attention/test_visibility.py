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
    start, end = draw(st.integers(0, 9)), cut.S - draw(st.integers(0, 9))
    return cut, (draw(st.integers(0, 25)), min(start, cut.S), max(end, 0))


def seen_pairs(cut, offset, start, end):
    """``[T, S]``, by the definition."""
    column, key = offset + np.arange(cut.T)[:, None], np.arange(cut.S)
    seen = (key >= start) & (key < end) & np.ones_like(column, bool)
    if cut.options.causal:
        seen &= key <= column
    if cut.options.window is not None:
        seen &= column - key < cut.options.window
    return seen


def count(i, j, live):
    met = np.zeros((8, 8), int)
    np.add.at(met, tuple(np.broadcast_arrays(i, j)), np.asarray(live, int))
    return met


@given(layouts())
@settings(max_examples=100)
def test_blocks_that_see_each_other_meet_once(layout):
    cut, row = layout
    seen = seen_pairs(cut, *row)
    padded = np.zeros((cut.query_blocks * cut.query_size, cut.key_blocks * cut.key_size), bool)
    padded[: cut.T, : cut.S] = seen
    tiles = padded.reshape(cut.query_blocks, cut.query_size, cut.key_blocks, cut.key_size)
    some, all_of_it = tiles.any((1, 3)), tiles.all((1, 3))

    # One shape for all layouts, so that little is compiled; what lies beyond a grid is left out afterwards.
    one, other = np.indices((8, 8), np.int32)
    j, live = cut.key_block(one, other, *row)
    by_queries = count(one, j, live & (one < cut.query_blocks) & (other < cut.key_steps))
    i, live = cut.query_block(one, other, *row)
    by_keys = count(i, one, live & (one < cut.key_blocks) & (other < cut.query_steps))
    for met in (by_queries, by_keys):
        assert met.max() <= 1
        assert met.sum() == met[: cut.query_blocks, : cut.key_blocks].sum()
        assert met[: cut.query_blocks, : cut.key_blocks][some].all()
    unmasked = np.asarray(cut.unmasked(one, other, *row))[: cut.query_blocks, : cut.key_blocks]
    assert not (unmasked & ~all_of_it).any()


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
