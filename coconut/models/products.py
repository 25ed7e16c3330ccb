"""Products of rows with matrices, in the form that is fast on the device.

XLA:CPU has a processor's own products of bfloat16 (AVX512-BF16, AMX) where float32 is asked for and the compiler has to
transpose nothing; else it multiplies in float32. So products of rows with matrices, and those of their derivatives, are
written out here for a single CPU device. On others, and in 32 bits and more, they are as JAX writes them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.platform import platform


def apply_matrix(x: Float[Array, "B T D"], kernel: Float[Array, "D F"]) -> Float[Array, "B T F"]:
    """``x @ kernel``."""
    product = _summed_in_float32 if _is_narrow(x.dtype) else jnp.matmul
    return _by_rows(product, x, kernel)


def apply_transposed(y: Float[Array, "B T F"], kernel: Float[Array, "D F"]) -> Float[Array, "B T D"]:
    """``y @ kernel.T``."""
    if not _is_narrow(y.dtype):
        return apply_matrix(y, kernel.T)
    return _by_rows(_times_transposed, y, kernel).astype(y.dtype)


def logits_of(hidden: Float[Array, "*B D"], table: Float[Array, "V D"], dtype: jnp.dtype) -> Float[Array, "*B V"]:
    """``hidden @ table.T`` in a wider dtype.

    In bfloat16 on a single CPU device the cotangent is rounded to it, as PyTorch's autocast does; else the two products
    of the derivative would be of float32. Float16 would round most of it to 0.
    """
    if not (hidden.dtype == jnp.bfloat16 and platform() == "cpu" and may_flatten()):
        return jnp.matmul(hidden, table.T, preferred_element_type=dtype)
    return _by_rows(_logits_in_float32, hidden, table).astype(dtype)


def sum_of_products(x: Float[Array, "R D"], y: Float[Array, "R F"], dtype: jnp.dtype) -> Float[Array, "D F"]:
    """A matrix's gradient ``x.T @ y``, of the rows it was applied to and the cotangents of those it made of them."""
    if _is_narrow(x.dtype):
        return _weight_gradient(x, y).astype(dtype)
    return jnp.einsum("rd,rf->df", x, y, preferred_element_type=dtype)


def may_flatten() -> bool:
    """On one device XLA:CPU forms the weight gradient of flat rows twice as fast; a mesh may split both their axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def _is_narrow(dtype: jnp.dtype) -> bool:
    """Whether products of these numbers have to be asked for in float32 here."""
    return dtype.itemsize < 4 and platform() == "cpu"


def _by_rows(product: Callable[[Array, Array], Array], x: Array, kernel: Array) -> Array:
    """A product of the last axis, of flat rows where that is as good."""
    if not may_flatten():
        return product(x, kernel)
    found = product(x.reshape(-1, x.shape[-1]), kernel)
    return found.reshape(*x.shape[:-1], found.shape[-1])


@jax.custom_vjp
def _summed_in_float32(x: Float[Array, "*B D"], kernel: Float[Array, "D F"]) -> Float[Array, "*B F"]:
    """``x @ kernel``, summed in float32 and rounded once."""
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)


def _summed_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _summed_in_float32(x, kernel), (x, kernel)


def _summed_backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    return _times_transposed(cotangent, kernel).astype(x.dtype), _weight_gradient(x, cotangent).astype(kernel.dtype)


_summed_in_float32.defvjp(_summed_forward, _summed_backward)


@jax.custom_vjp
def _logits_in_float32(hidden: Float[Array, "R D"], table: Float[Array, "V D"]) -> Float[Array, "R V"]:
    return _times_transposed(hidden, table)


def _logits_forward(hidden: Array, table: Array) -> tuple[Array, tuple[Array, Array]]:
    return _times_transposed(hidden, table), (hidden, table)


def _logits_backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    hidden, table = residuals
    cotangent = cotangent.astype(hidden.dtype)
    return _summed_in_float32(cotangent, table), _weight_gradient(cotangent, hidden).astype(table.dtype)


_logits_in_float32.defvjp(_logits_forward, _logits_backward)


def _times_transposed(y: Float[Array, "*B F"], kernel: Float[Array, "D F"]) -> Float[Array, "*B D"]:
    """``y @ kernel.T`` in float32; written with `jnp.matmul`, the transposition is folded in too late."""
    return jax.lax.dot_general(y, kernel, (((y.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _weight_gradient(x: Float[Array, "*B D"], y: Float[Array, "*B F"]) -> Float[Array, "D F"]:
    """The sum over rows of ``x[row, :, None] * y[row, None, :]`` in float32."""
    if x.ndim == 2:
        # A row of zeros, which changes no sum, keeps XLA from folding the transposition into the product again.
        x, y = jnp.pad(x.T, ((0, 0), (0, 1))), jnp.pad(y, ((0, 1), (0, 0)))
        return jnp.matmul(x, y, preferred_element_type=jnp.float32)
    rows = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, y, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
