"""``coconut train --seeds`` and ``--sweep``: a run for each cell of a grid, one after the other, or one of them."""

import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from rich.console import Console

from coconut.commands.cells import SEED, Cell
from coconut.commands.train import run_training
from coconut.datasets import DataConfig, Dataset, load_dataset
from coconut.errors import CoconutError, DivergedError
from coconut.storage import exists
from coconut.storage_path import StoragePath
from coconut.training.clock import told
from coconut.training.config import RunConfig
from coconut.training.setup import prepare
from coconut.training.workdir import RUN_FILE, latest_manifest

Resolve = Callable[[Cell], RunConfig]
"""The run of a cell."""


def train_cells(
    resolve: Resolve,
    cells: Sequence[Cell],
    workdir: StoragePath,
    *,
    console: Console,
    allow: Collection[str] = (),
    **options: Any,
) -> list[StoragePath] | None:
    """Trains each cell in its folder of ``workdir``; started again it goes on, and leaves alone what is finished.

    A cell that diverges does not keep the others from running.

    Args:
      resolve: the run of a cell.
      cells: of the grid.
      workdir: the folder of all runs.
      console: where progress goes.
      allow: as `coconut.training.loop.train` takes it.
      options: what else `run_training` takes.

    Returns:
      The workdir of each cell; None where training was interrupted.

    Raises:
      CoconutError: bad input, before the first run starts: ``workdir`` is a run itself, a cell is no run, or its folder
        holds another run.
      DivergedError: the run of a cell diverged; the message names all of them. The others have run.
    """
    folders = check_cells(resolve, cells, workdir, allow)
    data = _LatestData()
    # Its message alone: an error holds on to the state of the run that it ended.
    diverged: dict[str, str] = {}
    for number, (cell, folder) in enumerate(zip(cells, folders, strict=True), 1):
        which = f"{cell.title} ({number} of {len(cells)})"
        manifest = latest_manifest(folder)
        if manifest is not None and manifest.progress.finished:
            console.print(f"{which}: is finished, in {folder}", highlight=False, markup=False)
            continue
        console.print(f"{which}: {folder}", highlight=False, markup=False)
        # Resolved once more: the workdir keeps the gin text that was read last.
        config = resolve(cell)
        dataset, own = data.of(config.data), as_json(cell, len(cells))
        try:
            result = run_training(config, folder, dataset=dataset, allow=allow, console=console, cell=own, **options)
        except DivergedError as error:
            diverged[cell.title] = str(error)
            console.print(f"{which}: diverged: {error}", highlight=False, markup=False)
            continue
        finished, by_clock = result.progress.finished, result.clock
        del result  # Its model, before the next one is made.
        if not finished:
            return None
        console.print(f"{which}: {told(by_clock)}", highlight=False, markup=False)
    if diverged:
        raise DivergedError("; ".join(f"{title}: {error}" for title, error in diverged.items()))
    return folders


def check_cells(
    resolve: Resolve, cells: Sequence[Cell], workdir: StoragePath | None, allow: Collection[str] = ()
) -> list[StoragePath]:
    """Looks whether every cell could be trained.

    Cells that differ by their seed alone have the same questions, so that one of them is looked at, and those whose
    folder holds a run.

    Returns:
      The folder of each cell; none without a ``workdir``.

    Raises:
      CoconutError: `train_cells`.
    """
    folders = [] if workdir is None else [folder_of(cell, workdir) for cell in cells]
    data = _LatestData()
    seen: list[Mapping[str, Any]] = []
    for cell, folder in zip(cells, folders or [None] * len(cells), strict=True):
        begun = folder is not None and exists(folder / RUN_FILE)
        others = {name: value for name, value in cell.values.items() if name != SEED}
        if others in seen and not begun:
            continue
        seen.append(others)
        try:
            config = resolve(cell)
            run = prepare(config, data.of(config.data), folder)[0]
            if folder is not None and begun:
                run.check(folder, allow)
        except CoconutError as error:
            raise CoconutError(f"{cell.title}: {error}") from error
    return folders


def folder_of(cell: Cell, workdir: StoragePath) -> StoragePath:
    """The workdir of a cell of the sweep in ``workdir``.

    Raises:
      CoconutError: ``workdir`` is a run itself.
    """
    if exists(workdir / RUN_FILE):
        raise CoconutError(f"--workdir {workdir}: is a run itself; --seeds and --sweep make a folder of runs")
    return workdir / cell.folder


def as_json(cell: Cell, count: int) -> dict[str, Any]:
    """What a cell's workdir says of it, for `coconut runs`: which of ``count`` it is, and its values."""
    return {"cell": cell.index, "cells": count, "values": dict(cell.values)}


def describe_cells(cells: Sequence[Cell], words: Sequence[str]) -> str:
    """A line for each cell: its number and folder; then how to train them as jobs of their own.

    Args:
      cells: of the grid.
      words: of the command line, behind ``coconut``.
    """
    width = len(str(len(cells) - 1))
    lines = [f"{cell.index:{width}}  {cell.folder}" for cell in cells]
    command = shlex.join(["coconut", *(word for word in words if word != "--dry_run")])
    return "\n".join(
        [
            *lines,
            "",
            "one after another: the same command without --dry_run",
            f"each by itself: for cell in $(seq 0 {len(cells) - 1}); do {command} --cell $cell; done",
            "as a job array: experiments/launch/sweep.yaml",
        ]
    )


class _LatestData:
    """The data that were loaded last, for the next cell where it has the same."""

    def __init__(self) -> None:
        self._latest: tuple[DataConfig, Dataset] | None = None

    def of(self, config: DataConfig) -> Dataset:
        """The data of a run."""
        if self._latest is None or self._latest[0] != config:
            self._latest = None  # Before others take up memory.
            self._latest = config, load_dataset(config)
        return self._latest[1]
