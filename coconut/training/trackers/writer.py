"""Where the numbers of a run go beside its workdir. Writers have a register: somebody's own is one more entry.

``metrics.jsonl`` is what a tracker mirrors. A writer says what its tracker holds already, and is given the rest: what
the run logged before, and what it logs now. So no step is there twice or missing after a kill, a tracker that failed
for a while gets what it lacks at the next start, and one may be turned on late.
"""

import dataclasses
import difflib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from coconut.errors import CoconutError, check_fields
from coconut.storage_path import StoragePath

Outcome = Literal["finished", "stopped", "failed"]
"""How a start of a run ended: at its end, by a signal before, or by an error."""


@runtime_checkable
class MetricsWriter(Protocol):
    """What writes to a tracker, made for one start of a run and used by its first process alone.

    What it raises while the run trains ends its own work until the next start, never the training.
    """

    @property
    def run_id(self) -> str | None:
        """By which it finds its run in the tracker again; kept in the workdir. None where it needs none."""
        ...

    @property
    def last_step(self) -> int:
        """The last optimizer step that its run in the tracker held when it was opened; -1 for none.

        It is given all steps behind this one.
        """
        ...

    def write(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, Sequence[str]]) -> None:
        """Takes all that is logged of a step.

        Args:
          step: optimizer steps taken; it does not fall from call to call.
          numbers: finite, named ``train/loss`` and ``validation/accuracy``.
          texts: lines of samples, named likewise.
        """
        ...

    def flush(self) -> None:
        """Called when a checkpoint is saved: a run that is killed later goes on behind what was written so far."""
        ...

    def close(self, outcome: Outcome) -> None:
        """The last call."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker is told of a run.

    Attributes:
      workdir: of the run.
      start: optimizer steps taken when it was started; later ones are logged, or logged again.
      name: to show.
      project: to file it under; None for what the environment says, or ``coconut``.
      tags: words to find it by.
      config: the resolved `coconut.training.config.RunConfig` as JSON; ``method`` and ``seed`` are among its fields.
      provenance: commit, hardware, versions (`coconut.provenance.provenance`).
    """

    workdir: StoragePath
    start: int
    name: str
    project: str | None
    tags: tuple[str, ...]
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]


MakeWriter = Callable[[TrackedRun, str | None], MetricsWriter]
"""(run, the ``run_id`` of its writer before or None) -> its writer.

A `CoconutError` that it raises says that the tracker is set up wrongly, and ends the command. Any other exception is a
tracker that cannot be reached: the run is trained without it.
"""


@dataclasses.dataclass(frozen=True)
class _Kind:
    make: MakeWriter
    package: str | None


WRITERS: dict[str, _Kind] = {}
"""By name: how a writer is made, and the package it needs, which the extra of that name installs."""


def register_metrics_writer(name: str, make: MakeWriter, *, package: str | None = None) -> None:
    """Adds a writer, which ``TrackingConfig.writers`` names.

    Args:
      name: of the writer.
      make: makes it.
      package: for writers that come with coconut: the module that the extra ``name`` installs.

    Raises:
      CoconutError: the name is taken.
    """
    if name in WRITERS:
        raise CoconutError(f"a metrics writer named {name!r} is registered already")
    WRITERS[name] = _Kind(make, package)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where the metrics of a run go beside ``metrics.jsonl``. A run may go on with another one.

    Attributes:
      writers: names of writers: ``tensorboard``, ``wandb``, ``mlflow``, or one that `register_metrics_writer` knows.
      project: W&B's project, MLflow's experiment; None for what the environment says (``WANDB_PROJECT``,
        ``MLFLOW_EXPERIMENT_NAME``), or ``coconut``.
      name: of the run in a tracker; None for the last two parts of its workdir's path.
      tags: words to find it by.

    Raises:
      CoconutError: a writer is unknown or named twice, or a value has the wrong type.
    """

    writers: tuple[str, ...] = ()
    project: str | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        for name in self.writers:
            if name not in WRITERS:
                nearest = difflib.get_close_matches(name, WRITERS, 1, 0.0)[0]
                raise CoconutError(
                    f"TrackingConfig.writers = {self.writers!r}: none is named {name!r}, did you mean {nearest!r}? "
                    f"(known: {', '.join(WRITERS)}; your own: --import MODULE)"
                )
        if len(set(self.writers)) < len(self.writers):
            raise CoconutError(f"TrackingConfig.writers = {self.writers!r}: each may be named once")

    def also(self, writer: str) -> "TrackingConfig":
        """This one, with a further writer where it is not among them."""
        return self if writer in self.writers else dataclasses.replace(self, writers=(*self.writers, writer))

    def check_packages(self) -> None:
        """Looks whether the writers' packages are there; whoever only reads the run needs none.

        Raises:
          CoconutError: one is missing; the message names the extra.
        """
        for name in self.writers:
            package = WRITERS[name].package
            if package is not None and importlib.util.find_spec(package) is None:
                raise CoconutError(
                    f"TrackingConfig.writers = {self.writers!r}: {name} needs `pip install coconut-jax[{name}]`"
                )
