"""The contract of a method."""

import dataclasses
from collections.abc import Callable, Mapping

from coconut.latent.thinkers import OneByOne, Sweeps, Thinker
from coconut.losses import Ratio, language_loss
from coconut.models.decoder import Decoder
from coconut.pages import Page, Placing, Write
from coconut.tokenizers import TokenizedExample
from coconut.types import Batch, ModelOutput

Loss = Callable[[Decoder, Batch, ModelOutput], tuple[Ratio, dict[str, Ratio]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The options of a method that has none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What differs between methods.

    Attributes:
      name: as in configs and tables.
      pages: how an example is written down, by name; ``main`` comes first and is what is answered.
      options: the type of its own config; every value of it must have a default.
      think: how thoughts are made.
      loss: from the decoder, the batch and the rollout's output to the loss and the metrics.
    """

    name: str
    pages: Mapping[str, Write]
    options: type = NoOptions
    think: Thinker = OneByOne()  # noqa: RUF009 - immutable
    loss: Loss = language_loss

    def write_to_answer(self, example: TokenizedExample, placing: Placing) -> Page:
        """The page of an example that is to be answered."""
        return self.pages["main"](example, dataclasses.replace(placing, answering=True))

    @property
    def feeds_back(self) -> bool:
        """Whether thoughts are hidden states fed back; without sweeps they are pause tokens, known beforehand."""
        return self.think != Sweeps(count=0)
