"""The quickstart's table, a method after the other: a run that is stopped leaves the table of the methods before."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from coconut.commands import quickstart
from coconut.commands.quickstart import METHODS, QuickstartConfig
from experiments.on_gpu.record import Measurement, Progress


def measurements(*, smoke: bool, work: Path) -> Mapping[str, Measurement]:
    """The table of the first method, of the first two, and so on; runs that are there are not made again."""
    methods = QuickstartConfig.smoke().methods if smoke else METHODS
    return {
        " ".join(methods[: count + 1]): functools.partial(
            measure, methods[: count + 1], work / "quickstart", smoke=smoke
        )
        for count in range(len(methods))
    }


def measure(methods: tuple[str, ...], work: Path, progress: Progress, *, smoke: bool) -> dict[str, Any]:
    """The quickstart with so many methods.

    Raises:
      RuntimeError: it was interrupted.
    """
    del progress
    bindings = QuickstartConfig.smoke().bindings if smoke else ()
    config = QuickstartConfig(methods=methods, bindings=bindings)
    content = quickstart.quickstart(work, config=config, console=Console(quiet=True))
    if not content["finished"]:
        raise RuntimeError("it was interrupted")
    print(quickstart.table(content), flush=True)
    # The provenance stands in the record already.
    return {key: value for key, value in content.items() if key != "provenance"} | {"table": quickstart.table(content)}
