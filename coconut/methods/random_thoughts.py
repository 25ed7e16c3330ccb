"""Coconut with a random number of thoughts, so that a model can be asked with any number of them.

Coconut (Hao et al. 2024) trains each stage with one number of thoughts, and another number at test time is one that the
model has never seen. Looped models are trained with a random number of rounds for the same reason (Geiping et al. 2025,
arXiv 2502.05171). For thoughts no figures are known to us.
"""

import dataclasses
from typing import no_type_check

from coconut.errors import CoconutError, check_fields
from coconut.methods.coconut import write_with_thoughts
from coconut.methods.method import Method
from coconut.pages import Page, Placing, Thoughts
from coconut.tokenizers import TokenizedExample


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomThoughtsOptions:
    """Options of `RANDOM_THOUGHTS`.

    Attributes:
      least: thoughts that a page has at least, where its stage has as many; 0 also asks for answers at once.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    least: int = 1

    def __post_init__(self) -> None:
        check_fields(self)
        if self.least < 0:
            raise CoconutError(f"RandomThoughtsOptions.least = {self.least!r}: must be at least 0")


def write_with_some_thoughts(example: TokenizedExample, placing: Placing) -> Page:
    """Coconut's page, with a number of thoughts drawn uniformly from ``least`` to that of the stage.

    They stand for the same steps as all of the stage's thoughts would. Without a draw, as in answering, there are all.
    """
    page = write_with_thoughts(example, placing)
    if placing.draw is None:
        return page
    # The first block is the curriculum's; others are of the data.
    index = next(i for i, part in enumerate(page) if isinstance(part, Thoughts))
    block = page[index]
    assert isinstance(block, Thoughts)
    least = min(placing.options.least, block.count)
    count = least + int(placing.draw * (block.count - least + 1))
    return (*page[:index], block._replace(count=count), *page[index + 1 :])


RANDOM_THOUGHTS = Method(
    name="random_thoughts",
    pages={"main": write_with_some_thoughts},
    options=RandomThoughtsOptions,
    needs_steps=True,
)
