"""GSM8K: grade-school word problems (Cobbe et al. 2021, arXiv 2110.14168), read from files.

Four formats are known, told apart by their content:

- Lines of JSON ``{"question": ..., "answer": ...}``, as released. The steps are the annotations ``<<48/2=24>>`` of the
  written solution in their order, blanks removed; the answer follows ``####``.
- Lines ``question||<<48/2=24>> <<48+24=72>> #### 72`` of the implicit chain-of-thought files (Deng et al. 2024,
  arXiv 2405.14838), from which Coconut (arXiv 2412.06769) learns. The 500 of their validation split are GSM8K training
  questions: `coconut.tasks.hashing.without_overlap` removes them.
- ``{"question": ..., "cot": ..., "answer": ...}`` of GSM8K-Aug and of GSM8K-Aug-NL, its sibling in sentences
  (`coconut.tasks.chain_of_thought`); the answer is ``72`` or ``#### 72``.
- The field's JSON. That of GSM8K-Aug with ``steps`` is of this form.

All but the second stand in JSON, JSONL, Parquet, Arrow or a data set of the hub. Commas are stripped from answers, of
the field's JSON when they are compared: as texts, 5 is not 5.0. Some problems have no annotation, and so no steps (95
of the 7,473 released for training).
"""

import dataclasses
import os
import re
from typing import Any

from coconut.errors import CoconutError
from coconut.tasks.chain_of_thought import EQUATION, equations
from coconut.tasks.fields import read_field, require_object, require_text, show_value
from coconut.tasks.icot import Line, read_lines
from coconut.tasks.records import BadRecords, holds_records, read_example, read_records
from coconut.types import Example

_NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


def load(path: str | os.PathLike[str], *, bad: BadRecords | None = None) -> list[Example]:
    """Reads a file in any of the four formats.

    An answer that is no number is an error in a released file, which has none. Among the lines of the implicit
    chain-of-thought files, and so in GSM8K-Aug, there are some (``2/5``): they are kept, and `is_number` tells
    them. ``bad`` says how many malformed records may be left out, and keeps the list of them.

    Raises:
      CoconutError: naming file, record, line, field and value of what is malformed.
    """
    return read_records(path, _read_record, bad) if holds_records(path) else read_lines(path, _read_line, bad)


def is_number(answer: str) -> bool:
    """Whether an answer is a number in digits (``2.01e-06`` too), commas stripped: no fraction, and without a unit."""
    return bool(_NUMBER.fullmatch(answer.replace(",", "")))


def _read_record(record: Any, where: str) -> Example:
    if "steps" in require_object(record, where):
        return read_example(record, where)
    if "cot" in record:
        example = read_example(record, where)
        answer = example.answer.rpartition("####")[2].strip().replace(",", "")
        require_text(answer, "answer", where)
        return dataclasses.replace(example, answer=answer)
    question, solution = (read_field(record, name, where) for name in ("question", "answer"))
    for name, value in (("question", question), ("answer", solution)):
        require_text(value, name, where)
    written, mark, answer = solution.rpartition("####")
    answer = answer.strip().replace(",", "")
    if not mark or not is_number(answer):
        raise CoconutError(
            f"{where}: field 'answer' must end in '#### ' and a number, got {show_value(solution[-40:])}"
        )
    return Example(question=question.strip(), steps=equations(written, where), answer=answer)


def _read_line(line: Line) -> Example:
    steps = equations(line.reasoning, line.where)
    if rest := EQUATION.sub("", line.reasoning).strip():
        raise CoconutError(f"{line.where}: expected steps such as '<<48/2=24>>' and blanks, got {show_value(rest)}")
    return Example(question=line.question, steps=steps, answer=line.answer.replace(",", ""))
