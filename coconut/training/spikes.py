"""Steps whose gradient is far longer than those before it: spikes, which a run may skip.

A gradient is judged by the logarithm of its norm, beside those of the last steps that were taken. The rule is robust:
it asks for their median and their median absolute deviation (Hampel 1974; times 1.4826 that is a normal distribution's
standard deviation), which a few spikes do not move as they do a mean and a standard deviation.
"""

import dataclasses
import math
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coconut.errors import CoconutError, check_fields

NORMAL = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""
LEAST_DEVIATION = 0.01
"""Of logarithms of norms: where all norms of a window agree, a hundredth more is still no deviation."""


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """When a gradient is a spike, so that its step is skipped.

    Attributes:
      window: steps that a gradient is judged by. Until so many were taken since the stage began nothing is a spike:
        each stage asks for something new.
      deviations: a spike's logarithm of the norm lies more than so many deviations above the median.
      most_in_a_row: spikes that are skipped one after the other. The next one is taken and begins a new window: what
        goes on is no spike.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    window: int = 128
    deviations: float = 6.0
    most_in_a_row: int = 3

    def __post_init__(self) -> None:
        check_fields(self)

        def reject(field: str, why: str) -> None:
            raise CoconutError(f"SpikeConfig.{field} = {getattr(self, field)!r}: {why}")

        if self.window < 8:
            reject("window", "must be at least 8")
        if not 0 < self.deviations < math.inf:
            reject("deviations", "must be positive")
        if self.most_in_a_row < 1:
            reject("most_in_a_row", "must be at least 1")


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds them of abstract values and shardings
@dataclasses.dataclass(frozen=True, kw_only=True)
class SpikeWindow:
    """What a gradient is judged by; part of a run's state, so that a resumed run judges alike.

    Attributes:
      logarithms: of the norms of the last steps that were taken, in no order.
      count: steps that were taken since the window began.
      in_a_row: spikes that were the last steps of all.
    """

    logarithms: Float[Array, "W"]
    count: Int[Array, ""]
    in_a_row: Int[Array, ""]

    @classmethod
    def fresh(cls, size: int) -> "SpikeWindow":
        """An empty one."""
        zero = jnp.zeros((), jnp.int32)
        return cls(logarithms=jnp.zeros(size, jnp.float32), count=zero, in_a_row=zero)


def judge(window: SpikeWindow, norm: Float[Array, ""], config: SpikeConfig) -> tuple[Bool[Array, ""], SpikeWindow]:
    """Whether a gradient is a spike, and the window behind it.

    Args:
      window: of the steps before.
      norm: of the gradient; finite.
      config: the rule.
    """
    # A gradient of zero is as short as can be, and no reason for a logarithm that is not finite.
    logarithm = jnp.log(jnp.maximum(norm.astype(jnp.float32), jnp.finfo(jnp.float32).tiny))
    median = jnp.median(window.logarithms)
    deviation = jnp.maximum(NORMAL * jnp.median(jnp.abs(window.logarithms - median)), LEAST_DEVIATION)
    above = (window.count >= config.window) & (logarithm - median > config.deviations * deviation)
    spike = above & (window.in_a_row < config.most_in_a_row)
    # One too many of them is taken, and begins a new window.
    before = jnp.where(above, 0, window.count)
    taken = SpikeWindow(
        logarithms=window.logarithms.at[before % config.window].set(logarithm),
        count=before + 1,
        in_a_row=jnp.zeros_like(window.in_a_row),
    )
    skipped = dataclasses.replace(window, in_a_row=window.in_a_row + 1)
    return spike, jax.tree.map(lambda a, b: jnp.where(spike, a, b), skipped, taken)
