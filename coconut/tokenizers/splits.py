r"""Text cut by one regular expression after the other, each the pieces of the one before it.

Some vocabularies cut so: SmolLM's takes single digits out and then cuts as GPT-2's does, DeepSeek's has three
expressions. No single expression does the same in general: ``\s+(?!\S)`` means the end of a piece, too.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import regex

from coconut.errors import CoconutError

WHOLE = r"[\s\S]+"
"""Matches any piece whole: the pattern of a vocabulary whose text is cut by its splits alone."""
# One that needs longer for one text was made to take for ever.
_SECONDS = 5.0


@functools.cache
def compile_split(pattern: str) -> Any:
    """The expression as the library reads it that wrote it: ``^`` and ``$`` are those of a line.

    Raises:
      CoconutError: it is none.
    """
    try:
        return regex.compile(pattern, regex.VERSION1 | regex.MULTILINE)
    except (regex.error, RecursionError, OverflowError) as error:
        raise CoconutError(f"splits: {pattern!r:.200} is no valid regular expression: {error}") from error


def split_text(text: str, patterns: Sequence[str]) -> list[str]:
    """The pieces of a text: matches, and what lies between them. Nothing of it is lost.

    Raises:
      CoconutError: a pattern is no regular expression, or takes too long.
    """
    pieces = [text]
    for pattern in patterns:
        try:
            pieces = [part for piece in pieces for part in _isolated(compile_split(pattern), piece)]
        except (TimeoutError, MemoryError) as error:
            raise CoconutError(f"splits: {pattern!r:.200} takes too long on {text!r:.80}") from error
    return pieces


def _isolated(pattern: Any, text: str) -> Iterator[str]:
    start = 0
    for match in pattern.finditer(text, timeout=_SECONDS):
        if match.start() > start:
            yield text[start : match.start()]
        if match.end() > match.start():
            yield match.group()
        start = match.end()
    if start < len(text):
        yield text[start:]
