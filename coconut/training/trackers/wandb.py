"""Weights & Biases. Its own variables say who, where and how: ``WANDB_API_KEY``, ``WANDB_ENTITY``, ``WANDB_MODE``."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coconut.errors import CoconutError
from coconut.training.trackers.writer import Outcome, TrackedRun, register_metrics_writer

FINISH_TIMEOUT = 300
"""Seconds to wait for uploads at the end, unless ``WANDB_FINISH_TIMEOUT`` says: W&B itself waits without an end."""


class WandbWriter:
    """Writes to a run of W&B, whose step is the optimizer's.

    W&B takes no step lower than its last one, and cannot take back what it has. Online it says at which step its run
    stands, and gets what is behind it.

    Offline it cannot go on with a run: each start writes a folder of its own, ``WORKDIR/wandb/offline-run-..``. Each is
    given the whole run, under the same id, so the newest one holds everything: ``wandb sync WORKDIR/wandb/latest-run``.
    A workdir in an object store has them in ``./wandb``.
    """

    def __init__(self, run: TrackedRun, run_id: str | None) -> None:
        import wandb
        from wandb.errors import AuthenticationError, UsageError

        timeout = float(os.environ.get("WANDB_FINISH_TIMEOUT", FINISH_TIMEOUT))
        try:
            self._run: Any = wandb.init(
                project=run.project or os.environ.get("WANDB_PROJECT", "coconut"),
                id=run_id,
                name=run.name,
                tags=run.tags,
                config={**run.config, **run.provenance},
                # What it is run with may have changed since the run began.
                allow_val_change=True,
                dir=run.workdir if isinstance(run.workdir, Path) else None,
                resume="allow",
                reinit="create_new",
                settings=wandb.Settings(finish_timeout=timeout),
            )
        except (UsageError, AuthenticationError) as error:
            raise CoconutError(f"W&B: {error} (WANDB_MODE=offline needs no account)") from error
        self.run_id: str | None = self._run.id
        self.last_step = self._run.starting_step - 1 if self._run.resumed else -1
        self._table: Any = wandb.Table

    def write(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, Sequence[str]]) -> None:
        """Logs numbers, and texts as tables of a line each.

        What comes of a step that W&B has closed stands one step later: of the step at which the run was stopped, the
        validation may still be to come.
        """
        if step < self.last_step:
            return
        tables = {name: self._table(columns=["line"], data=[[line] for line in lines]) for name, lines in texts.items()}
        self._run.log({**numbers, **tables}, step=max(step, self.last_step + 1))

    def flush(self) -> None:
        """Nothing: a process of W&B's own writes and uploads, also after this one was killed."""

    def close(self, outcome: Outcome) -> None:
        """Waits for the uploads. A run that was stopped is ``preempting`` there, one that failed ``failed``."""
        if outcome == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if outcome == "finished" else 1)


register_metrics_writer("wandb", WandbWriter, package="wandb")
