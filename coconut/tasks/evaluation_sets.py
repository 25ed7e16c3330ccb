"""Published test sets: questions and answers without steps, on which a model that has learnt another task is measured.

========================  ===========================================================================================
``svamp``                 ``Body`` and ``Question`` (or ``question_concat``), ``Answer`` (Patel et al. 2021,
                          arXiv 2103.07191)
``multiarith``            ``sQuestion``, ``lSolutions``; or ``question``, ``final_ans`` (Roy and Roth 2015,
                          arXiv 1608.01413)
``gsm_hard``              ``input``, ``target``; or ``instruction``, ``response`` (Gao et al. 2022, arXiv 2211.10435)
``strategyqa``            ``question``, ``answer``: true or false (Geva et al. 2021, arXiv 2101.02235)
``commonsenseqa``         ``question`` with ``stem`` and ``choices``, or ``question`` and ``choices``; ``answerKey``
                          (Talmor et al. 2019, arXiv 1811.00937)
========================  ===========================================================================================

Each may also be ``question`` and ``answer``, with or without ``steps`` or ``cot``. All of them stand in JSON, JSONL,
Parquet, Arrow or a data set of the hub. What counts as right says `coconut.tasks.answer_rules`. Numbers are compared
by their value and exactly, as CODI (arXiv 2502.21074) compares them; the authors of GSM-Hard allow 0.001.
"""

import math
import os
from typing import Any

from coconut.errors import CoconutError
from coconut.tasks.answer_rules import normalize_number, normalize_yes_or_no
from coconut.tasks.fields import read_field, require_object, require_text, require_texts, show_value
from coconut.tasks.gsm8k import is_number
from coconut.tasks.records import BadRecords, read_example, read_records
from coconut.types import Example

_SVAMP = ((("Body", "Question"), "Answer"), (("question_concat",), "Answer"))
_MULTIARITH = ((("sQuestion",), "lSolutions"), (("question",), "final_ans"))
_GSM_HARD = ((("input",), "target"), (("instruction",), "response"))
_OWN = (("question",), "answer")
_LETTERS = "ABCDEFGH"

Form = tuple[tuple[str, ...], str]
"""The fields that make a question, and that of the answer."""


def load_svamp(path: str | os.PathLike[str], *, bad: BadRecords | None = None) -> list[Example]:
    """Reads SVAMP.

    Raises:
      CoconutError: naming file, record, field and value of what is malformed.
    """
    return read_records(path, lambda record, where: _read_numeric(record, where, _SVAMP), bad)


def load_multiarith(path: str | os.PathLike[str], *, bad: BadRecords | None = None) -> list[Example]:
    """Reads MultiArith.

    Raises:
      CoconutError: naming file, record, field and value of what is malformed.
    """
    return read_records(path, lambda record, where: _read_numeric(record, where, _MULTIARITH), bad)


def load_gsm_hard(path: str | os.PathLike[str], *, bad: BadRecords | None = None) -> list[Example]:
    """Reads GSM-Hard; its programs are left out, and never run.

    Raises:
      CoconutError: naming file, record, field and value of what is malformed.
    """
    return read_records(path, lambda record, where: _read_numeric(record, where, _GSM_HARD), bad)


def load_strategyqa(path: str | os.PathLike[str], *, bad: BadRecords | None = None) -> list[Example]:
    """Reads StrategyQA; answers are ``yes`` and ``no``, and facts and decompositions are left out.

    Raises:
      CoconutError: naming file, record, field and value of what is malformed.
    """
    return read_records(path, _read_yes_or_no, bad)


def load_commonsenseqa(path: str | os.PathLike[str], *, bad: BadRecords | None = None) -> list[Example]:
    """Reads CommonsenseQA. A question is its stem and a line ``A: ...`` for each choice, and an answer a letter.

    Raises:
      CoconutError: naming file, record, field and value of what is malformed. The published test split has no answers.
    """
    return read_records(path, _read_choice, bad)


