"""Flags about several runs: of ``coconut runs``, ``compare`` and ``mix``, and of a sweep of ``coconut train``."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coconut.commands.cells import Cell, make_cells
from coconut.errors import CoconutError


def add_runs(runs: argparse.ArgumentParser, path: Callable[[str], Any]) -> None:
    """The flags of ``coconut runs``, whose folders are read by ``path``."""
    runs.add_argument("folder", type=path, metavar="DIR", help="runs here and below")
    runs.add_argument("--json", action="store_true", help="print JSON, for programs")


def add_compare(compare: argparse.ArgumentParser, path: Callable[[str], Any]) -> None:
    """The flags of ``coconut compare``."""
    compare.add_argument("workdirs", type=path, nargs="+", metavar="WORKDIR", help="of a run, or a folder of runs")
    compare.add_argument(
        "--output", type=Path, metavar="DIR", help="write learning curves as PNG and SVG, and the tables"
    )
    compare.add_argument(
        "--axis", choices=("steps", "seconds"), default="steps", help="of the curves: optimizer steps, or training time"
    )
    compare.add_argument(
        "--loss",
        metavar="NAME",
        help="the training metric to show and draw; first_loss, or what there is, if not given",
    )


def add_mix(mix: argparse.ArgumentParser, path: Callable[[str], Any], numbers: Callable[[str], Any]) -> None:
    """The flags of ``coconut mix``; `check_mix` looks at them."""
    mix.add_argument("workdirs", type=path, nargs="+", metavar="WORKDIR", help="of runs with a SingularValueConfig")
    mix.add_argument(
        "--by",
        choices=("classifier", "cross_entropy", "weights"),
        default="classifier",
        help="each question by the run whose validation questions it is like (classifier), or all by one mixture: the "
        "best found on a few questions (cross_entropy), or a given one",
    )
    mix.add_argument("--weights", type=numbers, metavar="W,W,...", help="with --by weights: of each run")
    mix.add_argument("--per_layer", action="store_true", help="with --by cross_entropy: weights of each layer")
    mix.add_argument("--shots", type=int, default=10, metavar="N", help="with --by cross_entropy: questions to look by")
    mix.add_argument(
        "--iterations",
        type=int,
        default=50,
        metavar="N",
        help="with --by cross_entropy: times that 31 mixtures are tried, at most",
    )
    mix.add_argument("--seed", type=int, default=0, help="with --by cross_entropy: of its draws")
    mix.add_argument(
        "--split", default="test", help="test (if not given) or validation of every run, or a file of questions"
    )
    mix.add_argument("--limit", type=int, metavar="N", help="the first so many questions of each run")
    mix.add_argument("--output", type=path, help="write the result as JSON")


def check_mix(options: argparse.Namespace) -> None:
    """Looks whether the flags of ``coconut mix`` go together.

    Raises:
      CoconutError: there is nothing to mix, or a flag means nothing beside the others; the message names it.
    """
    if len(options.workdirs) < 2:
        raise CoconutError("coconut mix: needs the workdirs of at least two runs")
    if (options.weights is not None) != (options.by == "weights"):
        raise CoconutError("--weights: belongs to --by weights, which needs it")
    of_search = {"per_layer": False, "shots": 10, "iterations": 50, "seed": 0}
    given = [flag for flag, neutral in of_search.items() if getattr(options, flag) != neutral]
    if given and options.by != "cross_entropy":
        raise CoconutError(f"--{given[0]}: belongs to --by cross_entropy, not to --by {options.by}")
    for flag in ("shots", "limit", "iterations"):
        if (value := getattr(options, flag)) is not None and value < 1:
            raise CoconutError(f"--{flag} {value}: must be at least 1")


def add_sweep(train: argparse.ArgumentParser) -> None:
    """The flags of ``coconut train`` about several runs; `check_sweep` looks at them."""
    train.add_argument(
        "--seeds",
        metavar="N,...",
        help="train a run for each of these seeds (0,1,2 or 0..4), one after the other, in WORKDIR/seed_N",
    )
    train.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="FIELD=[...]",
        help="train a run for each value of a gin field, such as 'OptimizerConfig.learning_rate = [1e-3, 3e-3]', or "
        "for those of a file of such lines; repeated, and with --seeds: for all combinations, a folder each",
    )
    train.add_argument(
        "--cell", type=int, metavar="I", help="of a sweep or of seeds, train the run of this number alone, from 0"
    )


def cells_of(options: argparse.Namespace) -> tuple[Cell, ...]:
    """The runs that ``--sweep`` and ``--seeds`` ask for; none where neither is given.

    Raises:
      CoconutError: `make_cells`, `read_seeds`.
    """
    if options.seeds is None and not options.sweep:
        return ()
    return make_cells(options.sweep, None if options.seeds is None else read_seeds(options.seeds))


def read_seeds(text: str) -> tuple[int, ...]:
    """Reads ``0,1,2``, or ``0..4`` for all from 0 to 4.

    Raises:
      CoconutError: they are no such numbers, a range is empty, or one is named twice.
    """
    if not re.fullmatch(r"\d+(\.\.\d+)?(,\d+(\.\.\d+)?)*", text):
        raise CoconutError(f"--seeds {text!r}: must be whole numbers such as 0,1,2, or 0..2 for the same")
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("..")
        own = range(int(first), int(last or first) + 1)
        if not own:
            raise CoconutError(f"--seeds {text!r}: {part} holds none, the first of a range comes first")
        seeds += own
    if len(set(seeds)) < len(seeds):
        raise CoconutError(f"--seeds {text}: must name at least one, and each once")
    return tuple(seeds)


def check_sweep(options: argparse.Namespace) -> None:
    """Looks at the flags of ``coconut train`` about several runs.

    Raises:
      CoconutError: they are wrong by themselves; a flag beside them means one run, or a binding one of their fields.
    """
    cells = cells_of(options)
    flag = f"--seeds {options.seeds}" if not options.sweep else f"--sweep {options.sweep[0]!r}"
    if not cells:
        if options.cell is not None:
            raise CoconutError(f"--cell {options.cell}: is one of a sweep: give --sweep or --seeds, too")
        return
    bad = options.skip_bad_records
    of_fields = {
        "DataConfig.drop_too_long": "--drop_too_long" if options.drop_too_long else None,
        "DataConfig.skip_bad_records": None if bad is None else f"--skip_bad_records {bad}",
    }
    for name in cells[0].values:
        if of_field := of_fields.get(name):
            raise CoconutError(f"{of_field}: is about one run, and {flag} about several: give one or the other")
        field = re.escape(".".join(name.split(".")[-2:]))
        own = [text for text in options.gin_binding if re.match(rf"\s*([\w./]+[./])?{field}\s*=", text)]
        if own:
            raise CoconutError(f"--gin.{own[0]}: is about one run, and {flag} about several: give one or the other")
    if options.cell is not None:
        if not 0 <= options.cell < len(cells):
            raise CoconutError(f"--cell {options.cell}: must be from 0 to {len(cells) - 1}")
        return
    one_run = {
        "--coordinator": options.coordinator is not None,
        "--distributed": options.distributed,
        f"--from_step {options.from_step}": options.from_step is not None,
    }
    if given := [name for name, is_given in one_run.items() if is_given]:
        raise CoconutError(f"{given[0]}: is about one run, and {flag} about several: give one or the other, or --cell")
