"""Multiplication of an n-digit by an m-digit number, with partial products as steps.

The form is that of the implicit chain-of-thought files (Deng et al. 2024, arXiv 2405.14838, section 3): digits are
separated by blanks and stand in reverse order, the least significant first, as they are computed. 12 x 34 reads::

    2 1 * 4 3||8 4 0 + 0 6 3 0 #### 8 0 4 0

The partial product of digit i of the second number is written with n + 1 + i digits, its i trailing zeros first, and
the product with n + m. One step is one partial product; all but the first and the last are followed by the running sum,
in brackets. ``question||steps #### answer`` is exactly a line of those files.

Every digit is a token of its own under a word-level tokenizer.
"""

import functools
import os
import random
import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from coconut.errors import CoconutError
from coconut.tasks.fields import show_value
from coconut.tasks.hashing import content_hash
from coconut.tasks.icot import Line, read_lines
from coconut.tasks.records import BadRecords, holds_records, load_examples
from coconut.tasks.sampling import draw_unique
from coconut.types import Example

MAX_DIGITS = 100
"""Digits of a number: as many as any model will be asked to multiply, and a bound on what a typing error costs."""

MAX_ENUMERATED = 1_000_000
"""Up to so many distinct questions are shuffled and dealt; of more, questions are drawn."""

_NUMBER = rf"(\d(?: \d){{0,{MAX_DIGITS - 1}}})"
_QUESTION = re.compile(rf"{_NUMBER} \* {_NUMBER}", re.ASCII)


def generate(
    count: int,
    *,
    seed: int,
    digits: Sequence[int] = (4, 4),
    start: int = 0,
    exclude: AbstractSet[str] = frozenset(),
) -> list[Example]:
    """Draws distinct questions, uniformly among the pairs of numbers that have exactly so many digits.

    Args:
      count: how many.
      seed: any integer; record ``i`` depends on the seed, the digits, ``i`` and ``exclude`` only.
      digits: how many digits the first and the second number have.
      start: index of the first record.
      exclude: `content_hash` of questions not to emit.

    Raises:
      CoconutError: for digits that are no two counts in 1..`MAX_DIGITS`, a negative count, or more questions than
        there are.
    """
    first, second = _checked(digits)
    if count < 0 or start < 0:
        raise CoconutError(f"count and start must not be negative, got count={count} and start={start}")
    existing = _numbers(first) * _numbers(second)
    if start + count > existing:
        from_start = f" from record {start} on" if start else ""
        raise CoconutError(
            f"there are {existing:,} distinct questions with digits={(first, second)}, fewer than the {count:,} asked "
            f"for{from_start}"
        )
    if existing > MAX_ENUMERATED:
        draw = functools.partial(_draw, digits=(first, second))
        return draw_unique(
            draw, count, stream=f"multiplication/{first}/{second}", seed=seed, start=start, exclude=exclude
        )
    # Drawing the last of few questions would take long; a shuffled list has them all.
    order = list(range(existing))
    random.Random(f"multiplication/{first}/{second}/{seed}").shuffle(order)
    examples: list[Example] = []
    for index in order[start:]:
        if len(examples) == count:
            break
        example = _pair(index, (first, second))
        if content_hash(example) not in exclude:
            examples.append(example)
    if len(examples) < count:
        raise CoconutError(
            f"of the {existing:,} distinct questions with digits={(first, second)} only {len(examples):,} are left, "
            f"fewer than the {count:,} asked for: the others are in use (another split's) or stand before "
            f"record {start}"
        )
    return examples


def load(path: str | os.PathLike[str], *, bad: BadRecords | None = None) -> list[Example]:
    """Reads lines of the implicit chain-of-thought files, or the field's JSON.

    ``bad`` says how many malformed records may be left out, and keeps the list of them.

    Raises:
      CoconutError: naming file, record and line of what is no multiplication of this form, or is wrong.
    """
    if holds_records(path):
        return load_examples(path, bad=bad)
    return read_lines(path, _read_line, bad)


def _read_line(line: Line) -> Example:
    asked = _QUESTION.fullmatch(line.question)
    if not asked:
        raise CoconutError(
            f"{line.where}: the question must be two numbers, digit by digit, such as '2 1 * 4 3', got "
            f"{show_value(line.question)}"
        )
    example = write_example(*(len(number.split()) for number in asked.groups()), *map(read_digits, asked.groups()))
    # Arithmetic is its own check: a line that differs is no example to learn from.
    for part, found, right in (
        ("steps", line.reasoning, " ".join(example.written_steps)),
        ("answer", line.answer, example.answer),
    ):
        if found != right:
            raise CoconutError(
                f"{line.where}: the {part} of {line.question!r} must be {show_value(right)}, got {show_value(found)}"
            )
    return example


def write_example(first_digits: int, second_digits: int, first: int, second: int) -> Example:
    """One question with its steps and answer.

    Args:
      first_digits: digits to write of the first number.
      second_digits: digits to write of the second number; as many steps.
      first: the first number.
      second: the second number.
    """
    steps, total, place = [], 0, 1
    for index in range(second_digits):
        partial = first * (second // place % 10) * place
        total += partial
        width = first_digits + 1 + index
        step = write_digits(partial, width)
        if index:
            step = f"+ {step}"
            if index < second_digits - 1:
                step += f" ( {write_digits(total, width)} )"
        steps.append(step)
        place *= 10
    return Example(
        question=f"{write_digits(first, first_digits)} * {write_digits(second, second_digits)}",
        steps=tuple(steps),
        answer=write_digits(total, first_digits + second_digits),
    )


def write_digits(number: int, width: int) -> str:
    """A number's digits in reverse order, filled with zeros to a width: ``write_digits(12, 3)`` is ``2 1 0``."""
    return " ".join(reversed(str(number).zfill(width)))


def read_digits(text: str) -> int:
    """The inverse of `write_digits`."""
    return int("".join(reversed(text.split())))


def _numbers(digits: int) -> int:
    """How many numbers have exactly so many digits, a leading zero excluded (and zero, for one digit)."""
    return 9 * 10 ** (digits - 1)


def _pair(index: int, digits: tuple[int, int]) -> Example:
    first, second = divmod(index, _numbers(digits[1]))
    return write_example(*digits, 10 ** (digits[0] - 1) + first, 10 ** (digits[1] - 1) + second)


def _draw(rng: random.Random, digits: tuple[int, int]) -> Example:
    return _pair(rng.randrange(_numbers(digits[0]) * _numbers(digits[1])), digits)


def _checked(digits: Any) -> tuple[int, int]:
    # From a command line or a config anything may come.
    counts = tuple(digits) if isinstance(digits, Sequence) else ()
    if len(counts) != 2 or not all(type(count) is int and 1 <= count <= MAX_DIGITS for count in counts):
        raise CoconutError(f"digits = {digits!r}: must be two counts in 1..{MAX_DIGITS}, such as (4, 4)")
    return counts
