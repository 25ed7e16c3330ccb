"""One decoder for several passes, and each weight's gradient formed once.

A rollout applies the same matrices to prompt, thoughts and suffix. Autodiff forms a gradient of the matrix's full size
in each of these passes and adds them; for a few rows against a large matrix, writing that gradient is most of the work,
and on a mesh each of them is reduced over the devices. Here a pass that has borrowed a matrix hands back the rows its
gradient is made of, inputs and cotangents, and the owner multiplies them once. To JAX these rows are the cotangent of
two arrays of zeros that travel beside the matrix.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from coconut.models.products import apply_matrix, apply_transposed, may_flatten, sum_of_products
from coconut.sharding import stay


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values, cotangents and shardings
@dataclasses.dataclass(frozen=True)
class Lent:
    """A matrix on loan to one pass of ``T`` columns; layers that are scanned have a leading axis.

    Attributes:
      kernel: the matrix. It gets no gradient of its own.
      inputs: zeros, whose cotangent is the rows the matrix was applied to.
      outputs: zeros, whose cotangent is that of the rows it made of them.
    """

    kernel: Float[Array, "*L D F"]
    inputs: Float[Array, "*L B T D"]
    outputs: Float[Array, "*L B T F"]

    def apply(self, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        """``x @ kernel`` in the dtype of ``x``."""
        return _apply(x, self.kernel.astype(x.dtype), self.inputs, self.outputs)


def lend(
    layers: Any,
    batch: int | Sequence[int],
    columns: Sequence[int],
    dtype: jnp.dtype,
    *,
    narrow: Sequence[nnx.Module] = (),
    fewer: Sequence[int] | None = None,
) -> list[Any]:
    """The layers, once for each pass, with the matrices of every `nnx.Linear` on loan where that saves work.

    Not of one that says (``of_rows``) that it is applied to other things than rows.

    Joining the ``B T`` rows of passes copies ``B T (D + F)`` numbers and keeps them until the end; it saves writing and
    adding a gradient of ``D F``. So a matrix is lent to passes of few rows, where there are several; the others use the
    owner's.

    Args:
      layers: a module or a list of modules.
      batch: ``B`` of all passes, or of each of them: a multiple of the least.
      columns: ``T`` of each pass. Each must use all layers exactly once.
      dtype: dtype of the rows.
      narrow: modules of ``layers`` that a pass applies to ``fewer`` columns.
      fewer: how many of its columns, for each pass.
    """
    narrow_ones = {id(linear) for module in narrow for linear in _linears(module)}
    passes = [jax.tree.map(lambda x: x, layers) for _ in columns]  # new modules around the same arrays
    batch = [batch] * len(columns) if isinstance(batch, int) else batch
    for own, *borrowers in zip(_linears(layers), *[_linears(copy) for copy in passes], strict=True):
        kernel = borrowers[0].kernel[...]
        D, F = kernel.shape[-2:]
        applied = columns if fewer is None or id(own) not in narrow_ones else fewer
        few = [
            (borrower, (B, T))
            for borrower, B, T in zip(borrowers, batch, applied, strict=True)
            if B * T * (D + F) <= D * F
        ]
        if len(few) < 2:
            continue
        loans = _lend(tuple(size for _, size in few), jnp.dtype(dtype), kernel)
        for (borrower, _), loan in zip(few, loans, strict=True):
            borrower.kernel = nnx.Param(loan)
    return passes


def take_back(layers: Any) -> Any:
    """The layers with their own matrices in place of those on loan."""
    return jax.tree.map(lambda x: x.kernel if _is_loan(x) else x, layers, is_leaf=_is_loan)


def _is_loan(x: Any) -> bool:
    return isinstance(x, Lent)


def _linears(layers: Any) -> list[nnx.Linear]:
    modules = [module for _, module in nnx.iter_modules(layers) if isinstance(module, nnx.Linear)]
    return [module for module in modules if getattr(module, "of_rows", True)]


Sizes = tuple[tuple[int, int], ...]
"""``B`` and ``T`` of each pass."""


def _loans(sizes: Sizes, dtype: jnp.dtype, kernel: Array) -> tuple[Lent, ...]:
    *stack, D, F = kernel.shape
    rows = lambda size, width: jnp.zeros((*stack, *size, width), dtype)
    return tuple(Lent(kernel, rows(size, D), rows(size, F)) for size in sizes)


_lend = jax.custom_vjp(_loans, nondiff_argnums=(0, 1))


def _lend_forward(sizes: Sizes, dtype: jnp.dtype, kernel: Array) -> tuple[tuple[Lent, ...], Array]:
    return _loans(sizes, dtype, kernel), jnp.zeros((0,), kernel.dtype)


def _lend_backward(
    sizes: Sizes, dtype: jnp.dtype, like: Array, returned: tuple[Lent, ...]
) -> tuple[Float[Array, "*L D F"]]:
    batch = min(B for B, _ in sizes)
    # Which row a column stands in does not matter to the sum: more rows of fewer columns become as many as the least.
    joined = lambda x: x if x.shape[-3] == batch else x.reshape(*x.shape[:-3], batch, -1, x.shape[-1])
    # The rows of a pass of one column have split features: they move to join the others.
    x, y = (
        jnp.concatenate([joined(stay(getattr(loan, rows))) for loan in returned], -2) for rows in ("inputs", "outputs")
    )
    wide = jnp.promote_types(like.dtype, dtype)
    if not may_flatten():
        return (jnp.einsum("...btd,...btf->...df", x, y, preferred_element_type=wide).astype(like.dtype),)
    product = functools.partial(sum_of_products, dtype=wide)
    for _ in x.shape[:-3]:
        product = jax.vmap(product)
    x, y = (rows.reshape(*rows.shape[:-3], -1, rows.shape[-1]) for rows in (x, y))
    return (product(x, y).astype(like.dtype),)


_lend.defvjp(_lend_forward, _lend_backward)


@jax.custom_vjp
def _apply(x: Array, kernel: Array, inputs: Array, outputs: Array) -> Array:
    return apply_matrix(x, kernel)


def _apply_forward(x: Array, kernel: Array, inputs: Array, outputs: Array) -> tuple[Array, tuple[Array, Array]]:
    return apply_matrix(x, kernel), (x, kernel)


def _apply_backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, None, Array, Array]:
    x, kernel = residuals
    return apply_transposed(cotangent, kernel), None, x, cotangent


_apply.defvjp(_apply_forward, _apply_backward)
