"""Fields of a record: what they must be, and the message of one that is not."""

from typing import Any

from coconut.errors import CoconutError


def require_object(value: Any, where: str) -> dict[str, Any]:
    """The value, if it is a JSON object; else a `CoconutError`."""
    if not isinstance(value, dict):
        raise CoconutError(f"{where}: expected an object, got {show_value(value)}")
    return value


def read_field(record: dict[str, Any], name: str, where: str) -> Any:
    """The value of a field; a `CoconutError` where it is missing."""
    if name not in record:
        raise CoconutError(f"{where}: field {name!r} is missing; there are {', '.join(map(repr, record)) or 'none'}")
    return record[name]


def require_text(value: Any, name: str, where: str) -> None:
    """Raises a `CoconutError` unless a field's value is a text that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise CoconutError(f"{where}: field {name!r} must be a text that is not blank, got {show_value(value)}")


def require_texts(value: Any, name: str, where: str) -> None:
    """Raises a `CoconutError` unless a field's value is a list of texts."""
    if not isinstance(value, list):
        raise CoconutError(f"{where}: field {name!r} must be a list of texts, got {show_value(value)}")
    for index, item in enumerate(value):
        if not isinstance(item, str):
            raise CoconutError(f"{where}: field {name!r}[{index}] must be a text, got {show_value(item)}")


def show_value(value: Any) -> str:
    """A value for an error message, cut where it is long."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
