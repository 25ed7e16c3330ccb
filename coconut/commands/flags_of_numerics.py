"""Flags about the numbers a model is computed in: those of ``coconut numerics``, and some of ``coconut evaluate``."""

import argparse
from collections.abc import Callable
from typing import Any

from coconut.errors import CoconutError

EXAMPLE = """For example, what bfloat16, single rows and eight devices change, where on a CPU eight devices are made of
it: coconut numerics --workdir WORKDIR --dtypes float32,bfloat16,bfloat16:float32 --batch_sizes 64,1 --mesh data=1
--mesh data=8"""


def add_numbers(evaluate: argparse.ArgumentParser) -> None:
    """The flags of ``coconut evaluate`` about numbers."""
    evaluate.add_argument(
        "--dtype", metavar="DTYPE", help="compute in float32 or bfloat16, whatever the run was trained in"
    )
    evaluate.add_argument(
        "--param_dtype", metavar="DTYPE", help="round parameters so; bfloat16 --dtype float32 needs half the memory"
    )


def add_numerics(
    numerics: argparse.ArgumentParser,
    path: Callable[[str], Any],
    mesh: Callable[[str], Any],
    names: Callable[[str], Any],
    numbers: Callable[[str], Any],
) -> None:
    """The flags of ``coconut numerics``, each read by one of these functions."""
    numerics.epilog = EXAMPLE
    numerics.add_argument("--workdir", type=path, required=True, help="a run's, or a quickstart's: its Coconut run")
    numerics.add_argument(
        "--dtypes",
        type=names,
        default=("float32", "bfloat16", "bfloat16:float32"),
        metavar="DTYPE,...",
        help="dtypes to compute in, or PARAMETERS:DTYPE (float32,bfloat16,bfloat16:float32)",
    )
    numerics.add_argument(
        "--batch_sizes", type=numbers, metavar="N,...", help="rows answered together (the run's own, and 1)"
    )
    numerics.add_argument(
        "--mesh",
        type=mesh,
        action="append",
        metavar="AXIS=SIZE,...",
        help="devices, such as data=8 or tensor=2; repeatable (one device). On a CPU that has fewer they are made",
    )
    numerics.add_argument("--split", default="test", help="test (if not given), validation, or a file of questions")
    numerics.add_argument("--limit", type=int, metavar="N", help="the first so many questions")
    numerics.add_argument("--output", type=path, help="write the result as JSON, with every answer that differs")


def check_numerics(options: argparse.Namespace) -> None:
    """Looks whether the flags of ``coconut numerics`` make sense.

    Raises:
      CoconutError: one does not; the message names it.
    """
    if wrong := [size for size in options.batch_sizes or () if size < 1]:
        raise CoconutError(f"--batch_sizes {wrong[0]}: must be at least 1")
    if options.limit is not None and options.limit < 1:
        raise CoconutError(f"--limit {options.limit}: must be at least 1")
