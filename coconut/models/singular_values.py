"""Singular-value fine-tuning (Transformer-squared, Sun, Cetin and Tang 2025): only how much each direction counts.

A matrix ``W = U diag(s) V`` becomes ``U diag(s * scale) V``, where ``scale`` comes of a trained vector ``z`` with a
number for each singular value. It is computed as ``x W + ((x U) * s (scale - 1)) V``, which is the same, and which at
``scale = 1`` is ``x W`` to the bit: ``U``, ``s`` and ``V`` are those of a decomposition in floating point.

The factors are parameters of the decoder's own modules, ``layers.0.mlp.up.singular_u``, and lie on a mesh as their
matrix does. They are made once, when a run starts, and are kept in its checkpoints: another library, device or mesh
would decompose to other bits and, where singular values are close to each other, to other directions, of which a
vector that was trained knows nothing.
"""

import dataclasses
from typing import Any, Literal, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coconut.errors import CoconutError, check_fields

ScaleForm = Literal["scales", "masks"]


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class SingularValueConfig:
    """Which matrices of a decoder have a vector of scales, and of which form.

    Attributes:
      form: ``scales``, the paper's: ``scale = z``, from 1. ``masks``, that of the published code: masks ``m`` between 0
        and 1, the sigmoid of ``z``, at a sum of singular values that stays what it was, ``scale = m sum(s) /
        sum(s m)``, from ``z`` near 0.1, which nearly is the decoder as it was.
      targets: patterns of names of matrices, such as ``layers.*.attention.query``; those of MLPs by default, as in the
        published code. Matrices of routed experts, embedding and head are none of them.
      trained_rows: as `coconut.models.adapters.AdapterConfig.trained_rows`.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    form: ScaleForm = "scales"
    targets: tuple[str, ...] = ("layers.*.mlp.*",)
    trained_rows: tuple[str | int, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.targets:
            raise CoconutError(f"SingularValueConfig.targets = {self.targets!r}: must name a matrix")
        if len(set(self.trained_rows)) < len(self.trained_rows):
            raise CoconutError(f"SingularValueConfig.trained_rows = {self.trained_rows!r}: a token stands there twice")


def decomposed(matrix: Float[Array, "*L D F"]) -> tuple[Float[Array, "*L D R"], Float[Array, "*L R"], Any]:
    """``U``, ``s`` and ``V`` of each matrix, ``R`` the smaller of its sides.

    In float32 at least, and ``U`` and ``V`` then in the matrix's own dtype: they weigh its change alone. Traceable.
    """
    wide = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    left, values, right = jnp.linalg.svd(wide, full_matrices=False)
    return left.astype(matrix.dtype), values, right.astype(matrix.dtype)


def fresh_vector(values: Float[Array, "*L R"], form: ScaleForm, draws: Float[Array, "*L R"]) -> Float[Array, "*L R"]:
    """What ``z`` starts from, with ``draws`` of a standard normal for the form that is not at one point."""
    return jnp.ones_like(values) if form == "scales" else 0.1 + 0.01 * draws


def weights_of(z: Float[Array, "*L R"], form: ScaleForm) -> Float[Array, "*L R"]:
    """What vectors of several runs are mixed by: ``z`` itself, or its masks."""
    return z if form == "scales" else jax.nn.sigmoid(z)


def scales(values: Float[Array, "*L R"], weights: Float[Array, "*L R"], form: ScaleForm) -> Float[Array, "*L R"]:
    """What singular ``values`` are multiplied by, of `weights_of`.

    Masks that leave nothing of a matrix leave it as zero.
    """
    if form == "scales":
        return weights
    left = (values * weights).sum(-1, keepdims=True)
    return weights * values.sum(-1, keepdims=True) / jnp.where(left > 0, left, 1.0)
