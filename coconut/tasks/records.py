"""Reading and writing the field's question files.

One record is ``{"question": str, "steps": [str], "answer": str}``; ProsQA adds the graph as ``idx_to_symbol`` (node
names), ``edges`` (pairs of node ids), ``root``, ``target`` and ``neg_target`` (node ids): all five or none. A
blank step is no step. Other fields are ignored. In the place of ``steps`` may stand ``cot``, a list or one text, which
is cut into steps (`coconut.tasks.chain_of_thought`).

A step may also be ``{"think": 2}``: a block of two thoughts at this place, whatever the method.

A source is told by its content, whatever its name: a JSON list of records, JSONL (one record a line), a JSON object of
columns (``{"question": [...], "answer": [...]}``), a Parquet or an Arrow file; or it is a data set of the Hugging Face
hub (`coconut.tasks.hub_datasets`).
"""

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from coconut.errors import CoconutError
from coconut.tasks.chain_of_thought import steps_of
from coconut.tasks.fields import read_field, require_object, require_text, require_texts, show_value
from coconut.tasks.hub_datasets import PREFIX, REPOSITORY
from coconut.tasks.tables import is_table, rows_of
from coconut.types import Example, Graph, Think

T = TypeVar("T")

GRAPH_FIELDS = ("idx_to_symbol", "edges", "root", "target", "neg_target")
GRAPH_MARKS = ("idx_to_symbol", "neg_target")
"""Fields that nothing but a graph has: records of other tasks may have a ``target`` or a ``root`` of their own."""

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True)
class BadRecords:
    """The malformed records of one file that are left out.

    Attributes:
      most: how many may be; one more is an error.
      reasons: for each that was, a message with file, record, line and what is wrong.
    """

    most: int = 0
    reasons: list[str] = dataclasses.field(default_factory=list)


def read_each(records: Iterable[T], read: Callable[[T], Example], bad: BadRecords | None) -> list[Example]:
    """Reads records one by one; leaves as many malformed ones out as may be, and logs each.

    Raises:
      CoconutError: of the first malformed record that may not be left out.
    """
    examples = []
    for record in records:
        try:
            examples.append(read(record))
        except CoconutError as error:
            if bad is None or not bad.most:
                raise
            if len(bad.reasons) >= bad.most:
                raise CoconutError(f"{error} ({bad.most:,} malformed records were left out already)") from error
            bad.reasons.append(str(error))
            LOG.warning("left out: %s", error)
    return examples


def load_examples(path: str | os.PathLike[str], *, bad: BadRecords | None = None) -> list[Example]:
    """Reads every record of a source, or none.

    ``bad`` says how many malformed records may be left out, and keeps the list of them.

    Raises:
      CoconutError: naming the file, and the line and column of a syntax error, or the record (counted from 0), field
        and value that are wrong. A source without records is an error, too.
    """
    return read_records(path, read_example, bad)


def read_records(
    path: str | os.PathLike[str], read: Callable[[Any, str], Example], bad: BadRecords | None = None
) -> list[Example]:
    """The examples of a source of any kind; ``read`` is given a record, and where it stands for messages.

    ``bad`` says how many malformed records may be left out, and keeps the list of them.

    Raises:
      CoconutError: naming the file, and the line and column of a syntax error, or what ``read`` found. A source without
        records is an error, too.
    """
    read_item = lambda item: read(item[1], item[0])
    if is_table(path):
        examples = read_each(rows_of(path), read_item, bad)
    else:
        text = read_text(path)
        if text.lstrip().startswith("["):
            records = enumerate(parse_json(text, path))
            examples = read_each(((f"{path}: record {index}", record) for index, record in records), read_item, bad)
        elif (columns := _whole_object(text)) is not None:
            examples = read_each(_rows_of_columns(path, columns), read_item, bad)
        else:
            examples = _read_lines_of_json(path, text, read, bad)
    if not examples:
        raise CoconutError(f"{path}: holds no records")
    return examples


