"""The contract of a method."""

import dataclasses
from collections.abc import Callable

from coconut.curriculum import SequenceRule
from coconut.losses import Ratio, language_loss
from coconut.models.decoder import Decoder
from coconut.types import Batch, ModelOutput

Loss = Callable[[Decoder, Batch, ModelOutput], tuple[Ratio, dict[str, Ratio]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What differs between methods.

    Attributes:
      name: as in configs and tables.
      rule: how an example is written down at a stage.
      loss: from the decoder, the batch and the rollout's output to the loss and the metrics.
    """

    name: str
    rule: SequenceRule
    loss: Loss = language_loss
