"""Where a run stands, beside its arrays."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, no_type_check

from coconut.errors import CoconutError, check_fields


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands, beside its arrays. Saved with every checkpoint.

    Attributes:
      stage: the curriculum's stage.
      stage_step: optimizer steps taken in it.
      stage_ended: whether it is over.
      step: optimizer steps taken in the run.
      seconds: time spent training, without evaluation, compilation or saving.
      data: state of the data iterator.
      window: sums of the metrics since the last look at whether the stage is learnt.
      log: sums of the metrics since the last line of metrics.
      log_seconds: ``seconds`` at that line.
      skipped: steps of the run that were skipped because a gradient was not finite, or a spike.
      skipped_in_a_row: how many of them were its last steps.
      validation_due: whether the step was to be validated, and the run was stopped before it was.
      finished: whether the run is done.
      stages: how each stage went that has ended.
    """

    stage: int = 0
    stage_step: int = 0
    stage_ended: bool = False
    step: int = 0
    seconds: float = 0.0
    data: Mapping[str, Any] | None = None
    window: Mapping[str, list[float]] = dataclasses.field(default_factory=dict)
    log: Mapping[str, list[float]] = dataclasses.field(default_factory=dict)
    log_seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    validation_due: bool = False
    finished: bool = False
    stages: tuple[Mapping[str, Any], ...] = ()

    def end_stage(self, outcome: Mapping[str, Any], *, finished: bool) -> "Progress":
        """The stage is over. A checkpoint saved here is still of this stage."""
        stages = (*self.stages, dict(outcome))
        return dataclasses.replace(self, stage_ended=True, finished=finished, stages=stages)

    def next_stage(self) -> "Progress":
        """The next stage begins."""
        return dataclasses.replace(self, stage=self.stage + 1, stage_step=0, stage_ended=False)

    @classmethod
    def from_json(cls, content: Any, where: str) -> "Progress":
        """What `dataclasses.asdict` gave, back from JSON.

        Raises:
          CoconutError: a field is missing, unknown, of another type or out of its range; the message begins with
            ``where``.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(content, Mapping) or sorted(content) != sorted(names):
            raise CoconutError(f"{where}: progress must be an object of {', '.join(names)}")
        stages = content["stages"]
        progress = cls(**{**content, "stages": tuple(stages) if isinstance(stages, list) else stages})
        try:
            check_fields(progress)
            progress._check_ranges()
        except CoconutError as error:
            raise CoconutError(f"{where}: {error}") from error
        return progress

    def _check_ranges(self) -> None:
        def reject(name: str, why: str) -> None:
            raise CoconutError(f"Progress.{name} = {getattr(self, name)!r}: {why}")

        for name in ("stage", "stage_step", "step", "seconds", "log_seconds", "skipped", "skipped_in_a_row"):
            if not 0 <= getattr(self, name) < math.inf:
                reject(name, "must be a number of at least 0")
        for name, most in (("stage_step", "step"), ("skipped", "step"), ("skipped_in_a_row", "skipped")):
            if getattr(self, name) > getattr(self, most):
                reject(name, f"must be at most {most} = {getattr(self, most)}")
        for name in ("window", "log"):
            for key, pair in getattr(self, name).items():
                if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, float) for x in pair)):
                    reject(name, f"{key!r} must be a sum and a weight")

    def check_stage(self, first: int, final: int, where: str) -> None:
        """Looks whether the run's curriculum has this stage.

        Raises:
          CoconutError: it has not; training would go on for ever.
        """
        if not first <= self.stage <= final or (self.finished and self.stage != final):
            ended = ", finished" if self.finished else ""
            raise CoconutError(f"{where}: stage = {self.stage}{ended}: the curriculum has stages {first} to {final}")
