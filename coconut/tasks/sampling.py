"""Records drawn one by one, each from a stream of its own, without repeats."""

import random
from collections.abc import Callable
from collections.abc import Set as AbstractSet

from coconut.errors import CoconutError
from coconut.tasks.hashing import content_hash
from coconut.types import Example

MAX_REPEATS = 1000
"""Draws in a row that may repeat known questions before we say that there are no new ones."""


def draw_unique(
    draw: Callable[[random.Random], Example],
    count: int,
    *,
    stream: str,
    seed: int,
    start: int,
    exclude: AbstractSet[str],
) -> list[Example]:
    """Draws the records ``start .. start + count - 1`` of a seed's endless sequence.

    Record ``i`` comes from a generator seeded by ``(stream, seed, i)`` alone, so a longer run starts with the shorter
    one and any slice can be drawn by itself. Only where a draw repeats a question of ``exclude``, or an earlier one of
    the same call, is the next draw of that record's own generator taken.

    A `random.Random` for each record rather than a `numpy.random.Generator`: these recipes draw scalars, which the
    former does about ten times faster.

    Args:
      draw: makes one example from a generator.
      count: how many examples.
      stream: names the task, so that no two tasks share random numbers.
      seed: any integer.
      start: index of the first record.
      exclude: `content_hash` of questions that must not be emitted, such as another split's.

    Raises:
      CoconutError: if ``count`` or ``start`` is negative, or new questions run out.
    """
    if count < 0 or start < 0:
        raise CoconutError(f"count and start must not be negative, got count={count} and start={start}")
    seen: set[str] = set()
    examples = []
    for index in range(start, start + count):
        rng = random.Random(f"{stream}/{seed}/{index}")
        for _ in range(MAX_REPEATS):
            example = draw(rng)
            digest = content_hash(example)
            if digest not in seen and digest not in exclude:
                break
        else:
            raise CoconutError(
                f"no new question for record {index} in {MAX_REPEATS} draws (count={count}, {len(exclude)} excluded): "
                "the configuration has too few distinct questions"
            )
        seen.add(digest)
        examples.append(example)
    return examples
