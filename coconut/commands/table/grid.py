"""The grid of a table: a run and its evaluation for each method and seed, each in a workdir of its own.

Started again in the same folder the grid goes on: a cell whose result is there is left alone, the run of another one
goes on where it stopped, and a cell that failed is tried again.
"""

import dataclasses
import json
import shlex
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from coconut import interruption
from coconut.commands.configuration import SHIPPED, SHIPPED_IN, resolve_run
from coconut.commands.evaluate import EvaluateConfig, evaluate_workdir
from coconut.commands.table.budget import Budget, bindings_of, divide, measure_steps
from coconut.commands.terminal import print_table
from coconut.commands.train import how_it_went, train_to_the_end
from coconut.datasets import Dataset, load_dataset
from coconut.errors import CoconutError
from coconut.storage import exists, make_folder, read_text, remove, write_atomically
from coconut.tasks import get_task, unknown
from coconut.training.config import RunConfig, differences, to_json
from coconut.training.run import RUN_FILE
from coconut.training.setup import prepare

RESULT, ANSWERS, FAILURE, MEASURED = "result.json", "answers.jsonl", "failure.txt", "steps_in_budget.json"
INTERVENTIONS = ("removed", "zero", "noise", "mean", "other", "permuted")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableConfig:
    """What a table compares.

    Attributes:
      task: name of the task; its gin file stands before all others.
      methods: names of gin files in ``gin_configs/methods``, or paths of others; a row each.
      seeds: of parameters and data order; the questions are the same for every seed.
      budget: what each run may spend (`coconut.commands.table.budget`).
      output: the folder for everything.
      configs: gin files of what all methods share: model, optimizer, data, the run to start from; ``runs/TASK.gin``
        where none is given. The method's file comes behind them.
      bindings: gin bindings behind all files.

    Raises:
      CoconutError: nothing to compare, something twice, or a name that nobody knows.
    """

    task: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    budget: Budget
    output: Path
    configs: tuple[str, ...] = ()
    bindings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", Path(self.output))
        get_task(self.task)
        for flag, values in (("--methods", self.rows), ("--seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise CoconutError(f"{flag} {','.join(map(str, values))}: must name at least one, and each once")
        for method in self.methods:
            self._file_of(method)
        if not self.configs and not _is_file(self._default_config):
            raise CoconutError(f"--config is missing: there is no {self._default_config} to take in its place")

    @property
    def rows(self) -> tuple[str, ...]:
        """The methods as the table names them."""
        return tuple(Path(method).stem if method.endswith(".gin") else method for method in self.methods)

    @property
    def command(self) -> str:
        """The command that makes this table."""
        flags = {"--task": self.task, "--methods": ",".join(self.methods), "--seeds": ",".join(map(str, self.seeds))}
        flags |= {"--budget": str(self.budget), "--output": str(self.output)}
        words = [word for pair in flags.items() for word in pair]
        words += [word for path in self.configs for word in ("--config", path)]
        words += [word for binding in self.bindings for word in ("--gin_binding", binding)]
        return shlex.join(["coconut", "table", *words])

    def resolve(self, row: str, seed: int, lengths: Sequence[int] = ()) -> RunConfig:
        """The run of a cell, with the steps of each stage where they are given.

        Raises:
          CoconutError: a file or a binding is wrong; or it is a run of another task.
        """
        task_file = f"{SHIPPED}/tasks/{self.task}.gin"
        files = [task_file] if _is_file(task_file) else []
        files += [*(self.configs or (self._default_config,)), self._file_of(self.methods[self.rows.index(row)])]
        budget = bindings_of(lengths) if lengths else ()
        config = resolve_run(files, (*self.bindings, f"RunConfig.seed = {seed}", *budget), shared=True)
        if config.data.task != self.task:
            raise CoconutError(f"--task {self.task}: the files say DataConfig.task = {config.data.task!r}")
        return config

    @property
    def _default_config(self) -> str:
        return f"{SHIPPED}/runs/{self.task}.gin"

    def _file_of(self, method: str) -> str:
        path = method if method.endswith(".gin") else f"{SHIPPED}/methods/{method}.gin"
        if not _is_file(path):
            folders = [root / SHIPPED / "methods" for root in (Path(), SHIPPED_IN)]
            raise CoconutError(unknown("method", method, {file.stem for x in folders for file in x.glob("*.gin")}))
        return path


class Cell(NamedTuple):
    """A method with a seed.

    Attributes:
      row: the method, as the table names it.
      seed: the seed.
      folder: its workdir.
    """

    row: str
    seed: int
    folder: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid that ran to its end.

    Attributes:
      cells: in the order they ran.
      results: of the cells that were evaluated: ``training``, and ``evaluation`` as `evaluate_workdir` gives it.
      failures: of the others: what went wrong.
      dataset: the data of all of them.
      configs: the resolved run of each method, with its first seed.
    """

    cells: tuple[Cell, ...]
    results: Mapping[Cell, Mapping[str, Any]]
    failures: Mapping[Cell, str]
    dataset: Dataset
    configs: Mapping[str, RunConfig]


def run_grid(config: TableConfig, console: Console) -> Grid | None:
    """Trains and evaluates every cell; None where that was interrupted.

    Raises:
      CoconutError: bad input, before the first cell starts: a config that does not resolve, data that cannot be read,
        methods whose questions differ, a folder that holds another table.
    """
    cells = tuple(
        Cell(row, seed, config.output / "cells" / row / f"seed_{seed}") for row in config.rows for seed in config.seeds
    )
    configs = {row: config.resolve(row, config.seeds[0]) for row in config.rows}
    dataset = _shared_data(configs)
    for row, run in configs.items():
        if config.budget.steps is not None:
            divide(run.curriculum, config.budget.steps)
        prepare(run, dataset, cells[config.rows.index(row) * len(config.seeds)].folder)
    make_folder(config.output)
    lengths = _stage_lengths(config, configs, dataset, console)
    if lengths is None:
        return None
    for cell in cells:
        _check_cell(cell, config.resolve(cell.row, cell.seed, lengths[cell.row]), dataset)

    results: dict[Cell, Mapping[str, Any]] = {}
    failures: dict[Cell, str] = {}
    for cell in cells:
        _show(cells, cell, results, failures, console)
        if exists(cell.folder / RESULT):
            results[cell] = json.loads(read_text(cell.folder / RESULT))
            continue
        try:
            # Resolved once more: the workdir keeps the gin text that was read last.
            run = config.resolve(cell.row, cell.seed, lengths[cell.row])
            result = _run_cell(cell, run, dataset, console)
        except Exception as error:
            # Whatever it is, the other cells are as good as before.
            interruption.check(error)
            failures[cell] = f"{type(error).__name__}: {error}"
            make_folder(cell.folder)
            write_atomically(cell.folder / FAILURE, traceback.format_exc())
            console.print(f"{cell.row}, seed {cell.seed} failed: {failures[cell]}", highlight=False, markup=False)
            continue
        if result is None:
            return None
        results[cell] = result
    _show(cells, None, results, failures, console)
    configs = {row: config.resolve(row, config.seeds[0], lengths[row]) for row in config.rows}
    return Grid(cells=cells, results=results, failures=failures, dataset=dataset, configs=configs)


def _run_cell(cell: Cell, run: RunConfig, dataset: Dataset, console: Console) -> dict[str, Any] | None:
    """Trains and evaluates; None where it was interrupted."""
    remove(cell.folder / FAILURE)
    trained = train_to_the_end(run, cell.folder, console, dataset)
    if trained is None:
        return None
    # The mean thought is that of validation questions.
    altered = tuple(name for name in INTERVENTIONS if name != "mean" or dataset.splits["validation"])
    evaluate = EvaluateConfig(thoughts=(), interventions=altered, answers_file=cell.folder / ANSWERS)
    result = {
        "training": how_it_went(trained),
        "splits": dict(trained.run.splits),
        "evaluation": evaluate_workdir(cell.folder, evaluate, console=console),
    }
    write_atomically(cell.folder / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def _shared_data(configs: Mapping[str, RunConfig]) -> Dataset:
    """The data of all runs.

    Raises:
      CoconutError: they differ, or hold no test questions.
    """
    first, *others = configs
    for row in others:
        if found := differences(to_json(configs[first].data), to_json(configs[row].data)):
            name, what = next(iter(found.items()))
            raise CoconutError(f"--methods {first},{row}: their questions differ: DataConfig.{name}: {what}")
    data = configs[first].data
    if not data.test:
        raise CoconutError("DataConfig.test = 0: a table is about questions of a test split")
    return load_dataset(data)


def _stage_lengths(
    config: TableConfig, configs: Mapping[str, RunConfig], dataset: Dataset, console: Console
) -> dict[str, list[int]] | None:
    """The steps of each method's stages; None where measuring them was interrupted."""
    path, minutes = config.output / MEASURED, config.budget.minutes
    if minutes is None:
        assert config.budget.steps is not None
        return {row: divide(run.curriculum, config.budget.steps) for row, run in configs.items()}
    measured = json.loads(read_text(path)) if exists(path) else {"budget": str(config.budget), "steps": {}}
    if measured["budget"] != str(config.budget):
        raise CoconutError(f"--budget {config.budget}: {path} says that this table's is {measured['budget']}")
    for row, run in configs.items():
        if row not in measured["steps"]:
            console.print(f"{row}: measuring what its steps cost", highlight=False)
            workdir = config.output / "measuring"
            steps = measure_steps(run, minutes, workdir, dataset=dataset, console=console)
            if steps is None:
                return None
            measured["steps"][row] = steps
            write_atomically(path, json.dumps(measured, indent=1) + "\n")
    return {row: divide(run.curriculum, measured["steps"][row]) for row, run in configs.items()}


def _check_cell(cell: Cell, run: RunConfig, dataset: Dataset) -> None:
    """Looks whether a cell that has begun is of this table.

    Raises:
      CoconutError: it is a run of another config or of other questions; the message lists what differs.
    """
    if exists(cell.folder / RUN_FILE):
        prepare(run, dataset, cell.folder)[0].check(cell.folder)


def _show(
    cells: Sequence[Cell],
    now: Cell | None,
    results: Mapping[Cell, Mapping[str, Any]],
    failures: Mapping[Cell, str],
    console: Console,
) -> None:
    """Prints how far the grid is; nothing where nobody watches."""
    if not console.is_terminal:
        return
    seeds = dict.fromkeys(cell.seed for cell in cells)

    def state(cell: Cell) -> str:
        if cell in results:
            return f"{100 * results[cell]['evaluation']['trained']['accuracy']:.1f} %"
        return "failed" if cell in failures else "running" if cell == now else "-"

    rows = [
        [row, *(state(cell) for cell in cells if cell.row == row)] for row in dict.fromkeys(cell.row for cell in cells)
    ]
    console.print(f"{len(results)} of {len(cells)} cells are done")
    print_table(("method", *(f"seed {seed}" for seed in seeds)), rows, console)


def _is_file(path: str) -> bool:
    shipped = path.startswith(f"{SHIPPED}/") and (SHIPPED_IN / path).is_file()
    return Path(path).is_file() or shipped
