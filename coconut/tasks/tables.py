"""Tables of questions: Parquet and Arrow files, told by their content, and data sets of the Hugging Face hub.

Needs ``pyarrow`` (the extra ``parquet``); a data set needs the extra ``datasets``, which brings it.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coconut import interruption
from coconut.errors import CoconutError
from coconut.tasks.hub_datasets import hub_tables, is_hub_source

_PARQUET, _ARROW_FILE = b"PAR1", b"ARROW1"
_ARROW_STREAM = b"\xff\xff\xff\xff"  # No text begins so. It is what `datasets` itself stores.
_SUFFIXES = (".parquet", ".arrow", ".feather")


def is_table(path: str | os.PathLike[str]) -> bool:
    """Whether a source is a data set, or a Parquet or Arrow file, by its first bytes or by its name."""
    if is_hub_source(path):
        return True
    try:
        with open(path, "rb") as file:
            start = file.read(len(_ARROW_FILE))
    except OSError:
        return False  # Whoever reads it says why it cannot be.
    return start.startswith((_PARQUET, _ARROW_FILE, _ARROW_STREAM)) or Path(path).suffix in _SUFFIXES


def rows_of(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row: where it stands, for messages, and its values by column. A null is a value that is not there.

    Raises:
      CoconutError: naming the source: it is damaged, or a package is missing that reads it.
    """
    name, index = os.fspath(path), 0
    for rows in _pages(name):
        for row in rows:
            yield f"{name}: row {index}", {column: value for column, value in row.items() if value is not None}
            index += 1


def _pages(name: str) -> Iterator[list[dict[str, Any]]]:
    tables = hub_tables(name) if is_hub_source(name) else _file_tables(name)
    while True:
        try:
            table = next(tables, None)
            if table is None:
                return
            columns = table.schema.names
            if repeated := {column for column in columns if columns.count(column) > 1}:
                raise CoconutError(f"{name}: several columns are named {min(repeated)!r}")
            # Offsets of a damaged file may point anywhere.
            table.validate(full=True)
            kinds = {field.name: field.type for field in table.schema}
            rows = [{name: _as_written(row[name], kinds[name]) for name in row} for row in table.to_pylist()]
        except CoconutError:
            raise
        except Exception as error:
            # Nothing but the libraries' own work stands here, and their errors have no common kind.
            interruption.check(error)
            raise CoconutError(f"{name}: cannot be read: {_reason(error)}") from error
        yield rows


def _file_tables(name: str) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CoconutError(f"{name}: reading Parquet and Arrow needs `pip install 'coconut-jax[parquet]'`") from error
    with pyarrow.OSFile(name) as file:
        start = file.read(len(_ARROW_FILE))
        file.seek(0)
        if start == _ARROW_FILE:
            reader = pyarrow.ipc.open_file(file)
            yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
        elif start.startswith(_ARROW_STREAM):
            yield from pyarrow.ipc.open_stream(file)
        else:
            yield from pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1000)


def _as_written(value: Any, kind: Any) -> Any:
    """A value of a type of Arrow, numbers of 32 bits as they are written: 0.1, where Python has 0.10000000149011612."""
    import pyarrow

    if value is None:
        return None
    if pyarrow.types.is_float16(kind) or pyarrow.types.is_float32(kind):
        return float(str(kind.to_pandas_dtype()(value)))
    if pyarrow.types.is_struct(kind):
        return {field.name: _as_written(value[field.name], field.type) for field in kind}
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind):
        return [_as_written(inner, kind.value_type) for inner in value]
    return value


def _reason(error: BaseException) -> str:
    """What an error says, and what it was raised from."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if error.__cause__ is None else f"{text}; {_reason(error.__cause__)}"
