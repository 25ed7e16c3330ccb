"""Which implementation a grouped product uses, and its gradients."""

import functools

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_product import tpu
from pallas_kernels.implementations import resolve
from pallas_kernels.platform import vary_over, varying_axes


def grouped_product(
    rows: Float[Array, "N D"],
    matrices: Float[Array, "E D F"],
    sizes: Int[Array, " E"],
    *,
    implementation: str = "auto",
    interpret: tpu.Interpret = False,
) -> Float[Array, "N F"]:
    """Each row multiplied by the matrix of its group.

    Args:
      rows: those of the first group, of the second, and so on.
      matrices: of each group, in the rows' dtype.
      sizes: how many rows each group has. Rows behind the last group become anything, and count in no gradient.
      implementation: ``xla`` for `jax.lax.ragged_dot`; ``tpu`` for the same with a kernel for the gradient of the
        matrices, which XLA makes dense on a TPU; ``auto`` for ``tpu`` where the program is for one and the dtype is
        float32 or bfloat16.
      interpret: run the kernel step by step, anywhere.

    Raises:
      ValueError: the implementation is unknown or does not apply; the message says why.
    """
    if implementation in ("reference", "gpu"):
        raise ValueError(f"implementation={implementation!r}: a grouped product has auto, xla and tpu")
    chosen = resolve(
        implementation,
        interpret,
        kernels={"tpu": tpu},
        operand=rows,
        choose=lambda target: "tpu" if target == "tpu" and tpu.refusal(rows) is None else "xla",
        about=f"grouped product of {rows.dtype} rows",
    )
    if chosen == "xla":
        return jax.lax.ragged_dot(rows, matrices, sizes)
    axes = varying_axes(rows, matrices, sizes)
    return _product(vary_over(rows, axes), vary_over(matrices, axes), vary_over(sizes, axes), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(rows: Array, matrices: Array, sizes: Array, interpret: tpu.Interpret) -> Array:
    return jax.lax.ragged_dot(rows, matrices, sizes)


def _forward(rows: Array, matrices: Array, sizes: Array, interpret: tpu.Interpret) -> tuple[Array, tuple]:
    return jax.lax.ragged_dot(rows, matrices, sizes), (rows, matrices, sizes)


def _backward(interpret: tpu.Interpret, residuals: tuple, cotangents: Array) -> tuple[Array, Array, None]:
    rows, matrices, sizes = residuals
    (of_rows,) = jax.vjp(lambda rows: jax.lax.ragged_dot(rows, matrices, sizes), rows)[1](cotangents)
    return of_rows, tpu.matrix_gradient(rows, cotangents, sizes, interpret), None


_product.defvjp(_forward, _backward)
