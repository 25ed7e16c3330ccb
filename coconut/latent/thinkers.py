"""How thoughts are made: chosen once by a method, used by the rollout and by generation."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneByOne:
    """Each thought is made from the one before it.

    Attributes:
      gradient: ``implicit`` (`coconut.latent.thoughts`) or ``autodiff``.
    """

    gradient: Literal["implicit", "autodiff"] = "implicit"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweeps:
    """All thoughts of a block are made in parallel, in sweeps over the whole block.

    Attributes:
      count: the sweeps. With as many as there are thoughts they equal thoughts made one by one; with none each thought
        is the latent marker's own embedding, a pause token.
    """

    count: int


Thinker = OneByOne | Sweeps
