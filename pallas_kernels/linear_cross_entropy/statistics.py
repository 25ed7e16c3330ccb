"""What every implementation keeps of a row of logits."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int

NO_LABEL = -1
"""The label of a row that picks no logit: it is ignored, or another shard of the vocabulary holds its label."""


class Statistics(NamedTuple):
    """What is kept of the logits of each row, over one shard of the vocabulary.

    Attributes:
      log_normalizers: log of the sum of the exponentials, float32.
      picked: the logit of the row's label, 0 where that is `NO_LABEL`, float32.
      best: the largest logit, float32; not differentiated.
      predictions: the first id that has it, int32.
    """

    log_normalizers: Float[Array, " N"]
    picked: Float[Array, " N"]
    best: Float[Array, " N"]
    predictions: Int[Array, " N"]
