"""What was meant by a flag that nobody knows. Nothing heavy is imported, so that it is answered at once."""

import difflib
from collections.abc import Iterable

from coconut.commands.shipped import bound_fields


def hint(word: str, known: Iterable[str]) -> str:
    """What to write instead of an unknown flag, as the end of a message; empty where nothing is like it.

    Args:
      word: the flag, with its value where ``=`` stands between them: ``--seed``, ``--RunConfig.seed=3``.
      known: names of the command's flags, ``gin_binding`` among them where it takes ``--gin.NAME=VALUE``.
    """
    known = list(known)
    name = word.partition("=")[0].lstrip("-")
    meant = []
    if "gin_binding" in known:
        field = name.removeprefix("gin.")
        meant = [field] if "." in field else bound_fields(field)
    meant = [f"--gin.{field}=VALUE" for field in meant]
    meant += [f"--{flag}" for flag in difflib.get_close_matches(name, known, 1, 0.8)]
    return f"; did you mean {' or '.join(meant)}?" if meant else ""
