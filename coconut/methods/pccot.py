"""PCCoT (Wu et al. 2025, arXiv 2506.18582): CODI whose thoughts are made together, in a few sweeps.

As many sweeps as thoughts make the thoughts one after the other; no sweep leaves pause tokens
(`coconut.latent.thinkers.Sweeps`). The authors take 24 thoughts and 3 sweeps.
"""

import dataclasses
from typing import no_type_check

from coconut.latent.thinkers import Sweeps
from coconut.methods.coconut import write_final_stage
from coconut.methods.codi import CodiOptions, codi_loss, write_for_teacher
from coconut.methods.method import Method


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class PccotOptions(CodiOptions):
    """Options of `PCCOT`: those of CODI, and the number of sweeps.

    The distance leaves out what the first layer reads, as in the original code. For Llama the authors set ``distill``
    to 20 and ``divide_by`` to ``all``; left at 1 it reaches half of the accuracy.

    Attributes:
      sweeps: how often all thoughts are made anew.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    sweeps: int = 3
    embedding: bool = False

    def __post_init__(self) -> None:
        CodiOptions.__post_init__(self)
        Sweeps(count=self.sweeps)


def sweep(options: PccotOptions) -> Sweeps:
    """The thinker of the options."""
    return Sweeps(count=options.sweeps)


PCCOT = Method(
    name="pccot",
    pages={"main": write_final_stage, "teacher": write_for_teacher},
    options=PccotOptions,
    think=sweep,
    needs_steps=True,
    loss=codi_loss,
)
