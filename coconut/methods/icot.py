"""iCoT by stepwise internalisation (Deng et al. 2024, arXiv 2405.14838): the chain is taken away token by token.

Nothing takes the place of what is gone: in the end the model answers at once, and does in its layers what it wrote down
before. Like Coconut's curriculum without thoughts, but in steps so small that the loss hardly jumps.

Where the paper and its authors' code disagree, and what was done here:

- *When tokens go.* The paper speaks of removing so many tokens at each epoch. The code removes one token at a time,
  evenly over the epoch; so do we, over the stage. It rounds the updates between two removals to an integer, we do not.
- *What is no longer a chain.* The code starts the optimizer anew at each removal, but not once the batch before had
  nothing left to remove. Where tokens go from the right its test for that is always true, so the optimizer is never
  started anew. We do what is meant, on both sides, and look at the longest chain of the data, not of one batch.
- *Decoding.* The code leaves sampling on, the paper means greedy answers. Ours are by `SamplingConfig`, greedy unless
  told otherwise.

The page is that of `coconut.methods.language.COT`: the code's own has end-of-sequence tokens between its parts.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Literal, no_type_check

import numpy as np

from coconut.errors import CoconutError, check_fields
from coconut.methods.method import Method
from coconut.pages import Page, Placing, Text, write_on
from coconut.tokenizers import TokenizedExample
from coconut.types import Think

LARGEST_OFFSET = 99
"""The authors' code draws none beyond it."""


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class IcotOptions:
    """Options of `ICOT`.

    Stage 0 removes nothing but ``start_from`` tokens: it teaches the whole chain first. Every stage after it removes
    ``tokens_per_stage`` more, spread evenly over its length. With ``CurriculumConfig.epochs_per_stage = 1`` a stage is
    an epoch; with ``CurriculumConfig.first_stage = 1`` there is no stage 0. A last stage that lasts longer than the
    others spreads its removals likewise: let everything be removed before it.

    Attributes:
      tokens_per_stage: tokens by which the removed part grows in a stage.
      side: whether the first tokens of the chain go first (``left``), or the last ones.
      smoothing: lambda of the random offset, by which an example loses more than is scheduled: ``o`` tokens with a
        probability proportional to ``exp(-lambda * o)``, drawn anew for each example in each epoch. Not in stage 0.
        None for none.
      remove_all_beyond: once as many tokens are scheduled, whole chains are removed, however long; None for never.
      start_from: tokens scheduled before the first removal.
      keep_positions: in training, what follows the gap keeps the positions that it had before: for decoders whose
        positions are learned. An answer is never written so, since nobody knows how long its chain would have been (the
        authors' code has no such side, either), so answers of several tokens meet positions they were not trained at.
        The token before the gap keeps its place here; in the code it moves along.
      restart_optimizer: whether the optimizer starts anew each time one more token is scheduled, as long as any chain
        is not removed whole. `CurriculumConfig.reset_optimizer` comes on top; ``never`` leaves it to this.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    tokens_per_stage: int = 8
    side: Literal["left", "right"] = "left"
    smoothing: float | None = 4.0
    remove_all_beyond: int | None = None
    start_from: int = 0
    keep_positions: bool = False
    restart_optimizer: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        for field, least in (("tokens_per_stage", 1), ("remove_all_beyond", 1), ("start_from", 0)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise CoconutError(f"IcotOptions.{field} = {value!r}: must be at least {least}")
        if self.smoothing is not None and not 0 < self.smoothing < math.inf:
            raise CoconutError(f"IcotOptions.smoothing = {self.smoothing!r}: must be None or a positive number")


def scheduled_tokens(placing: Placing) -> int:
    """Tokens that the schedule removes from every chain at a stage and a progress; more than any chain has for all."""
    options: IcotOptions = placing.options
    count = options.start_from
    if placing.stage > 0:
        count += (placing.stage - 1) * options.tokens_per_stage + int(placing.progress * options.tokens_per_stage)
    beyond = options.remove_all_beyond
    return count if beyond is None or count < beyond else sys.maxsize


def drawn_offset(placing: Placing) -> int:
    """Tokens that an example loses beyond the schedule, by the inverse of its distribution.

    ``P(o >= k) = exp(-lambda * k)``, so that ``-log(1 - u) / lambda``, rounded down, has it for a uniform ``u``.
    """
    smoothing = placing.options.smoothing
    if smoothing is None or placing.draw is None or placing.stage == 0:
        return 0
    return min(int(-math.log1p(-placing.draw) / smoothing), LARGEST_OFFSET)


def remove_tokens(
    steps: Sequence[np.ndarray | Think], count: int, side: Literal["left", "right"]
) -> tuple[list[np.ndarray | Think], int]:
    """The steps without ``count`` tokens from one side, and how many there were to remove. Blocks of thoughts stay."""
    kept, removed = [], 0
    for step in steps if side == "left" else reversed(steps):
        if isinstance(step, Think) or removed == count:
            kept.append(step)
            continue
        cut = min(count - removed, len(step))
        removed += cut
        if cut < len(step):
            kept.append(step[cut:] if side == "left" else step[:-cut])
    return (kept if side == "left" else kept[::-1]), removed


def write_what_is_left(example: TokenizedExample, placing: Placing) -> Page:
    """``question steps answer`` without a part of the chain: next to the question, or next to the answer."""
    options: IcotOptions = placing.options
    steps, removed = remove_tokens(example.steps, scheduled_tokens(placing) + drawn_offset(placing), options.side)
    parts = list(write_on(steps, example, placing.markers))
    if options.keep_positions and not placing.answering:
        index = 0 if options.side == "left" else -1
        behind_gap = parts[index]
        assert isinstance(behind_gap, Text)  # A block of thoughts has a marker on either side.
        parts[index] = behind_gap._replace(skips=removed)
    return (Text(example.question), *parts)


def restarts(placing: Placing, longest: int) -> int:
    """The optimizer starts anew when this changes: when one more token is scheduled and some chain still has it."""
    return min(scheduled_tokens(placing), longest) if placing.options.restart_optimizer else 0


ICOT = Method(name="icot", pages={"main": write_what_is_left}, options=IcotOptions, restarts=restarts, needs_steps=True)
