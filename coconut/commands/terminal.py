"""Text on a terminal: tables that fit it, and nothing cut off."""

import re
from collections.abc import Collection, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

GAP = 2
"""Blanks between columns."""
NARROWEST = 10
"""Columns that a name is broken to, where it may be."""
WIDEST = 100_000
"""Columns of what is no terminal, where rich would take 80."""


def print_markdown(text: str, console: Console) -> None:
    """Prints Markdown with tables; into a file or pipe as it is."""
    if not console.is_terminal:
        console.file.write(text + "\n")
        return
    lines = text.splitlines()
    while lines:
        if not lines[0].startswith("|"):
            console.print(Text(lines.pop(0)))
            continue
        table: list[list[str]] = []
        while lines and lines[0].startswith("|"):
            cells = re.split(r"(?<!\\)\|", lines.pop(0).strip()[1:-1])
            table.append([cell.strip().replace("\\|", "|") for cell in cells])
        header, _, *rows = table
        print_table(header, rows, console)


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[str | Text]], console: Console, *, breakable: Collection[str] = ()
) -> None:
    """Prints a table that fits the terminal; into a file or pipe a line for each row, however long.

    Cells are wrapped between words. Where that is not enough, the columns are shown in several tables, one below the
    other, each of which begins with the first column.

    Args:
      header: names of the columns.
      rows: their cells.
      console: where to.
      breakable: columns, by name, of names that may be broken in the middle.
    """
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDEST, color_system=None)
    texts = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in (header, *rows)]
    columns = list(zip(*texts, strict=True))
    natural = [max(text.cell_len for text in column) for column in columns]
    longest = [max((len(word) for text in column for word in text.plain.split()), default=0) for column in columns]
    least = [min(word, NARROWEST) if name in breakable else word for name, word in zip(header, longest, strict=True)]
    for number, part in enumerate(_parts(least, console.width)):
        if number:
            console.print()
        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
        widths = _widths([natural[index] for index in part], [least[index] for index in part], console.width)
        for index, width in zip(part, widths, strict=True):
            table.add_column(columns[index][0], width=width, overflow="fold")
        for row in texts[1:]:
            table.add_row(*(row[index] for index in part))
        console.print(table)


def _parts(least: Sequence[int], width: int) -> list[list[int]]:
    """Which columns stand side by side: the first one, and as many as their narrowest widths leave room for."""
    parts = [[0]]
    for index in range(1, len(least)):
        if len(parts[-1]) > 1 and sum(least[own] + GAP for own in (*parts[-1], index)) - GAP > width:
            parts.append([0])
        parts[-1].append(index)
    return parts


def _widths(natural: Sequence[int], least: Sequence[int], width: int) -> list[int]:
    """The widest columns give way first, down to their narrowest widths, and below where there is no other way."""
    widths = list(natural)
    while sum(widths) + GAP * (len(widths) - 1) > width:
        can = [index for index in range(len(widths)) if widths[index] > least[index]] or range(len(widths))
        widest = max(can, key=lambda index: widths[index])
        if widths[widest] == 1:
            break
        widths[widest] -= 1
    return widths
