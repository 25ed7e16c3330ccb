"""How the thoughts of a block are made: chosen once, used by the rollout and by generation."""

import dataclasses
from typing import Literal, no_type_check

from coconut.errors import CoconutError, check_fields

Gradient = Literal["implicit", "autodiff"]


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class OneByOne:
    """Each thought is made of the hidden state of the column before it: Coconut (Hao et al. 2024).

    Attributes:
      gradient: ``implicit`` (`coconut.latent.thoughts`) or ``autodiff``, JAX's own derivative of the scan. They are
        equal up to rounding.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    gradient: Gradient = "implicit"

    def __post_init__(self) -> None:
        check_fields(self)

    def needed(self, thoughts: int) -> int:
        """The passes one after the other that a block of so many thoughts takes."""
        return thoughts


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweeps:
    """All thoughts of a block are made together, and made again in each sweep: PCCoT (Wu et al. 2025).

    The block first holds the latent marker in all of its columns. A sweep runs all columns in parallel; each column's
    next input is made of the hidden state of the column before. After ``t`` sweeps the first ``t`` thoughts are those
    of `OneByOne`. As many sweeps as thoughts therefore equal `OneByOne`, in values and gradients, and more change
    nothing. Without a sweep the markers stay: pause tokens. The gradient is autodiff's, through all sweeps.

    Attributes:
      count: number of sweeps.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    count: int

    def __post_init__(self) -> None:
        check_fields(self)
        if self.count < 0:
            raise CoconutError(f"Sweeps.count = {self.count!r}: must be at least 0")

    def needed(self, thoughts: int) -> int:
        """The sweeps that a block of so many thoughts takes; the others would change nothing."""
        return min(self.count, thoughts)


Thinker = OneByOne | Sweeps
