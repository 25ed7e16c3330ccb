"""Modules of a user's own, which register a task, a method or a feedback when they are imported.

A run remembers which modules it was made with. Nothing is imported because a workdir says so: whoever opens a run that
needs a module names it again.
"""

import importlib
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

from coconut.errors import CoconutError

_IMPORTED: list[str] = []


def import_extensions(names: Iterable[str]) -> None:
    """Imports modules by name, from the working directory or from wherever Python finds them.

    Raises:
      CoconutError: one cannot be imported; the message ends with the last lines of its own traceback.
    """
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    for name in names:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # a script that ends itself is no module to import
            if isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]:
                raise CoconutError(
                    f"--import {name}: there is no module of this name in {here} or on the path"
                ) from error
            raise CoconutError(f"--import {name}: {_shortened(error)}") from error
        if name not in _IMPORTED:
            _IMPORTED.append(name)


def imported_extensions() -> tuple[str, ...]:
    """The names that `import_extensions` was given so far."""
    return tuple(_IMPORTED)


def require_extensions(names: Iterable[str], where: str) -> None:
    """Checks that modules were imported.

    Raises:
      CoconutError: one was not; the message names it.
    """
    for name in names:
        if name not in _IMPORTED:
            raise CoconutError(f"{where}: this run was made with a module of your own; name it again: --import {name}")


def _shortened(error: BaseException) -> str:
    """The frames of the module itself, without those of Python's importing."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename][1:]
    return "".join(["\n", *traceback.format_list(own[-3:]), *traceback.format_exception_only(error)]).rstrip()
