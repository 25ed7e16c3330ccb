"""What a teacher's states at one token teach a student: the distillation of CODI and of what follows it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from coconut.losses import Ratio, ratio


def smooth_l1(difference: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """``x ** 2 / 2`` below 1, ``|x| - 1 / 2`` above it (Huber's loss at 1)."""
    size = jnp.abs(difference)
    return jnp.where(size < 1, 0.5 * jnp.square(difference), size - 0.5)


def deviation(
    values: Float[Array, "L *B D"], counted: Bool[Array, "*B"], *, each_layer: bool = True
) -> Float[Array, " L"]:
    """The standard deviation of each layer's numbers, or of all layers' together, that count; unbiased (N - 1)."""
    counted = jnp.broadcast_to(counted[None, ..., None], values.shape)
    axes = tuple(range(1 if each_layer else 0, values.ndim))
    number = counted.sum(axes, keepdims=True)
    mean = jnp.sum(values, axes, where=counted, keepdims=True) / jnp.maximum(number, 1)
    square = jnp.sum(jnp.square(values - mean), axes, where=counted, keepdims=True) / jnp.maximum(number - 1, 1)
    # A batch of rows that hold nothing deviates by nothing, and would be divided by it.
    return jnp.broadcast_to(jnp.sqrt(jnp.where(square > 0, square, 1.0)).reshape(-1), len(values))


def distance(
    student: Float[Array, "L *B D"],
    teacher: Float[Array, "L *B D"],
    counted: Bool[Array, "*B"],
    *,
    squared: bool = False,
    divide_by: str = "layer",
) -> Ratio:
    """How far the student's states are from the teacher's: a mean over layers, states and components.

    The teacher is a constant. Each layer's mean is divided by the teacher's deviation in that layer, over the states of
    this microbatch on all devices: as in the original code, a smaller microbatch divides by another number.

    Args:
      student: states of each layer.
      teacher: likewise.
      counted: states that count.
      squared: the square of the difference in place of `smooth_l1`; it is divided by the squared deviation.
      divide_by: the deviation of each ``layer``, of ``all`` layers together, or ``none``.
    """
    wide = jnp.promote_types(student.dtype, jnp.float32)
    student, teacher = student.astype(wide), jax.lax.stop_gradient(teacher).astype(wide)
    difference = student - teacher
    far = jnp.square(difference) if squared else smooth_l1(difference)
    if divide_by != "none":
        scale = deviation(teacher, counted, each_layer=divide_by == "layer")
        far = far / (jnp.square(scale) if squared else scale).reshape(-1, *[1] * (far.ndim - 1))
    return ratio(far.mean((0, -1)), counted)
