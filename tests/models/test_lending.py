"""Gradients of matrices that several passes borrow: equal to autodiff's, and formed once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from coconut.models.layers import Linear
from coconut.models.lending import Lent, lend, take_back

D, F = 12, 20


def make_layers(stacked: bool = False) -> nnx.List:
    if stacked:
        return nnx.List(
            [jax.vmap(lambda key: Linear(D, F, rngs=nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 3))]
        )
    return nnx.List([Linear(D, F, rngs=nnx.Rngs(0))])


def loss_of_passes(passes: list, inputs: list[jax.Array]) -> jax.Array:
    return sum((jnp.sin(layers[0](x)).sum() for layers, x in zip(passes, inputs, strict=True)), jnp.zeros(()))


# A pass of more than D F / (D + F) = 7.5 rows uses the owner's matrix.
@pytest.mark.parametrize("rows", [(3, 5), (3, 50), (50, 60), (2, 3, 4, 50, 60), (7, 8)])
def test_the_gradient_is_autodiffs(rows: tuple[int, ...]) -> None:
    layers = make_layers()
    inputs = [jax.random.normal(jax.random.key(i), (1, n, D)) for i, n in enumerate(rows)]

    def lent(layers: nnx.List, inputs: list[jax.Array]) -> jax.Array:
        return loss_of_passes(lend(layers, 1, rows, jnp.dtype("float32")), inputs)

    def plain(layers: nnx.List, inputs: list[jax.Array]) -> jax.Array:
        return loss_of_passes([layers] * len(rows), inputs)

    (value, gradients), (expected, expected_gradients) = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(layers, inputs) for f in (lent, plain)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert jax.tree.structure(gradients) == jax.tree.structure(expected_gradients)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), gradients, expected_gradients)


@pytest.mark.slow
def test_stacked_layers() -> None:
    layers, rows = make_layers(stacked=True), (2, 3, 40)
    inputs = [jax.random.normal(jax.random.key(i), (3, 2, n, D)) for i, n in enumerate(rows)]

    def loss(passes: list[nnx.List]) -> jax.Array:
        outputs = [jax.vmap(lambda layer, x: layer(x))(layers[0], x) for layers, x in zip(passes, inputs, strict=True)]
        return sum((jnp.sin(y).sum() for y in outputs), jnp.zeros(()))

    gradients = jax.jit(jax.grad(lambda layers: loss(lend(layers, 2, rows, jnp.dtype("float32")))))(layers)
    expected = jax.jit(jax.grad(lambda layers: loss([layers] * len(rows))))(layers)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), gradients, expected)


def test_few_rows_form_one_gradient() -> None:
    rows = (2, 3, 2)
    inputs = [jnp.ones((1, n, D)) for n in rows]

    def products(passes_of) -> int:
        jaxpr = jax.make_jaxpr(jax.grad(lambda layers: loss_of_passes(passes_of(layers), inputs)))(make_layers())
        text = str(jaxpr)
        return sum(
            f":f32[{D},{F}] = dot_general" in line or f":f32[{F},{D}] = dot_general" in line
            for line in text.splitlines()
        )

    assert products(lambda layers: [layers] * len(rows)) == len(rows)
    assert products(lambda layers: lend(layers, 1, rows, jnp.dtype("float32"))) == 1


def test_many_rows_are_not_kept() -> None:
    """Their gradient is formed where they are: to keep them until the end would undo rematerialisation."""
    for rows in ((50, 60), (3, 50)):
        for layers in lend(make_layers(), 1, rows, jnp.dtype("float32")):
            assert not any(isinstance(layer.kernel.get_value(), Lent) for layer in layers)


def test_taken_back_the_layers_are_the_owners() -> None:
    layers = make_layers()
    for borrowed in lend(layers, 1, (3, 4), jnp.dtype("float32")):
        back = take_back(borrowed)
        assert jax.tree.structure(back) == jax.tree.structure(layers)
        jax.tree.map(np.testing.assert_array_equal, back, layers)
