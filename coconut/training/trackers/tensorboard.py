"""TensorBoard: event files in ``WORKDIR/tensorboard``."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from coconut.storage import exists, read_text, write_atomically
from coconut.training.trackers.writer import Outcome, TrackedRun, register_metrics_writer


class TensorBoardWriter:
    """Writes event files; those of each start of a run are files of their own, which TensorBoard reads as one.

    It is told at which step they go on (``purge_step``), and leaves out what files of before hold from there on. A file
    beside them says up to which step they are whole.
    """

    run_id = None

    def __init__(self, run: TrackedRun, run_id: str | None) -> None:
        from tensorboardX import SummaryWriter

        del run_id
        folder = run.workdir / "tensorboard"
        self._mark = folder / "last_step"
        self.last_step = min(int(read_text(self._mark)), run.start) if exists(self._mark) else -1
        self._written = self.last_step
        going_on = self.last_step + 1
        # The rest of a file's name is the second it was opened in, of which there may be two.
        self._writer: Any = SummaryWriter(str(folder), purge_step=going_on, filename_suffix=f".{going_on}")
        if self.last_step < 0:
            about = {"config": run.config, "tags": run.tags, **run.provenance}
            self._writer.add_text("run", _as_code(json.dumps(about, indent=1).splitlines()), 0)

    def write(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, Sequence[str]]) -> None:
        """Adds scalars and texts."""
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)
        for name, lines in texts.items():
            self._writer.add_text(name, _as_code(lines), step)
        self._written = step

    def flush(self) -> None:
        """Returns when the events are in their file."""
        self._writer.flush()
        write_atomically(self._mark, str(self._written))

    def close(self, outcome: Outcome) -> None:
        """Closes the file."""
        del outcome
        self._writer.close()


def _as_code(lines: Sequence[str]) -> str:
    """TensorBoard reads Markdown."""
    return "\n".join(f"    {line}" for line in lines)


register_metrics_writer("tensorboard", TensorBoardWriter, package="tensorboardX")
