"""Packing: several examples a row, without padding between them. Pure, on the host.

A packed batch holds the very examples of the batch it is made of, as many in each row, and each row keeps the parts of
its shape: the prompts of its examples one behind the other, then their first texts, and so on. A block of thoughts has
columns for one thought of each example, then for the next one of each: what makes thoughts makes one of every example
together, so that they take no more passes than those of a single example.

Which examples share a row is chosen so that all rows become about as wide. A packer of streams, such as grain's
`FirstFitPackIterDataset`, fills rows of a given width with whatever comes and fits: then which examples share a step,
and how many, depends on their lengths, and a row has thoughts of few examples or of many. Here a step learns from the
same examples as without packing, and the number of rows is given, since devices share them. What is left to choose is
a width: the problem is one of balance (multiway number partitioning), not of bins.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from coconut.batching import Shape
from coconut.errors import CoconutError
from coconut.types import IGNORED_LABEL, Batch

NONE = -1
"""In the place of an example: nothing."""

_LARGE = np.iinfo(np.int64).max
_FIRST = 2**40  # Two numbers are compared as one: the first times this, plus the second, which is smaller than this.

SPARE = 32
"""The narrow shape has one column more for every so many that the batches that were looked at need."""


def share_rows(widths: Int[np.ndarray, "N X"], rows: int) -> Int[np.ndarray, "R G"]:
    """Which examples share a row, so that the widest row is narrow.

    From the longest to the shortest, each goes to the row where its parts meet the least, of those that have room for
    one more (Graham 1969, the longest first). Then examples of the widest rows change places with others as long as
    that makes all rows together narrower. Of equal choices the first counts, so that nothing is left to chance.

    Args:
      widths: columns that each of the ``N`` examples needs in each part of a row.
      rows: ``R``, which must divide ``N``.

    Returns:
      The examples of each row, in the order of the batch.
    """
    widths = widths.astype(np.int64)
    loads, members = np.zeros((rows, widths.shape[1]), np.int64), [[] for _ in range(rows)]
    full = np.zeros(rows, bool)
    for index in np.argsort(-widths.sum(1), kind="stable"):
        # What the example adds to the sum of the squares of all loads.
        row = int(np.argmin(np.where(full, _LARGE, loads @ widths[index])))
        members[row].append(int(index))
        loads[row] += widths[index]
        full[row] = len(members[row]) == len(widths) // rows
    shared = np.asarray(members, np.int64)
    while (better := _best_swap(widths, shared)) is not None:
        shared = better
    return np.sort(shared, 1)


def _best_swap(widths: Int[np.ndarray, "N X"], members: Int[np.ndarray, "R G"]) -> Int[np.ndarray, "R G"] | None:
    """The members after the best exchange of an example of a widest row with one of another row.

    Returns:
      None where none makes the sum of the widest parts smaller, or with the same one the squares of all widths.
    """
    loads = widths[members].sum(1)
    squares = np.square(loads).sum(1)
    best, found = loads.max(0).sum() * _FIRST + squares.sum(), None
    for row in np.unique(loads.argmax(0)).tolist():
        others = np.delete(np.arange(len(loads)), row)
        if not len(others):
            continue
        # [the other row, its example, this row's example, part]
        moved = widths[members[others]][:, :, None] - widths[members[row]]
        here, there = loads[row] + moved, loads[others][:, None, None] - moved
        # The widest of the rows that stay as they are: a second one where the widest is the other.
        order = np.sort(np.concatenate([loads[others], np.zeros_like(loads[:1])]), 0)
        rest = np.where(loads[others] == order[-1], order[-2], order[-1])
        widest = np.maximum(np.maximum(here, there), rest[:, None, None]).sum(-1)
        after = squares.sum() - squares[row] - squares[others][:, None, None]
        after = widest * _FIRST + after + (np.square(here) + np.square(there)).sum(-1)
        if after.min() < best:
            other, theirs, ours = np.unravel_index(after.argmin(), after.shape)
            best, found = after.min(), ((row, ours), (others[other], theirs))
    if found is None:
        return None
    swapped, (one, two) = members.copy(), found
    swapped[one], swapped[two] = members[two], members[one]
    return swapped


def part_widths(batch: Batch, shape: Shape) -> Int[np.ndarray, "N X"]:
    """Columns that each row of an aligned batch uses of the prompt, and of each text behind it."""
    return np.stack([batch.valid[:, start:end].sum(1) for start, end in _texts(shape)], 1)


def widest_rows(widths: Int[np.ndarray, "N X"], members: Int[np.ndarray, "R G"]) -> Int[np.ndarray, " X"]:
    """The columns of each part that the widest row of a packed batch needs."""
    return widths[members].sum(1).max(0)


def packed_shapes(shape: Shape, examples: int, needed: Int[np.ndarray, " X"], *, multiple_of: int = 1) -> list[Shape]:
    """The shapes that batches are packed into, the narrowest first. The last one holds any batch.

    Args:
      shape: of the batches before they are packed.
      examples: ``G``.
      needed: columns of prompt and texts that some batches needed. The first shape has a few more, so that others,
        which differ a little, seldom need the second.
      multiple_of: the columns of the prompt and of each text are rounded up to a multiple of this.
    """
    widest = examples * np.asarray([shape.prompt, *shape.texts])
    spared = -(-needed * (SPARE + 1) // SPARE)
    usual = np.minimum(-(-spared // multiple_of) * multiple_of, widest)
    shapes = []
    for prompt, *texts in np.unique(np.stack([usual, widest]), axis=0).tolist():
        # Labels of the first example stand before unscored text of the second.
        scored = tuple(text if own else 0 for text, own in zip(texts, shape.scored, strict=True))
        shapes.append(dataclasses.replace(shape, prompt=prompt, texts=tuple(texts), scored=scored, examples=examples))
    return shapes


def fits(widths: Int[np.ndarray, "N X"], members: Int[np.ndarray, "R G"], shape: Shape) -> bool:
    """Whether a packed shape holds these rows."""
    return bool((widest_rows(widths, members) <= [shape.prompt, *shape.texts]).all())


def pack(
    batch: Batch, shape: Shape, members: Int[np.ndarray, "R G"], packed: Shape, *, pad_id: int, feeds_back: bool
) -> Batch:
    """A batch whose rows hold several examples of an aligned one.

    Args:
      batch: the aligned batch.
      shape: its shape.
      members: which of its rows share a row; some of the rows of `share_rows`, or all.
      packed: the shape of the new rows.
      pad_id: token id of columns that are not valid.
      feeds_back: see `Shape.schedule`.

    Raises:
      CoconutError: a row does not fit the shape.
    """
    if not fits(part_widths(batch, shape), members, packed):
        raise CoconutError(f"a row of {members.shape[1]} examples does not fit {packed}")
    examples, size = members.shape[1], (len(members), packed.columns)
    # Where the columns of each new row come from, and where those of each example went.
    sources = np.full(size, NONE)
    owners = np.zeros(size, np.int32)
    placed = np.full(batch.tokens.shape, NONE)
    blocks = list(zip(shape.starts[1], packed.starts[1], shape.thoughts, strict=True))
    texts = list(zip(_texts(shape), _texts(packed), strict=True))
    for row, own in enumerate(members):
        ends = [start for _, (start, _) in texts]
        for number, example in enumerate(own):
            valid = batch.valid[example]
            moves = []
            for index, ((start, end), _) in enumerate(texts):
                columns = start + np.flatnonzero(valid[start:end])
                moves.append((columns, ends[index] + np.arange(len(columns))))
                ends[index] += len(columns)
            for start, new_start, count in blocks:
                thoughts = np.flatnonzero(valid[start : start + count])
                moves.append((start + thoughts, new_start + examples * thoughts + number))
            for old, new in moves:
                sources[row, new], owners[row, new], placed[example, old] = old, number, new
    there, example = sources >= 0, members[np.arange(size[0])[:, None], owners]

    def moved(values: np.ndarray, otherwise: int | bool) -> np.ndarray:
        return np.where(there, values[example, sources], otherwise).astype(values.dtype)

    before = batch.before_answer
    before = np.where(before >= 0, placed[np.arange(len(before)), before], NONE).astype(np.int32)
    return Batch(
        schedule=packed.schedule(feeds_back=feeds_back),
        tokens=moved(batch.tokens, pad_id),
        positions=moved(batch.positions, 0),
        valid=there,
        labels=moved(batch.labels, IGNORED_LABEL),
        pieces=moved(batch.pieces, NONE),
        answers=moved(batch.answers, False),
        before_answer=before[members],
        examples=batch.examples[members],
        members=owners,
    )


def _texts(shape: Shape) -> Sequence[tuple[int, int]]:
    """First column of the prompt and of each text, and the column behind it."""
    starts = [0, *shape.starts[0]]
    return [(start, start + width) for start, width in zip(starts, (shape.prompt, *shape.texts), strict=True)]
