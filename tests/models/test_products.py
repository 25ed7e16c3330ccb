"""Products of bfloat16 on a CPU: values, derivatives, and that the processor's own products are used."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.models.products import apply_matrix, apply_transposed, logits_of, sum_of_products

B, T, D, F = 2, 5, 64, 96
FLOAT32 = jnp.dtype("float32")

PRODUCTS: dict[str, tuple[Callable[..., jax.Array], tuple[int, ...], tuple[int, ...]]] = {
    "matrix": (apply_matrix, (B, T, D), (D, F)),
    "logits": (lambda x, y: logits_of(x, y, FLOAT32), (B, T, D), (F, D)),
}

LENT: dict[str, tuple[Callable[..., jax.Array], tuple[int, ...], tuple[int, ...]]] = {
    "transposed": (apply_transposed, (B, T, F), (D, F)),
    "sum": (functools.partial(sum_of_products, dtype=FLOAT32), (B * T, D), (B * T, F)),
    "sums of layers": (jax.vmap(functools.partial(sum_of_products, dtype=FLOAT32)), (3, B * T, D), (3, B * T, F)),
}


def given(*shapes: tuple[int, ...]) -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


def derive(name: str, dtype: str) -> tuple[Callable[..., Any], list[jax.Array]]:
    """Value and both derivatives of a product with random weights."""
    product, *shapes = PRODUCTS[name]
    x, kernel, weights = given(*shapes, (B, T, F))
    loss = lambda x, kernel: (product(x.astype(dtype), kernel.astype(dtype)) * weights).sum()
    return jax.value_and_grad(loss, argnums=(0, 1)), [x, kernel]


def asked(name: str, dtype: str) -> list[tuple[str, ...]]:
    """Of each product the dtypes of its operands and of what it makes, as XLA is given them."""
    function, arguments = derive(name, dtype)
    text = jax.jit(function).lower(*arguments).as_text()
    found = re.findall(r"dot_general.*:\s*\(tensor<[\dx]*(\w+)>, tensor<[\dx]*(\w+)>\) -> tensor<[\dx]*(\w+)>", text)
    assert len(found) == 3
    return sorted(set(found))


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_bfloat16_are_asked_for_in_float32_on_a_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(name, "bfloat16") == [("bf16", "bf16", "f32")]
    assert asked(name, "float32") == [("f32", "f32", "f32")]
    (low, arguments), (high, _) = derive(name, "bfloat16"), derive(name, "float32")
    close = functools.partial(np.testing.assert_allclose, rtol=0.03, atol=0.1)
    jax.tree.map(close, low(*arguments), high(*arguments))
    # A GPU's and a TPU's products sum in float32 by themselves; logits have cotangents of float32.
    monkeypatch.setattr("coconut.models.products.platform", lambda: "gpu")
    as_written = {
        "matrix": [("bf16", "bf16", "bf16")],
        "logits": [("bf16", "bf16", "f32"), ("f32", "f32", "f32")],
    }
    assert asked(name, "bfloat16") == as_written[name]


@pytest.mark.parametrize("name", [*PRODUCTS, *LENT])
def test_no_product_is_of_float32_once_compiled(name: str) -> None:
    """Where the processor has products of bfloat16: XLA makes others of some forms, which take twice as long."""
    processor = Path("/proc/cpuinfo")
    if not processor.exists() or "avx512_bf16" not in processor.read_text(encoding="utf-8"):
        pytest.skip("the processor has no products of bfloat16")
    if name in PRODUCTS:
        function, arguments = derive(name, "bfloat16")
    else:  # What lent matrices and those who lent them are given back by.
        function, *shapes = LENT[name]
        arguments = [rows.astype("bfloat16") for rows in given(*shapes)]
    program = jax.jit(function).lower(*arguments).compile().as_text()
    assert program is not None
    computations = [part for part in program.split("\n\n") if re.search(r" dot\(", part)]
    assert len(computations) == (3 if name in PRODUCTS else 1)
    assert all(len(re.findall(r"%param\S* = bf16", part)) == 2 for part in computations)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_no_columns(dtype: str) -> None:
    x, table = jnp.zeros((B, 0, D), dtype), jnp.zeros((F, D), dtype)
    assert logits_of(x, table, FLOAT32).shape == apply_matrix(x, table.T).shape == (B, 0, F)


def test_small_cotangents_of_float16_logits_arrive() -> None:
    x, table = (rows.astype("float16") for rows in given((B, T, D), (F, D)))
    gradient = jax.grad(lambda x: 2e-8 * logits_of(x, table, FLOAT32).sum())(x)
    assert (gradient != 0).mean() > 0.5


def test_sums_of_products_of_rows() -> None:
    x, y = (rows.astype("bfloat16") for rows in given((7, D), (7, F)))
    expected = np.asarray(x, np.float32).T @ np.asarray(y, np.float32)
    np.testing.assert_allclose(sum_of_products(x, y, FLOAT32), expected, rtol=1e-5, atol=1e-4)
    kernel = given((D, F))[0].astype("bfloat16")
    expected = np.asarray(y, np.float32) @ np.asarray(kernel, np.float32).T
    found = apply_transposed(y[None], kernel)
    assert found.dtype == y.dtype
    np.testing.assert_allclose(np.asarray(found[0], np.float32), expected, rtol=0.01, atol=0.01)
