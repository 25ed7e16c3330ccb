"""Parameters that are gathered once a step (``ExecutionConfig.gather = 'step'``).

Parameters, gradients and moments lie in shards over the mesh axis ``fsdp`` in any case. Where every pass gathers what
it uses (ZeRO, Rajbhandari et al. 2020, stage 3), a step of several passes and microbatches moves the same matrices
again and again. Where a device has room for all of them in the compute dtype they are gathered once (nearer to stage
2). Then ``fsdp`` is to the model no other axis than ``data``: each device has its own rows and whole matrices, for
passes of one column, too.
"""

from collections.abc import Mapping

import jax
from jax.sharding import NamedSharding
from jaxtyping import Array

from coconut.model import Parameters
from coconut.models.config import ExecutionConfig
from coconut.sharding import Axes, constrain_tree, gather, matrices_are_whole, tree_sharding


def gathered(parameters: Parameters, axes: Mapping[str, Axes], execution: ExecutionConfig) -> Parameters | None:
    """Every parameter with ``fsdp`` gathered, the decoder's matrices in the compute dtype; None where nothing is split.

    The decoder uses a matrix in the compute dtype, so rounding it first moves half as much. In 16 bits two things are
    rounded further than where each pass gathers: the gradients of several passes are added in that dtype, not in
    float32, and a feedback that matches norms measures the rounded embedding.

    Args:
      parameters: by name, in their shards.
      axes: their logical axes.
      execution: how the model is run.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if execution.gather == "pass" or mesh.empty or mesh.shape["fsdp"] == 1:
        return None

    def whole(name: str, own: Array) -> Array:
        if _is_matrix(name, axes[name]) and own.dtype.itemsize > execution.compute_dtype.itemsize:
            # A value of its own: XLA would else gather first and round later.
            own = jax.lax.optimization_barrier(own.astype(execution.compute_dtype))
        return gather(own, axes[name])

    sharded = constrain_tree(parameters, axes)
    with matrices_are_whole(True):
        return {name: whole(name, own) for name, own in sharded.items()}


def in_place_of(parameters: Parameters, whole: Parameters, axes: Mapping[str, Axes]) -> Parameters:
    """``whole``, whose gradients become those of ``parameters``: in their dtype, and in their shards."""
    places = tree_sharding(parameters, axes, jax.sharding.get_abstract_mesh())
    return {name: _borrow(own, whole[name], axes[name], places[name]) for name, own in parameters.items()}


def _is_matrix(name: str, axes: Axes) -> bool:
    """Whether it is one that the decoder rounds to the compute dtype wherever it uses it."""
    ends = (".kernel", ".embedding")
    return name.startswith("decoder.") and name.endswith(ends) and not {"router", "positions"} & set(axes or ())


def _borrow(own: Array, whole: Array, axes: Axes, place: NamedSharding) -> Array:
    @jax.custom_vjp
    def borrow(own: Array, whole: Array) -> Array:
        return whole

    def backward(_: None, cotangent: Array) -> tuple[Array, None]:
        # First as a whole, or XLA moves the rows that it is made of to where its shards are.
        return jax.lax.with_sharding_constraint(gather(cotangent, axes), place).astype(own.dtype), None

    borrow.defvjp(lambda own, whole: (whole, None), backward)
    return borrow(own, whole)