def _read_numeric(record: Any, where: str, forms: tuple[Form, ...]) -> Example:
    require_object(record, where)
    for names, answer in forms:
        if {*names, answer} <= record.keys():
            for name in names:
                require_text(record[name], name, where)
            # The published questions have blanks at their ends, and two in a row.
            question = " ".join(word for name in names for word in record[name].split())
            return Example(question=question, steps=(), answer=_number(record[answer], answer, where))
    names, answer = _OWN
    if not {*names, answer} <= record.keys():
        known = "; or ".join(", ".join(map(repr, (*names, answer))) for names, answer in (*forms, _OWN))
        raise CoconutError(f"{where}: expected the fields {known}; there are {', '.join(map(repr, record)) or 'none'}")
    return _read_own(record, _number(record[answer], answer, where), where)


def _number(value: Any, name: str, where: str) -> str:
    inner = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(inner, str):
        inner = inner.rpartition("####")[2].strip()
        if is_number(inner):
            return normalize_number(inner)
    # An integer may have more digits than any float.
    is_finite = isinstance(inner, int) or (isinstance(inner, float) and math.isfinite(inner))
    if is_finite and not isinstance(inner, bool):
        return normalize_number(repr(inner))
    raise CoconutError(f"{where}: field {name!r} must be a number, got {show_value(value)}")


def _read_yes_or_no(record: Any, where: str) -> Example:
    value = read_field(require_object(record, where), "answer", where)
    answer = normalize_yes_or_no(str(value)) if isinstance(value, bool | str) else ""
    if answer not in ("yes", "no"):
        raise CoconutError(f"{where}: field 'answer' must be true, false, 'yes' or 'no', got {show_value(value)}")
    return _read_own(record, answer, where)


def _read_choice(record: Any, where: str) -> Example:
    require_object(record, where)
    asked = record.get("question")
    if "choices" not in (asked if isinstance(asked, dict) else record):
        answer = read_field(record, "answer", where)
        return _read_own(record, _letter(answer, "answer", _LETTERS, where), where)
    stem = read_field(asked, "stem", where) if isinstance(asked, dict) else asked
    require_text(stem, "stem" if isinstance(asked, dict) else "question", where)
    choices = _choices((asked if isinstance(asked, dict) else record)["choices"], where)
    letter = _letter(read_field(record, "answerKey", where), "answerKey", [label for label, _ in choices], where)
    lines = (f"{label}: {text.strip()}" for label, text in choices)
    return Example(question="\n".join([stem.strip(), *lines]), steps=(), answer=letter)


def _choices(value: Any, where: str) -> list[tuple[str, str]]:
    """The label and the text of each choice: of a list of both, or of a list for each (as the hub stores it)."""
    if isinstance(value, list):
        parts = [require_object(choice, f"{where}: field 'choices'[{index}]") for index, choice in enumerate(value)]
        value = {name: [read_field(part, name, where) for part in parts] for name in ("label", "text")}
    labels, texts = (read_field(require_object(value, where), name, where) for name in ("label", "text"))
    require_texts(labels, "label", where)
    require_texts(texts, "text", where)
    if not labels or len(labels) != len(texts) or sorted(set(labels)) != sorted(labels) or not {*labels} <= {*_LETTERS}:
        raise CoconutError(
            f"{where}: field 'choices' must have a text and a letter of its own, from {_LETTERS[0]} to "
            f"{_LETTERS[-1]}, for each choice, got {show_value(value)}"
        )
    return list(zip(labels, texts, strict=True))


def _letter(value: Any, name: str, known: Any, where: str) -> str:
    if isinstance(value, str) and value.strip() and value.strip() in list(known):
        return value.strip()
    raise CoconutError(f"{where}: field {name!r} must be one of {', '.join(known)}, got {show_value(value)}")


def _read_own(record: dict[str, Any], answer: str, where: str) -> Example:
    steps = {} if {"steps", "cot"} & record.keys() else {"steps": []}
    return read_example({**record, **steps, "answer": answer}, where)
