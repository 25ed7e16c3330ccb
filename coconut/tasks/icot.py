"""The line format of the implicit chain-of-thought files (Deng et al. 2024, arXiv 2405.14838).

One question a line, ``question||reasoning #### answer``: arithmetic and multiplication alike.
"""

import dataclasses
import os
from collections.abc import Iterable

from coconut.errors import CoconutError
from coconut.tasks.records import read_text, show_value


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


def read_lines(path: str | os.PathLike[str]) -> list[Line]:
    """Reads every line of a file, or none; blank lines are skipped.

    Raises:
      CoconutError: naming the file, record, line and the part that is missing or blank. A file without a question is
        an error, too.
    """
    # Not `splitlines`, which also splits at characters a question may hold.
    filled = [(number, line) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    if not filled:
        raise CoconutError(f"{path}: holds no records")
    return [_read_line(line, f"{path}: record {index} (line {number})") for index, (number, line) in enumerate(filled)]


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