def read_text(path: str | os.PathLike[str]) -> str:
    """The whole text of a file, without a byte order mark.

    Raises:
      CoconutError: naming the file, and the byte that is no UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except IsADirectoryError as error:
        raise CoconutError(f"{path}: is a folder; one laid out as a data set is written {PREFIX}{path}") from error
    except OSError as error:
        is_id = isinstance(error, FileNotFoundError) and REPOSITORY.fullmatch(os.fspath(path)) and not Path(path).suffix
        meant = f" (a data set of the Hugging Face hub is written {PREFIX}{path})" if is_id else ""
        raise CoconutError(f"{path}: cannot be read: {error.strerror or error}{meant}") from error
    except UnicodeDecodeError as error:
        raise CoconutError(f"{path}: not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from error


def holds_records(path: str | os.PathLike[str]) -> bool:
    """Whether a source is a table, JSON or JSONL, and not lines of a task's own: by its content, or else by its name.

    Raises:
      CoconutError: if the file cannot be read.
    """
    return is_table(path) or Path(path).suffix in (".json", ".jsonl") or read_text(path).lstrip().startswith(("[", "{"))


def save_examples(path: str | os.PathLike[str], examples: Iterable[Example]) -> None:
    """Writes records as JSONL if the name ends so, else as a JSON list; the file appears complete or not at all.

    Raises:
      CoconutError: if the file cannot be written.
    """
    path = Path(path)
    records = (json.dumps(to_json(example)) for example in examples)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            if path.suffix == ".jsonl":
                file.writelines(f"{record}\n" for record in records)
            else:
                file.write("[" + ",\n".join(records) + "]\n")
        os.replace(unfinished, path)
    except OSError as error:
        raise CoconutError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def to_json(example: Example) -> dict[str, Any]:
    """The record of one example, in the field's names."""
    steps = [{"think": step.count} if isinstance(step, Think) else step for step in example.steps]
    record: dict[str, Any] = {"question": example.question, "steps": steps, "answer": example.answer}
    if (graph := example.graph) is not None:
        values = (list(graph.symbols), [list(edge) for edge in graph.edges], graph.root, graph.target, graph.negative)
        record |= zip(GRAPH_FIELDS, values, strict=True)
    return record


def _whole_object(text: str) -> dict[str, Any] | None:
    """The one object that a JSON text is, unless it is lines of them; a single line is columns, or a record."""
    if not text.lstrip().startswith("{"):
        return None
    first, _, more = text.strip().partition("\n")
    content = _parsed(first)
    if content is None:
        return _parsed(text)
    columns = bool(content) and all(isinstance(column, list) for column in content.values())
    return content if columns and not more else None


def _parsed(text: str) -> dict[str, Any] | None:
    """An object that a text is; None where it is none, and whoever reads its lines says why."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _rows_of_columns(path: str | os.PathLike[str], columns: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    lengths = {name: len(column) if isinstance(column, list) else None for name, column in columns.items()}
    if None in lengths.values() or len(set(lengths.values())) != 1:
        raise CoconutError(
            f"{path}: expected a list of records, one record a line, or columns of the same length, got "
            f"{show_value(columns)}"
        )
    for index, row in enumerate(zip(*columns.values(), strict=True)):
        yield f"{path}: record {index}", dict(zip(columns, row, strict=True))


def filled_lines(path: str | os.PathLike[str], text: str) -> Iterator[tuple[str, int, str]]:
    """For each filled line of a text: file, record and line for messages, the line's number from 1, and the line."""
    # Not `splitlines`, which also splits at characters that JSON and questions may hold.
    filled = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    for index, (number, line) in enumerate(filled):
        yield f"{path}: record {index} (line {number})", number, line


