"""``coconut table``: runs a grid and writes what it says."""

import json
from typing import Any

from rich.console import Console

from coconut.analysis.plots import plot_table
from coconut.commands.table.grid import TableConfig, run_grid
from coconut.commands.table.report import describe, summarize, to_csv
from coconut.storage import write_atomically


def make_table(config: TableConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Trains, evaluates and tabulates; started again with the same ``output`` it goes on.

    Writes ``table.md``, ``table.json``, ``table.csv``, ``table.png`` and ``table.svg`` into ``config.output``, beside
    the workdirs ``cells/METHOD/seed_N``.

    Args:
      config: what is compared.
      console: where progress goes; standard error if None.

    Returns:
      The content of ``table.json``. ``finished`` is False where the grid was interrupted, and nothing else is there.

    Raises:
      CoconutError: bad input, before the first cell starts (`run_grid`).
    """
    grid = run_grid(config, Console(stderr=True) if console is None else console)
    if grid is None:
        return {"finished": False}
    content = summarize(config, grid)
    write_atomically(config.output / "table.json", json.dumps(content, indent=1) + "\n")
    write_atomically(config.output / "table.md", describe(content) + "\n")
    write_atomically(config.output / "table.csv", to_csv(content))
    shortcut = content["best_shortcut"]
    measured = {row: own for row, own in content["methods"].items() if own["accuracy"] is not None}
    for kind in ("png", "svg") if measured else ():
        plot_table(measured, config.output / f"table.{kind}", shortcut=shortcut and shortcut["accuracy"])
    return content
