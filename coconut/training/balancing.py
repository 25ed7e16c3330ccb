"""Experts used evenly without a loss for it: the correction bias of sigmoid routers (DeepSeek-V3, section 2.1.2).

After each step the bias of an expert that more columns chose than the mean of its layer falls by a fixed amount, that
of one that fewer chose rises by as much (Wang et al. 2024, "Auxiliary-loss-free load balancing", algorithm 1). It
decides which experts a column chooses, and not how much each of them counts, so that the loss does not know it.

No gradient, moment, weight decay or clipping has a part in it. Loads are whole numbers summed over all rows of a step,
so that microbatches and devices change nothing but what rounding makes of a choice between two experts that score
alike.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from coconut.model import Parameters
from coconut.models.experts import Tally

Loads = Mapping[str, Float[Array, "*L E"]]
"""How many columns chose each expert, by the name of the correction bias of their router."""


def no_loads(balanced: Parameters) -> dict[str, Array]:
    """Loads that are 0."""
    return {name: jnp.zeros_like(value) for name, value in balanced.items()}


def with_tallies(parameters: Parameters, loads: Loads) -> Parameters:
    """The parameters, with a `Tally` in the place of each correction bias that has loads."""
    return {name: Tally(value, loads[name]) if name in loads else value for name, value in parameters.items()}


def rebalanced(balanced: Parameters, loads: Loads, rate: float) -> Parameters:
    """The correction biases after a step; one whose expert has the mean load stays.

    Args:
      balanced: the biases.
      loads: of the step.
      rate: by how much they move.
    """
    towards = {name: jnp.sign(load.mean(-1, keepdims=True) - load) for name, load in loads.items()}
    return {name: (value + rate * towards[name]).astype(value.dtype) for name, value in balanced.items()}