def _read_lines_of_json(
    path: str | os.PathLike[str], text: str, read: Callable[[Any, str], Example], bad: BadRecords | None
) -> list[Example]:
    # A line is parsed where it is read, so that one that is no JSON may be left out, too.
    def read_line(item: tuple[str, int, str]) -> Example:
        where, number, line = item
        return read(parse_json(line, path, first_line=number), where)

    return read_each(filled_lines(path, text), read_line, bad)


def parse_json(text: str, path: str | os.PathLike[str], first_line: int = 1) -> Any:
    """What a JSON text of a file says.

    Args:
      text: the text, or a line of it.
      path: the file, for error messages.
      first_line: the text's first line in the file.

    Raises:
      CoconutError: naming the file, and the line and column of a syntax error.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise CoconutError(f"{path}: line {line}, column {error.colno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets nested too deep
        raise CoconutError(f"{path}: line {first_line}: not usable JSON: {error}") from error


def read_example(record: Any, where: str) -> Example:
    """The example of one record of the field's files.

    Raises:
      CoconutError: beginning with ``where``, and naming the field and value that are malformed.
    """
    require_object(record, where)
    has_cot = "cot" in record and "steps" not in record
    question, steps, answer = (
        read_field(record, name, where) for name in ("question", "cot" if has_cot else "steps", "answer")
    )
    for name, value in (("question", question), ("answer", answer)):
        require_text(value, name, where)
    graph = _read_graph(record, where) if any(name in record for name in GRAPH_MARKS) else None
    if has_cot:
        return Example(question=question, steps=steps_of(steps, where), answer=answer, graph=graph)
    if not isinstance(steps, list):
        raise CoconutError(f"{where}: field 'steps' must be a list of texts, got {show_value(steps)}")
    read = [_read_step(step, f"{where}: field 'steps'[{index}]") for index, step in enumerate(steps)]
    # The official preprocessing of GSM8K writes `"steps": [""]` where there are none.
    steps = tuple([step for step in read if isinstance(step, Think) or step.strip()])
    return Example(question=question, steps=steps, answer=answer, graph=graph)


def _read_step(step: Any, where: str) -> str | Think:
    if isinstance(step, str):
        return step
    # bool is an int to Python, but `true` is no number of thoughts.
    if isinstance(step, dict) and list(step) == ["think"] and type(step["think"]) is int and step["think"] > 0:
        return Think(step["think"])
    raise CoconutError(
        f'{where} must be a text, or {{"think": n}} for a block of n thoughts, n at least 1; got {show_value(step)}'
    )


def _read_graph(record: dict[str, Any], where: str) -> Graph:
    symbols, edges, *roles = (read_field(record, name, where) for name in GRAPH_FIELDS)
    require_texts(symbols, "idx_to_symbol", where)
    if not isinstance(edges, list):
        raise CoconutError(f"{where}: field 'edges' must be a list, got {show_value(edges)}")
    for index, edge in enumerate(edges):
        if not isinstance(edge, list) or len(edge) != 2:
            raise CoconutError(f"{where}: field 'edges'[{index}] must be a pair of node ids, got {show_value(edge)}")
        for node in edge:
            _require_node(node, len(symbols), f"{where}: field 'edges'[{index}]")
    for name, node in zip(GRAPH_FIELDS[2:], roles, strict=True):
        _require_node(node, len(symbols), f"{where}: field {name!r}")
    root, target, negative = roles
    return Graph(
        symbols=tuple(symbols),
        edges=tuple((parent, child) for parent, child in edges),
        root=root,
        target=target,
        negative=negative,
    )


def _require_node(value: Any, num_nodes: int, where: str) -> None:
    # bool is an int to Python, but `true` is no node.
    if not isinstance(value, int) or isinstance(value, bool):
        raise CoconutError(f"{where}: a node id must be an integer, got {show_value(value)}")
    if not 0 <= value < num_nodes:
        raise CoconutError(f"{where}: node id {value} is outside 0..{num_nodes - 1} (idx_to_symbol has {num_nodes})")
