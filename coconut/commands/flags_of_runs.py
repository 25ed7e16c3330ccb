"""Flags about several runs: of ``coconut runs``, of ``coconut compare``, and ``coconut train --seeds``."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def add_seeds(train: argparse.ArgumentParser) -> None:
    """The flag ``--seeds`` of ``coconut train``; `check_seeds` reads it."""
    train.add_argument(
        "--seeds",
        metavar="N,...",
        help="train a run for each of these seeds (0,1,2 or 0..4), one after the other, in WORKDIR/seed_N",
    )


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


def check_seeds(options: argparse.Namespace) -> None:
    """Looks for flags that mean one run beside ``--seeds`` of ``coconut train``.

    Raises:
      CoconutError: naming it; or the seeds are no numbers.
    """
    if options.seeds is None:
        return
    read_seeds(options.seeds)
    own_seed = [
        binding for binding in options.gin_binding if re.match(r"\s*([\w./]+[./])?RunConfig\.seed\s*=", binding)
    ]
    one_run = {
        f"--gin.{own_seed[0] if own_seed else ''}": bool(own_seed),
        "--coordinator": options.coordinator is not None,
        "--distributed": options.distributed,
        f"--from_step {options.from_step}": options.from_step is not None,
        "--dry_run": options.dry_run,
    }
    if given := [flag for flag, is_given in one_run.items() if is_given]:
        raise CoconutError(
            f"{given[0]}: is about one run, and --seeds {options.seeds} about several: give one or the other"
        )
