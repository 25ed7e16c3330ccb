"""Answers in free text: a number, yes or no, the letter of a choice.

An answer is looked for behind the last mark, ``###``, ``answer is`` or ``answer:``, and is the first that stands there;
in a text without a mark it is the last. What is found is brought into one form, in which answers are compared: numbers
by their value (6.0 is 6), ``True`` as ``yes``. A text in which nothing is found is an answer of its own, and a wrong
one.
"""

import decimal
import re

_MARK = re.compile(r"#{3,}|answer is:?|answer:", re.IGNORECASE)
# A minus behind a word or a bracket subtracts.
_NUMBER = re.compile(r"(?:(?<![\w)\]])-)?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", re.ASCII)
_YES_OR_NO = re.compile(r"\b(?:yes|no|true|false)\b", re.IGNORECASE)
# Not up to J: "I" is a word.
_LETTER = re.compile(r"(?<![\w'])[A-H](?![\w'])")
_WORDS = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_MOST_DIGITS = 40
"""Of a number that is written out; longer ones stay as they were written."""


def find_number(text: str) -> str:
    """The answer of a text that answers by a number, without commas."""
    return _find(_NUMBER, text.replace(",", ""))


def find_yes_or_no(text: str) -> str:
    """The answer of a text that answers by yes or no, or by true or false."""
    return _find(_YES_OR_NO, text)


def find_letter(text: str) -> str:
    """The answer of a text that answers by the capital letter of a choice, from A to H, perhaps in brackets."""
    return _find(_LETTER, text)


def normalize_number(answer: str) -> str:
    """A number as its shortest decimal, ``1,200.50`` as ``1200.5``; another text without commas and outer blanks."""
    answer = answer.replace(",", "").strip()
    if not _NUMBER.fullmatch(answer):
        return answer
    try:
        value = decimal.Decimal(answer)
    except ArithmeticError:  # An exponent that no number has.
        return answer
    if not value:
        return "0"
    if abs(value.adjusted()) > _MOST_DIGITS or len(answer) > _MOST_DIGITS:
        return answer
    written = format(value, "f")
    return written.rstrip("0").rstrip(".") if "." in written else written


def normalize_yes_or_no(answer: str) -> str:
    """``yes`` or ``no``; another text in small letters."""
    answer = answer.strip().lower()
    return _WORDS.get(answer, answer)


def _find(pattern: re.Pattern[str], text: str) -> str:
    marks = list(_MARK.finditer(text))
    part = text[marks[-1].end() :] if marks else text
    found = pattern.findall(part)
    if not found:
        return part.strip()
    return found[0 if marks else -1]
