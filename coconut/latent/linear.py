"""The linear maps of what is learnt around a decoder: feedbacks and heads."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def make_uniform_linear(
    inputs: int, outputs: int, axes: tuple[str, str], *, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Linear:
    """A matrix and a bias; the matrix starts uniform between ``+-1 / sqrt(inputs)``, as PyTorch draws it.

    Args:
      inputs: its rows.
      outputs: its columns.
      axes: logical axes of both (`coconut.sharding.RULES`).
      dtype: of the parameters.
      rngs: for their start. The bias starts at zero.
    """
    return nnx.Linear(
        inputs,
        outputs,
        param_dtype=jnp.dtype(dtype),
        kernel_init=nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
        kernel_metadata={"axes": axes},
        bias_metadata={"axes": axes[1:]},
        rngs=rngs,
    )


def apply_linear(linear: nnx.Linear, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
    """The map in the dtype of ``x``."""
    assert linear.bias is not None
    return x @ linear.kernel[...].astype(x.dtype) + linear.bias[...].astype(x.dtype)
