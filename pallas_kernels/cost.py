"""What a kernel costs, said to the compiler, which cannot look inside; it schedules by it, and plans count it."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl


def estimate_cost(arrays: Sequence[Any], *, pairs: int, features: int, products: int) -> pl.CostEstimate:
    """The cost of a kernel that forms products over all pairs of rows of its operands.

    Args:
      arrays: what it reads and writes, each once.
      pairs: such as all queries with the keys they see, over all heads.
      features: width of the rows.
      products: how many products of that size, scores and their like: one exponential each pair besides.
    """
    moved = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays)
    return pl.CostEstimate(flops=2 * products * pairs * features, transcendentals=pairs, bytes_accessed=moved)
