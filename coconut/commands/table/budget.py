"""What each run of a table may spend, and how that is divided over the stages of its curriculum.

A method's own curriculum says how long its stages are *in proportion to each other*. The budget says how long all of
them are together: each stage gets its share of the steps, rounded down, and the last one what is left. A metric that
would end a stage early is switched off, so that every run takes its whole budget.

A budget of minutes is turned into steps beforehand: a short run of each method measures what a step costs in each of
its stages, without compilation. So runs stay reproducible to the bit, learning rates decay to their end, and all seeds
of a method take the same steps. The seconds that a run then takes are measured again, and stand in the table.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from coconut.curriculum import CurriculumConfig, stage_steps
from coconut.datasets import Dataset
from coconut.errors import CoconutError
from coconut.storage import read_text, remove
from coconut.training.config import RunConfig
from coconut.training.loop import train

FINE = 10**6
"""Steps of an epoch where only the proportion of stages is asked for."""
MEASURED_STEPS, STEPS_TO_START = 30, 10
"""Of each stage of a run that measures what a step costs; and the first of them, which do not count."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What each run of a table may spend.

    Attributes:
      steps: optimizer steps; None where time counts.
      minutes: of training, without compilation, evaluation and saving; None where steps count.
    """

    steps: int | None = None
    minutes: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Reads ``2000steps`` or ``10minutes``.

        Raises:
          CoconutError: it is neither, or not positive.
        """
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(steps|minutes)", text)
        if not found or not float(found[1]) or (found[2] == "steps" and "." in found[1]):
            raise CoconutError(f"--budget {text!r}: must be a positive number such as 2000steps or 10minutes")
        return cls(steps=int(found[1])) if found[2] == "steps" else cls(minutes=float(found[1]))

    def __str__(self) -> str:
        return f"{self.minutes:g}minutes" if self.steps is None else f"{self.steps}steps"


def stage_shares(curriculum: CurriculumConfig) -> list[float]:
    """The share of a run's steps that each stage takes, if no metric ends one early."""
    stages = range(curriculum.first_stage, curriculum.final_stage + 1)
    lengths = [stage_steps(curriculum, stage, FINE) for stage in stages]
    return [length / sum(lengths) for length in lengths]


def divide(curriculum: CurriculumConfig, steps: int) -> list[int]:
    """The steps of each stage: its share, and the last one what is left.

    Raises:
      CoconutError: a stage would get none.
    """
    *shares, last = stage_shares(curriculum)
    # A tenth of a step against rounding of a share that is a whole number of steps.
    lengths = [int(steps * share + 0.1) for share in shares]
    lengths.append(steps - sum(lengths))
    if min(lengths) < 1:
        few = ", ".join(f"{share:.2g}" for share in (*shares, last))
        raise CoconutError(f"--budget: {steps} steps are too few for the stages of a method, whose shares are {few}")
    return lengths


def bindings_of(lengths: Sequence[int]) -> tuple[str, ...]:
    """The gin bindings that give the stages of a curriculum these steps.

    Args:
      lengths: steps of each stage; all but the first and the last are equal.
    """
    first, last = lengths[0], lengths[-1]
    middle = lengths[1] if len(lengths) > 2 else first
    values = {
        "steps_per_stage": middle,
        "first_stage_factor": first / middle if len(lengths) > 1 else 1.0,
        "last_stage_factor": last / middle if len(lengths) > 1 else 1.0,
        **dict.fromkeys(("epochs_per_stage", "total_epochs", "advance_metric", "advance_below", "advance_above")),
    }
    return tuple(f"CurriculumConfig.{field} = {value!r}" for field, value in values.items())


def measure_steps(
    config: RunConfig, minutes: float, workdir: Path, *, dataset: Dataset, console: Console | None = None
) -> int | None:
    """The steps that a run takes in so many minutes, by a short run of it.

    Args:
      config: the run, with its own curriculum.
      minutes: of training.
      workdir: of the short run; it is removed.
      dataset: its data.
      console: where the progress bar goes.

    Returns:
      The steps, at least one; None where the measurement was interrupted.
    """
    curriculum = dataclasses.replace(
        config.curriculum,
        steps_per_stage=MEASURED_STEPS,
        first_stage_factor=1.0,
        last_stage_factor=1.0,
        epochs_per_stage=None,
        total_epochs=None,
        advance_metric=None,
        advance_below=None,
        advance_above=None,
    )
    short = dataclasses.replace(
        config, curriculum=curriculum, evaluate_every=None, save_every=None, log_every=STEPS_TO_START
    )
    remove(workdir)
    result = train(short, workdir, dataset=dataset, console=console)
    if not result.progress.finished:
        return None
    lines = [json.loads(line) for line in read_text(workdir / "metrics.jsonl").splitlines()]
    remove(workdir)
    # Stage -> seconds of the run at each of its lines.
    seconds: dict[int, list[float]] = {}
    for line in lines:
        if line["kind"] == "train":
            seconds.setdefault(line["stage"], []).append(line["seconds"])
    costs = [(own[-1] - own[0]) / (MEASURED_STEPS - STEPS_TO_START) for own in seconds.values()]
    mean = sum(share * cost for share, cost in zip(stage_shares(config.curriculum), costs, strict=True))
    return max(1, int(60 * minutes / mean))
