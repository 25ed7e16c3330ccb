"""The line format of the implicit chain-of-thought files (Deng et al. 2024, arXiv 2405.14838).

One question a line, ``question||reasoning #### answer``: arithmetic and multiplication alike.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable

from coconut.errors import CoconutError
from coconut.tasks.fields import show_value
from coconut.tasks.records import BadRecords, filled_lines, read_each, read_text
from coconut.types import Example


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """The parts of one line, without the blanks around them.

    Attributes:
      question: what stands before ``||``; not blank.
      reasoning: what stands between ``||`` and ``####``; may be empty.
      answer: what stands behind ``####``; not blank.
      where: file, record (counted from 0) and line (from 1), for error messages.
    """

    question: str
    reasoning: str
    answer: str
    where: str


def read_lines(
    path: str | os.PathLike[str], read: Callable[[Line], Example], bad: BadRecords | None = None
) -> list[Example]:
    """Reads every line of a file, or none, and makes an example of each; blank lines are skipped.

    ``bad`` says how many malformed lines may be left out, and keeps the list of them.

    Raises:
      CoconutError: naming the file, record, line and the part that is missing or blank. A file without a question is
        an error, too.
    """
    lines = filled_lines(path, read_text(path))
    examples = read_each(lines, lambda item: read(_read_line(item[2], item[0])), bad)
    if not examples:
        raise CoconutError(f"{path}: holds no records")
    return examples


def _read_line(line: str, where: str) -> Line:
    for mark in ("||", "####"):
        if line.count(mark) != 1:
            raise CoconutError(f"{where}: expected one {mark!r}, got {line.count(mark)} in {show_value(line)}")
    question, _, rest = line.partition("||")
    reasoning, mark, answer = rest.partition("####")
    if not mark:
        raise CoconutError(f"{where}: '####' stands before '||' in {show_value(line)}")
    for name, part in (("question", question), ("answer", answer)):
        if not part.strip():
            raise CoconutError(f"{where}: the {name} is blank in {show_value(line)}")
    return Line(question=question.strip(), reasoning=reasoning.strip(), answer=answer.strip(), where=where)


def write_line(question: str, steps: Iterable[str], answer: str) -> str:
    """The line that `read_lines` reads back, without its end."""
    return f"{question}||{' '.join([*steps, '####', answer])}"
