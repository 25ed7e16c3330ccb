"""Methods by name; a new one is a file beside these and a line here."""

import difflib

from coconut.methods.coconut import COCONUT, COCONUT_WITHOUT_CURRICULUM
from coconut.methods.interleaved import INTERLEAVED
from coconut.methods.language import COCONUT_WITHOUT_THOUGHT, COT, MARKED_COT, NO_COT
from coconut.methods.method import Method
from coconut.methods.pause import PAUSE, PAUSE_AS_THOUGHT
from coconut.types import CoconutError

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        COCONUT,
        COT,
        NO_COT,
        PAUSE,
        COCONUT_WITHOUT_CURRICULUM,
        COCONUT_WITHOUT_THOUGHT,
        PAUSE_AS_THOUGHT,
        MARKED_COT,
        INTERLEAVED,
    )
}


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
      CoconutError: there is none; the message names the nearest.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 1, 0.0)[0]
        raise CoconutError(f"unknown method {name!r}; did you mean {near!r}? Known: {', '.join(METHODS)}")
    return METHODS[name]
