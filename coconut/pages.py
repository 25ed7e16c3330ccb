"""Pages: the one way to write an example down, read by training, answering, choosing and probing.

A page is a row in its order: text, and blocks of thoughts wherever the method or the data put them. A method says what
stands on the page of an example (`Write`); who reads it decides what to do with it. Training learns the scored text.
Whoever asks the model shows it what stands before the first scored text (`given`).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from coconut.curriculum import CurriculumConfig, Replacement
from coconut.errors import CoconutError
from coconut.tokenizers import TokenizedExample, Tokenizer
from coconut.types import Think

Ids = Int32[np.ndarray, "_"]


class Text(NamedTuple):
    """Tokens of a page. Markers are ordinary text.

    Attributes:
      ids: the tokens.
      scored: whether the model has to learn to write them.
      piece: of scored text, its number: 0 for the first text that is scored, one more for each that follows.
      answer: whether they belong to the answer.
      prefix: how many of the first tokens of an answer stand before the answer itself.
      skips: positions left free before the first of them; they are counted on behind it.
    """

    ids: Ids
    scored: bool = False
    piece: int = -1
    answer: bool = False
    prefix: int = 0
    skips: int = 0


class Thoughts(NamedTuple):
    """A block of thoughts.

    Attributes:
      count: how many. A block of none keeps what follows it in the columns that follow the blocks of other rows.
      stands_for: the written steps that it replaces, the last one maybe in part.
    """

    count: int
    stands_for: tuple[Ids, ...] = ()


Page = tuple[Text | Thoughts, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Markers:
    """Token ids of the markers.

    Attributes:
      start: stands before a block of thoughts.
      latent: stands for a thought where there is one, and is the token of a pause.
      end: stands behind a block of thoughts.
    """

    start: int
    latent: int
    end: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Markers":
        """The markers of a tokenizer."""
        return cls(start=tokenizer.start_latent_id, latent=tokenizer.latent_id, end=tokenizer.end_latent_id)

    @functools.cached_property
    def start_text(self) -> Text:
        """The start marker as text that is given."""
        return Text(np.asarray([self.start], np.int32))

    @functools.cached_property
    def end_text(self) -> Text:
        """The end marker; it is never scored, since whoever counts the thoughts writes it."""
        return Text(np.asarray([self.end], np.int32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placing:
    """When and for what a page is written.

    Attributes:
      curriculum: the run's curriculum.
      stage: the stage of the example.
      options: the method's own config.
      markers: the tokenizer's.
      progress: share of the run's stage that is over, from 0 to 1.
      draw: a draw from [0, 1) for this example in this epoch; None asks for the longest page it may become.
      answering: whether the page is written to be answered: up to its first scored text it holds what the model is
        given at test time.
    """

    curriculum: CurriculumConfig
    stage: int
    options: Any
    markers: Markers
    progress: float = 0.0
    draw: float | None = None
    answering: bool = False


Write = Callable[[TokenizedExample, Placing], Page]
"""Writes an example down. A pure function: the same example and placing give the same page.

The columns of a stage's batches are made for the pages without a draw and without progress: with them no part of a page
may be longer.
"""


# --- For those who write ------------------------------------------------------------------------------------------


def write_on(parts: Iterable[Ids | Think | Thoughts | Text], example: TokenizedExample, markers: Markers) -> Page:
    """What follows the question: steps and answer as scored text, blocks of thoughts between markers.

    A start marker behind scored text is scored, too: there the model itself has to begin to think.

    Args:
      parts: ids of a step, to be scored; a block of thoughts; or text that goes in as it is.
      example: the example, whose answer ends the page.
      markers: the markers.
    """
    page: list[Text | Thoughts] = []
    piece = 0
    for part in parts:
        if isinstance(part, np.ndarray):
            page.append(Text(part, True, piece))
            piece += 1
        elif isinstance(part, Text):
            page.append(part)
        else:
            if piece:
                page.append(Text(markers.start_text.ids, True, piece))
                piece += 1
            else:
                page.append(markers.start_text)
            page += (Thoughts(part.count) if isinstance(part, Think) else part, markers.end_text)
    page.append(Text(example.answer, True, piece, True, example.answer_prefix))
    return tuple(page)


def index_behind(steps: Sequence[Ids | Think], count: int) -> int:
    """Where the steps go on behind the ``count``-th written one; blocks of thoughts are no written steps."""
    index = 0
    while count:
        count -= not isinstance(steps[index], Think)
        index += 1
    return index


def split_step(steps: tuple[Ids | Think, ...], replaced: Replacement) -> tuple[tuple[Ids | Think, ...], int]:
    """The steps with the one that is replaced in part as two, and how many written ones of these are replaced."""
    if not replaced.share:
        return steps, replaced.skipped
    index = index_behind(steps, replaced.skipped + 1) - 1
    step = steps[index]
    assert not isinstance(step, Think)
    tokens = int(replaced.share * len(step))
    if not tokens:
        return steps, replaced.skipped
    return (*steps[:index], step[:tokens], step[tokens:], *steps[index + 1 :]), replaced.skipped + 1


def take_steps(steps: tuple[Ids | Think, ...], count: int) -> tuple[tuple[Ids, ...], tuple[Ids | Think, ...]]:
    """The first ``count`` written steps, and all that is left without them: blocks of thoughts between them stay."""
    index = index_behind(steps, count)
    taken = tuple([step for step in steps[:index] if not isinstance(step, Think)])
    if index == count:
        return taken, steps[index:]
    return taken, (*(step for step in steps[:index] if isinstance(step, Think)), *steps[index:])


# --- For those who read -------------------------------------------------------------------------------------------


def given(page: Page) -> Page:
    """What the model is given of a page: all that stands before its first scored text."""
    for index, part in enumerate(page):
        if isinstance(part, Text) and part.scored:
            return page[:index]
    return page


def count_thoughts(page: Page) -> int:
    """The thoughts of all blocks of a page."""
    return sum(part.count for part in page if isinstance(part, Thoughts))


def has_blocks(page: Page) -> bool:
    """Whether a page has a block of thoughts, be it one of none."""
    return any(isinstance(part, Thoughts) for part in page)


def with_thoughts(page: Page, count: int) -> Page:
    """The page with ``count`` thoughts in each of its blocks.

    Raises:
      CoconutError: the page has no block that thoughts could stand in.
    """
    if count and not has_blocks(page):
        raise CoconutError(f"{count} thoughts: the method writes this question without a block of thoughts")
    return tuple(part._replace(count=count) if isinstance(part, Thoughts) else part for part in page)


def question_alone(question: Ids, curriculum: CurriculumConfig) -> TokenizedExample:
    """A question whose steps nobody knows: it is written as if there were as many as the curriculum replaces at most.

    The steps and the answer hold nothing; only what is `given` of a page of this example means anything.
    """
    nothing = np.zeros(0, np.int32)
    return TokenizedExample(question=question, steps=(nothing,) * curriculum.max_latent_stage, answer=nothing)
