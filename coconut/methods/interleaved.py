"""Thoughts and written steps by turns: a sequence that thinks, writes and thinks again."""

import dataclasses
from typing import no_type_check

from coconut.curriculum import replace_steps
from coconut.errors import CoconutError, check_fields
from coconut.latent.halting import HaltingConfig
from coconut.methods.method import Method
from coconut.pages import Page, Placing, Text, Thoughts, write_on
from coconut.tokenizers import TokenizedExample
from coconut.types import Think


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class InterleavedOptions:
    """Options of `INTERLEAVED`.

    Attributes:
      blocks: blocks that a row has room for where the model itself opens them; one that opens more is cut there.

    Raises:
      CoconutError: a value out of range; the message names the field and the value.
    """

    blocks: int = 8

    def __post_init__(self) -> None:
        check_fields(self)
        if self.blocks < 1:
            raise CoconutError(f"InterleavedOptions.blocks = {self.blocks!r}: must be at least 1")


def write_by_turns(example: TokenizedExample, placing: Placing) -> Page:
    """``question <start> thoughts <end> step 2 <start> thoughts <end> step 4 ... answer``.

    At stage ``s`` the first ``s`` of the odd-numbered steps are each replaced in place by ``c_thought`` thoughts, past
    ``max_latent_stage`` all of them; even-numbered steps stay written.

    Raises:
      CoconutError: stages of the curriculum replace steps in part.
    """
    if placing.curriculum.stage_adds == "thought":
        raise CoconutError("CurriculumConfig.stage_adds = 'thought': method = 'interleaved' replaces whole steps alone")
    odd = (example.num_steps + 1) // 2
    left = replace_steps(placing.curriculum, placing.stage, odd).skipped
    parts, number = [], 0
    for step in example.steps:
        if isinstance(step, Think):
            parts.append(step)
            continue
        number += 1
        if number % 2 and left:
            parts.append(Thoughts(placing.curriculum.c_thought, (step,)))
            left -= 1
        else:
            parts.append(step)
    return (Text(example.question), *write_on(parts, example, placing.markers))


def halt_by_count(placing: Placing) -> HaltingConfig | None:
    """A block that the model opens itself has as many thoughts as one that replaces a step in training."""
    count = placing.curriculum.c_thought
    return HaltingConfig(stop="count", most=count, room=placing.options.blocks * count) if count else None


INTERLEAVED = Method(
    name="interleaved",
    pages={"main": write_by_turns},
    options=InterleavedOptions,
    halting=halt_by_count,
    needs_steps=True,
)
