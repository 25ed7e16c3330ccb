"""From pages to aligned batches of one fixed shape. Pure, on the host.

A batch is aligned part by part. The text that every page starts with and that is not scored (the prompt) is written
from the right, so that all prompts end in one column. Every part behind it is written from the left: the text up to the
first block of thoughts, the block, the text up to the second block, and so on. So each block has columns of its own,
the same in every row, and a row leaves empty what it does not use.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from coconut.curriculum import drawable_stages
from coconut.errors import CoconutError
from coconut.pages import Page, Placing, Thoughts, Write
from coconut.tokenizers import TokenizedExample
from coconut.types import IGNORED_LABEL, Batch, Language, Latent, Schedule, Span


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Columns of a batch, part by part: ``prompt, texts[0], thoughts[0], texts[1], thoughts[1], ..., texts[-1]``.

    Attributes:
      prompt: ``P``, columns of the text that is given and that all pages start with.
      texts: columns of the text behind the prompt and behind each block of thoughts; one more than there are blocks.
      thoughts: columns of each block.
      scored: of each text, how many of its last columns may carry a label.
      skipped: positions that a row leaves free at most (`Text.skips`); they take no columns.
      examples: examples that share a row (`coconut.packing`). Prompt and texts are as wide as those of all of them
        together need, and each block has its columns for each of them. None where a row is one example.
    """

    prompt: int
    texts: tuple[int, ...]
    thoughts: tuple[int, ...]
    scored: tuple[int, ...]
    skipped: int = 0
    examples: int | None = None

    @property
    def blocks(self) -> tuple[int, ...]:
        """Columns of a row in each block, those of all its examples."""
        return tuple((self.examples or 1) * count for count in self.thoughts)

    @property
    def columns(self) -> int:
        """``T``."""
        return self.prompt + sum(self.texts) + sum(self.blocks)

    @property
    def positions(self) -> int:
        """Positions that a row needs at most."""
        return self.columns + self.skipped

    @property
    def starts(self) -> tuple[list[int], list[int]]:
        """The first column of each text, and of each block of thoughts."""
        texts, blocks, column = [self.prompt], [], self.prompt
        for text, block in zip(self.texts, self.blocks, strict=False):
            blocks.append(column + text)
            column += text + block
            texts.append(column)
        return texts, blocks

    def schedule(self, *, feeds_back: bool) -> Schedule:
        """The spans of a batch.

        Text that no thought divides is one language span.

        Args:
          feeds_back: whether the model makes the thoughts, one from another. Where it does not, each is the latent
            marker's own embedding, a pause token, and the whole row is one language span.
        """
        spans: list[Span] = []
        length, scored = self.prompt, 0
        for text, own_scored, block in zip(self.texts, self.scored, (*self.blocks, 0), strict=True):
            length, scored = length + text, scored + text if scored else own_scored
            if block and feeds_back:
                if length:
                    spans.append(Language(length, scored))
                spans.append(Latent(block, self.examples or 1))
                length = scored = 0
            else:
                length, scored = length + block, scored + block if scored else 0
        return (*spans, Language(length, scored)) if length else tuple(spans)


def page_shape(pages: Iterable[Page], *, multiple_of: int = 1, to_learn: bool = False) -> Shape:
    """The least shape that holds every page.

    Args:
      pages: the pages; each is looked at once.
      multiple_of: the columns of the prompt and of each text are rounded up to a multiple of this.
      to_learn: whether something must be scored on every page.

    Raises:
      CoconutError: a page does not begin with text that is given, or scores nothing.
    """
    prompt, texts, thoughts, skipped = 0, [0], [], 0
    unscored: list[int | None] = [None]  # Columns of each text before the first one that some page scores.
    for page in pages:
        own_prompt = length = number = scored_length = own_skipped = 0
        before_all = True
        for part in page:
            if isinstance(part, Thoughts):
                if length > texts[number]:
                    texts[number] = length
                if number == len(thoughts):
                    thoughts.append(0)
                    texts.append(0)
                    unscored.append(None)
                if part.count > thoughts[number]:
                    thoughts[number] = part.count
                number += 1
                length = 0
                before_all = False
                continue
            own_skipped += part.skips
            if part.scored:
                size = len(part.ids)
                first = unscored[number]
                if first is None or length < first:
                    unscored[number] = length
                length += size
                scored_length += size
                before_all = False
            elif before_all:
                own_prompt += len(part.ids)
            else:
                length += len(part.ids)
        if length > texts[number]:
            texts[number] = length
        if own_prompt > prompt:
            prompt = own_prompt
        if own_skipped > skipped:
            skipped = own_skipped
        if not own_prompt:
            raise CoconutError(_begins_wrongly(page))
        if to_learn and not scored_length:
            raise CoconutError("a page to learn from must have text that is scored; here is one that has none")
    widths = [_round_up(length, multiple_of) for length in texts]
    scored = [0 if first is None else width - first for width, first in zip(widths, unscored, strict=True)]
    return Shape(
        prompt=_round_up(prompt, multiple_of),
        texts=tuple(widths),
        thoughts=tuple(thoughts),
        scored=tuple(scored),
        skipped=skipped,
    )


