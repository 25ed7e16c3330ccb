"""What a layer keeps of its columns is any pytree whose columns lie on the last axis but one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.models.cache import Filling, LayerCache, Segment, empty_segment, take_rows, write


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Narrow(LayerCache):
    """Two arrays of different widths, and no heads."""

    AXES = ("rows", "past", "head")

    wide: jax.Array
    narrow: jax.Array


def numbers(*shape: int) -> Narrow:
    wide = jnp.arange(np.prod(shape) * 3, dtype=jnp.float32).reshape(*shape, 3)
    return Narrow(wide, -wide[..., :2])


def test_columns_are_written_where_they_belong() -> None:
    room, new = jax.tree.map(jnp.zeros_like, numbers(2, 5)), numbers(2, 1)
    filling = write(Filling(room, room), new, 3)
    assert isinstance(filling, Filling)
    for written in (write(room, new, 3), filling.written):
        for array, expected in zip(jax.tree.leaves(written), jax.tree.leaves(new), strict=True):
            np.testing.assert_array_equal(array[:, 3], expected[:, 0])
            assert not np.delete(array, 3, axis=1).any()


@pytest.mark.parametrize("layers", [(), (4,)])
def test_room_and_rows_with_and_without_an_axis_of_layers(layers: tuple[int, ...]) -> None:
    kept = numbers(*layers, 2, 5)
    empty = empty_segment((kept,), 2, jnp.arange(7))
    assert [x.shape for x in jax.tree.leaves(empty.key_values)] == [(*layers, 2, 7, 3), (*layers, 2, 7, 2)]
    taken = take_rows(Segment((kept,), jnp.eye(2, 5, dtype=bool), jnp.arange(5)), jnp.asarray([1, 1, 0]))
    for array, expected in zip(jax.tree.leaves(taken.key_values), jax.tree.leaves(kept), strict=True):
        np.testing.assert_array_equal(array, np.take(expected, [1, 1, 0], axis=len(layers)))
    np.testing.assert_array_equal(taken.valid, np.eye(2, 5, dtype=bool)[[1, 1, 0]])
