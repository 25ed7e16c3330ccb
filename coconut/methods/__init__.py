"""Methods by name. A new one is a file beside these and a line here; one of your own calls `register_method`."""

import difflib

from coconut.errors import CoconutError
from coconut.methods.coconut import COCONUT, COCONUT_WITHOUT_CURRICULUM
from coconut.methods.codi import CODI
from coconut.methods.colar import COLAR
from coconut.methods.frontier import COCONUT_FRONTIER
from coconut.methods.icot import ICOT
from coconut.methods.interleaved import INTERLEAVED
from coconut.methods.kava import KAVA
from coconut.methods.language import COCONUT_WITHOUT_THOUGHT, COT, MARKED_COT, NO_COT
from coconut.methods.method import Method
from coconut.methods.pause import PAUSE, PAUSE_AS_THOUGHT
from coconut.methods.pccot import PCCOT
from coconut.methods.ponder import PONDER, PONDER_CODI
from coconut.methods.random_thoughts import RANDOM_THOUGHTS
from coconut.methods.simcot import SIMCOT, SIMCOT_CODI

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
        CODI,
        PCCOT,
        KAVA,
        COLAR,
        PONDER,
        PONDER_CODI,
        SIMCOT,
        SIMCOT_CODI,
        RANDOM_THOUGHTS,
        ICOT,
        COCONUT_FRONTIER,
    )
}


def register_method(method: Method) -> None:
    """Adds a method: ``RunConfig.method = name`` chooses it.

    Raises:
      CoconutError: there is another one of that name.
    """
    if METHODS.get(method.name, method) is not method:
        raise CoconutError(f"a method named {method.name!r} is registered already")
    METHODS[method.name] = method


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
      CoconutError: there is none; the message names the nearest.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 1, 0.0)[0]
        raise CoconutError(f"unknown method {name!r}; did you mean {near!r}? Known: {', '.join(METHODS)}")
    return METHODS[name]
