"""A grouped product's values and gradients, against a loop over its groups."""

from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings

from pallas_kernels.grouped_product import grouped_product, tpu

ROWS, GROUPS, BLOCK = 40, 5, 16


def loop(rows: np.ndarray, cotangents: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    ends = np.cumsum(sizes)
    return np.stack(
        [rows[end - size : end].T @ cotangents[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    )


def drawn(shape: tuple[int, ...], seed: int, dtype: Any) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@jax.jit
def interpreted(rows: jax.Array, cotangents: jax.Array, sizes: jax.Array) -> jax.Array:
    return tpu.matrix_gradient(rows, cotangents, sizes, True, block_rows=BLOCK)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, ROWS), min_size=GROUPS, max_size=GROUPS))
@example(cuts=[0, 0, 0, 0, 0])  # No rows.
@example(cuts=[0, 0, 40, 40, 40])  # All in one group, none in the others.
@example(cuts=[16, 16, 32, 40, 40])  # Groups end where blocks do.
def test_gradient_of_matrices(dtype: str, cuts: list[int]) -> None:
    """Rows of no group are NaN: none of it arrives anywhere."""
    ends = sorted(cuts)
    sizes = tuple(int(size) for size in np.diff([0, *ends]))
    inside = (jnp.arange(ROWS) < ends[-1])[:, None]
    rows, cotangents = (jnp.where(inside, drawn((ROWS, width), width, dtype), jnp.nan) for width in (12, 20))
    ours = interpreted(rows, cotangents, jnp.asarray(sizes, jnp.int32))
    assert ours.dtype == dtype
    expected = loop(np.asarray(rows, np.float64), np.asarray(cotangents, np.float64), sizes)
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(np.asarray(ours, np.float64), expected, rtol=tolerance, atol=tolerance)


def test_blocks_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of them, the last ones only in part."""
    monkeypatch.setattr(tpu, "WIDTHS", {"float32": (8,)})
    rows, cotangents, sizes = drawn((ROWS, 12), 0, "float32"), drawn((ROWS, 20), 1, "float32"), (7, 0, 20, 3, 10)
    ours = tpu.matrix_gradient(rows, cotangents, jnp.asarray(sizes, jnp.int32), True, block_rows=BLOCK)
    np.testing.assert_allclose(ours, loop(np.asarray(rows), np.asarray(cotangents), sizes), rtol=1e-5, atol=1e-5)


def test_values_and_gradients_are_those_of_ragged_dot() -> None:
    rows, matrices = drawn((ROWS, 12), 0, "float32"), drawn((GROUPS, 12, 20), 1, "float32")
    pull, sizes = drawn((ROWS, 20), 2, "float32"), jnp.asarray((7, 0, 20, 3, 10), jnp.int32)

    def loss(rows: jax.Array, matrices: jax.Array, **options: Any) -> jax.Array:
        return jnp.vdot(grouped_product(rows, matrices, sizes, **options), pull)

    ours = jax.value_and_grad(loss, (0, 1))(rows, matrices, implementation="tpu", interpret=True)
    theirs = jax.value_and_grad(loss, (0, 1))(rows, matrices, implementation="xla")
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)


def test_what_does_not_apply_is_refused() -> None:
    matrices, sizes = jnp.ones((1, 2, 2), jnp.float16), jnp.ones(1, jnp.int32)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"implementation": "tpu"}, "this program is for a cpu"),
        ({"implementation": "tpu", "interpret": True}, "float16 rows"),
        ({"implementation": "gpu"}, "has auto, xla and tpu"),
        ({"interpret": True}, "interpret is for the kernels tpu"),
    )
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            grouped_product(matrices[0], matrices, sizes, **options)
