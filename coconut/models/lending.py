"""One decoder for several passes, and each weight's gradient formed once.

A rollout applies the same matrices to prompt, thoughts and suffix. Autodiff forms a gradient of the matrix's full size
in each of these passes and adds them; for a few rows against a large matrix, writing that gradient is most of the work.
Here a pass that has borrowed a matrix hands back the rows its gradient is made of, inputs and cotangents, and the owner
multiplies them once. To JAX these rows are the cotangent of two arrays of zeros that travel beside the matrix.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values, cotangents and shardings
@dataclasses.dataclass(frozen=True)
class Lent:
    """A matrix on loan to one pass of ``R`` rows; layers that are scanned have a leading axis.

    Attributes:
      kernel: the matrix. It gets no gradient of its own.
      inputs: zeros, whose cotangent is the rows the matrix was applied to.
      outputs: zeros, whose cotangent is that of the rows it made of them.
    """

    kernel: Float[Array, "*L D F"]
    inputs: Float[Array, "*L R D"]
    outputs: Float[Array, "*L R F"]

    def apply(self, x: Float[Array, "R D"]) -> Float[Array, "R F"]:
        """``x @ kernel`` in the dtype of ``x``."""
        return _apply(x, self.kernel.astype(x.dtype), self.inputs, self.outputs)


def lend(layers: Any, rows: Sequence[int], dtype: jnp.dtype) -> list[Any]:
    """The layers, once for each pass, with the matrices of every `nnx.Linear` on loan where that saves work.

    Joining rows copies ``R (D + F)`` numbers and keeps them until the end; it saves writing and adding a gradient of
    ``D F``. So a matrix is lent to passes of few rows, where there are several; the others use the owner's.

    Args:
      layers: a module or a list of modules.
      rows: how many rows each pass will apply the layers to. Each pass must use all of them exactly once.
      dtype: dtype of these rows.
    """
    passes = [jax.tree.map(lambda x: x, layers) for _ in rows]  # new modules around the same arrays
    for borrowers in zip(*[_linears(copy) for copy in passes], strict=True):
        kernel = borrowers[0].kernel[...]
        D, F = kernel.shape[-2:]
        few = [(borrower, R) for borrower, R in zip(borrowers, rows, strict=True) if R * (D + F) <= D * F]
        if len(few) < 2:
            continue
        loans = _lend(tuple(R for _, R in few), jnp.dtype(dtype), kernel)
        for (borrower, _), loan in zip(few, loans, strict=True):
            borrower.kernel = nnx.Param(loan)
    return passes


def take_back(layers: Any) -> Any:
    """The layers with their own matrices in place of those on loan."""
    return jax.tree.map(lambda x: x.kernel if _is_loan(x) else x, layers, is_leaf=_is_loan)


def _is_loan(x: Any) -> bool:
    return isinstance(x, Lent)


def _linears(layers: Any) -> list[nnx.Linear]:
    return [module for _, module in nnx.iter_modules(layers) if isinstance(module, nnx.Linear)]


def _loans(rows: tuple[int, ...], dtype: jnp.dtype, kernel: Array) -> tuple[Lent, ...]:
    *stack, D, F = kernel.shape
    return tuple(Lent(kernel, jnp.zeros((*stack, R, D), dtype), jnp.zeros((*stack, R, F), dtype)) for R in rows)


_lend = jax.custom_vjp(_loans, nondiff_argnums=(0, 1))


def _lend_forward(rows: tuple[int, ...], dtype: jnp.dtype, kernel: Array) -> tuple[tuple[Lent, ...], Array]:
    return _loans(rows, dtype, kernel), jnp.zeros((0,), kernel.dtype)


def _lend_backward(
    rows: tuple[int, ...], dtype: jnp.dtype, like: Array, returned: tuple[Lent, ...]
) -> tuple[Float[Array, "*L D F"]]:
    x, y = (jnp.concatenate([getattr(loan, rows) for loan in returned], -2) for rows in ("inputs", "outputs"))
    wide = jnp.promote_types(like.dtype, dtype)
    return (jnp.einsum("...rd,...rf->...df", x, y, preferred_element_type=wide).astype(like.dtype),)


_lend.defvjp(_lend_forward, _lend_backward)


@jax.custom_vjp
def _apply(x: Array, kernel: Array, inputs: Array, outputs: Array) -> Array:
    return x @ kernel


def _apply_forward(x: Array, kernel: Array, inputs: Array, outputs: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _apply_backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, None, Array, Array]:
    x, kernel = residuals
    return cotangent @ kernel.T, None, x, cotangent


_apply.defvjp(_apply_forward, _apply_backward)