def stage_shape(
    examples: Iterable[TokenizedExample],
    write: Write,
    placing: Placing,
    *,
    stages: Iterable[int] = (),
    multiple_of: int = 1,
) -> Shape:
    """The least shape that holds every example at every stage it may be put at while the run is at the placing's.

    Args:
      examples: all examples of the data set.
      write: how an example is written down.
      placing: the run's stage, its options and markers; without a draw.
      stages: further stages of the run to make room for.
      multiple_of: see `page_shape`.

    Raises:
      CoconutError: a page does not begin with text that is given, or scores nothing.
    """
    run_stages, curriculum = (placing.stage, *stages), placing.curriculum
    possible: dict[int, list[Placing]] = {}  # By the number of steps.

    def pages() -> Iterable[Page]:
        for example in examples:
            steps = example.num_steps
            if steps not in possible:
                at = itertools.chain(run_stages, *(drawable_stages(curriculum, stage, steps) for stage in run_stages))
                possible[steps] = [dataclasses.replace(placing, stage=stage) for stage in sorted(set(at))]
            for here in possible[steps]:
                yield write(example, here)

    return page_shape(pages(), multiple_of=multiple_of, to_learn=True)


def align(
    pages: Sequence[Page | None],
    shape: Shape,
    *,
    pad_id: int,
    latent_id: int,
    feeds_back: bool,
    examples: Sequence[int] | None = None,
) -> Batch:
    """Writes pages into the columns of a shape; the module says how.

    A page of None only fills the batch: nothing in its row is valid.

    Args:
      pages: a page for each row.
      shape: columns of the batch.
      pad_id: token id of columns that are not valid.
      latent_id: token id of thoughts.
      feeds_back: whether the model makes the thoughts; see `Shape.schedule`.
      examples: index of each row's example; counted from 0 if None.

    Raises:
      CoconutError: a page does not fit the shape, or does not begin with text that is given.
    """
    size = (len(pages), shape.columns)
    tokens = np.full(size, pad_id, np.int32)
    valid = np.zeros(size, bool)
    labels = np.full(size, IGNORED_LABEL, np.int32)
    numbers = np.full(size, -1, np.int32)
    answers = np.zeros(size, bool)
    before_answer = np.full(len(pages), -1, np.int32)
    skipped = np.zeros(size, np.int32)
    text_starts, block_starts = shape.starts
    for index, page in enumerate(pages):
        if page is None:
            continue
        own = page_shape([page])
        if not _fits(own, shape):
            raise CoconutError(f"row {index} needs {own}; the batch has room for {shape}")
        column, number = shape.prompt - own.prompt, 0
        for part in page:
            if isinstance(part, Thoughts):
                start = block_starts[number]
                tokens[index, start : start + part.count] = latent_id
                valid[index, start : start + part.count] = True
                number += 1
                column = text_starts[number]
                continue
            here = slice(column, column + len(part.ids))
            if part.skips:
                skipped[index, column:] += part.skips
            tokens[index, here] = part.ids
            valid[index, here] = True
            if part.scored:
                labels[index, here] = part.ids
                numbers[index, here] = part.piece
                answers[index, here] = part.answer
                if part.answer:
                    before_answer[index] = np.flatnonzero(valid[index, : column + part.prefix])[-1]
            column = here.stop
    positions = np.where(valid, np.cumsum(valid, 1) - 1 + skipped, 0).astype(np.int32)
    if examples is None:
        examples = [index if page is not None else -1 for index, page in enumerate(pages)]
    return Batch(
        schedule=shape.schedule(feeds_back=feeds_back),
        tokens=tokens,
        positions=positions,
        valid=valid,
        labels=labels,
        pieces=numbers,
        answers=answers,
        before_answer=before_answer,
        examples=np.asarray(examples, np.int32),
    )


def _round_up(length: int, multiple_of: int) -> int:
    return -(-length // multiple_of) * multiple_of


def _begins_wrongly(page: Page) -> str:
    first = next((part for part in page if isinstance(part, Thoughts) or len(part.ids)), None)
    what = "nothing" if first is None else "thoughts" if isinstance(first, Thoughts) else "text that is scored"
    return f"a page must begin with text that is given, such as the question; here is one that begins with {what}"


def _fits(own: Shape, shape: Shape) -> bool:
    """Whether a page of shape ``own`` has room in ``shape``, its labels in scored columns."""
    if own.prompt > shape.prompt or len(own.thoughts) > len(shape.thoughts):
        return False
    texts = zip(own.texts, own.scored, shape.texts, shape.scored, strict=False)
    return all(a <= b for a, b in zip(own.thoughts, shape.thoughts, strict=False)) and all(
        length <= room and (not scored or length - scored >= room - room_scored)
        for length, scored, room, room_scored in texts
    )
