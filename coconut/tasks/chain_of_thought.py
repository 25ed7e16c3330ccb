"""A chain of thought in one text, cut into steps.

GSM8K-Aug and its siblings write ``{"question", "cot", "answer"}``. Their ``cot`` is equations, such as
``<<48/2=24>> <<48+24=72>>``, each of which is a step; or sentences (GSM8K-Aug-NL). Sentences are cut where CODI cuts
them, at a full stop with a blank behind it (so behind ``Mr.``, too), and at the ends of lines.
"""

import re
from typing import Any

from coconut.errors import CoconutError
from coconut.tasks.fields import require_texts, show_value

EQUATION = re.compile(r"<<([^<>]*=[^<>]*)>>")
_SENTENCE_END = re.compile(r"(?<=\.) +|\s*\n\s*")


def steps_of(cot: Any, where: str) -> tuple[str, ...]:
    """The steps of a ``cot``: one text, or a list that has a step in each text.

    Raises:
      CoconutError: it is neither, or an equation in it is malformed.
    """
    if isinstance(cot, str):
        if _is_equations(cot):
            return equations(cot, where)
        return tuple([part.strip() for part in _SENTENCE_END.split(cot) if part.strip()])
    if not isinstance(cot, list):
        raise CoconutError(f"{where}: field 'cot' must be a text or a list of texts, got {show_value(cot)}")
    require_texts(cot, "cot", where)
    steps = [" ".join(equations(step, where)) if _is_equations(step) else step.strip() for step in cot]
    return tuple([step for step in steps if step])


def _is_equations(text: str) -> bool:
    """Whether a text is equations alone, well or ill written."""
    rest = EQUATION.sub("", text)
    return text.lstrip().startswith("<<") and ("<<" in rest or ">>" in rest or not re.search(r"\w", rest))


def equations(text: str, where: str) -> tuple[str, ...]:
    """The equations ``<<48/2=24>>`` of a text in their order, without blanks in them; what stands around is left out.

    Raises:
      CoconutError: a mark ``<<`` or ``>>`` belongs to no equation.
    """
    rest = EQUATION.sub("", text)
    for mark in ("<<", ">>"):
        if (at := rest.find(mark)) >= 0:
            raise CoconutError(f"{where}: a step must be such as '<<48/2=24>>', got {show_value(rest[at:])}")
    return tuple(["".join(step.split()) for step in (f"<<{inner}>>" for inner in EQUATION.findall(text))])
