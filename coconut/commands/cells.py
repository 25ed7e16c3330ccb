"""The cells of a sweep: which values each has, and where it goes. Nothing heavy is imported.

A cell is a pure function of the sweep's text and the cell's number, so that a job array needs to know nothing else.
"""

import ast
import collections
import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from coconut.errors import CoconutError

SEED = "RunConfig.seed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep.

    Attributes:
      index: its number, from 0. The first field changes slowest.
      values: of each field that is swept, by its gin name.
      labels: of the fields and values, short: ``{"learning_rate": "0.001"}``.
    """

    index: int
    values: Mapping[str, Any]
    labels: Mapping[str, str]

    @property
    def bindings(self) -> tuple[str, ...]:
        """The gin bindings that make it."""
        return tuple(f"{name} = {value!r}" for name, value in self.values.items())

    @property
    def folder(self) -> str:
        """Its folder in that of the sweep, a level for each field: ``learning_rate_0.001/seed_0``."""
        return "/".join(f"{name}_{re.sub(r'[^0-9A-Za-z.+-]+', '_', text)}" for name, text in self.labels.items())

    @property
    def title(self) -> str:
        """For people: ``learning_rate 0.001, seed 0``."""
        return ", ".join(f"{name} {text}" for name, text in self.labels.items())


def make_cells(sweeps: Sequence[str], seeds: Sequence[int] | None = None) -> tuple[Cell, ...]:
    """All combinations of the values of what is swept, in order: the last field changes fastest.

    Args:
      sweeps: each ``FIELD = [VALUE, ...]``, such as ``OptimizerConfig.learning_rate = [1e-3, 3e-3]``, or the path of a
        file of such lines. Values are plain Python ones.
      seeds: of ``--seeds``, which change fastest; None for the run's own.

    Raises:
      CoconutError: a file cannot be read, a line is none of this kind, a field is swept twice, a value stands twice, or
        two values would share a folder.
    """
    swept: dict[str, list[Any]] = {}
    for text in sweeps:
        for name, values in _assignments(text):
            if name in swept or (name == SEED and seeds is not None):
                raise CoconutError(f"--sweep {text}: {name} is swept already")
            swept[name] = values
    if seeds is not None:
        swept[SEED] = list(seeds)
    last = [name.rpartition(".")[2] for name in swept]
    short = {name: part if last.count(part) == 1 else name for name, part in zip(swept, last, strict=True)}
    cells = tuple(
        Cell(
            index=index,
            values=dict(zip(swept, values, strict=True)),
            labels={short[name]: str(value) for name, value in zip(swept, values, strict=True)},
        )
        for index, values in enumerate(itertools.product(*swept.values()))
    )
    ((folder, cells_there),) = collections.Counter(cell.folder for cell in cells).most_common(1)
    if cells_there > 1:
        raise CoconutError(f"--sweep: two cells would go to one folder, {folder}: each value may stand once")
    return cells


def _assignments(sweep: str) -> Iterator[tuple[str, list[Any]]]:
    """The fields of a sweep, each with its values."""
    text, where = sweep, f"--sweep {sweep}"
    if "=" not in sweep:
        try:
            text = Path(sweep).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise CoconutError(f"{where}: neither FIELD = [VALUE, ...] nor a file of such lines: {why}") from error
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CoconutError(f"{where}: {_NEEDED}: {error}") from error
    if not statements:
        raise CoconutError(f"{where}: {_NEEDED}; there is none")
    for statement in statements:
        line = where if text is sweep else f"{where}: line {statement.lineno}"
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            raise CoconutError(f"{line}: {_NEEDED}")
        name = ast.unparse(statement.targets[0])
        if not re.fullmatch(r"\w+(\.\w+)*", name):
            raise CoconutError(f"{line}: {_NEEDED}")
        try:
            values = ast.literal_eval(statement.value)
        except (ValueError, TypeError, RecursionError, MemoryError) as error:
            raise CoconutError(f"{line}: {name}: values must be numbers, quoted text, True, False or None") from error
        if not isinstance(values, list) or not values:
            raise CoconutError(f"{line}: {name} = {values!r}: must be a list of at least one value")
        # As --seeds names its field, however far the name is spelled out.
        yield ".".join(name.split(".")[-2:]), values


_NEEDED = "a sweep is FIELD = [VALUE, ...], such as OptimizerConfig.learning_rate = [1e-3, 3e-3]"
