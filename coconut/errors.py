"""Errors that a user can cause. Nothing heavy is imported here: the command line answers bad flags by them at once."""

import dataclasses
import types
import typing
from typing import Any, Literal


class CoconutError(ValueError):
    """Bad input, described so that the reader knows what to change.

    Every error a user can cause by a file, a config or a flag is one of these; the command line prints its
    message alone and exits with code 2.
    """


class NotFiniteError(CoconutError):
    """A model gives infinities or NaN where answers or losses are made of its numbers."""


class DivergedError(CoconutError):
    """Training made no finite gradient for too many steps in a row, or a model that gives nothing finite.

    The command line exits with code 3. Started again the run would come to the same point: another config is needed.
    """


def check_fields(config: Any) -> None:
    """Checks the types of all fields of a config dataclass; gin and JSON do not.

    Raises:
      CoconutError: naming the class, the field, the value and the type.
    """
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), field.type
        if not _fits(value, hint):
            kind = hint.__name__ if isinstance(hint, type) else str(hint)
            if isinstance(value, int) and not _has_64_bits(value):
                kind = f"{kind}, and a number of at most 64 bits"
            raise CoconutError(f"{type(config).__name__}.{field.name} = {value!r}: must be {kind}")


def _has_64_bits(value: int) -> bool:
    return -(2**63) <= value < 2**63


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in parts
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple and parts[1:] == (...,):
        return isinstance(value, tuple) and all(_fits(item, parts[0]) for item in value)
    if isinstance(value, bool):
        return hint is bool
    if isinstance(value, int) and not _has_64_bits(value):
        return False  # JSON has integers of any length, which are no float and no array's size.
    return isinstance(value, (int, float) if hint is float else origin or hint)
