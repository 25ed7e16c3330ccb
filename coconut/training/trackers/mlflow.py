"""MLflow. Its own variable says where: ``MLFLOW_TRACKING_URI``, a server's address or ``sqlite:///FILE``."""

import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from coconut.training.trackers.writer import Outcome, TrackedRun, register_metrics_writer

LOG = logging.getLogger(__name__)

MOST_PARAMETERS = 100
"""That MLflow takes at once."""
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
STEP = "step"
"""A metric of each step, and the last that is written of it: the run in MLflow says by it how far it is."""


class MlflowWriter:
    """Writes to a run of MLflow: the config as parameters, method, seed, commit and tags as tags, samples as artifacts.

    MLflow keeps a step that is logged again beside the first, so it gets each once.
    """

    def __init__(self, run: TrackedRun, run_id: str | None) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._client, self._metric = MlflowClient(), Metric
        self.last_step = -1
        known = None if run_id is None else self._known(run_id)
        if known is not None:
            self.run_id = known.info.run_id
            self.last_step = int(known.data.metrics.get(STEP, -1))
            self._client.update_run(self.run_id, status="RUNNING")
            return
        project = run.project or os.environ.get("MLFLOW_EXPERIMENT_NAME", "coconut")
        tags = {name: str(run.config[name]) for name in ("method", "seed")}
        tags |= {
            "commit": str(run.provenance["commit"]),
            "workdir": str(run.workdir),
            **dict.fromkeys(run.tags, "true"),
        }
        created = self._client.create_run(self._experiment(project), run_name=run.name, tags=tags)
        self.run_id: str = created.info.run_id
        parameters = [Param(name, str(value)) for name, value in _leaves(run.config)]
        for first in range(0, len(parameters), MOST_PARAMETERS):
            self._client.log_batch(self.run_id, params=parameters[first : first + MOST_PARAMETERS])
        self._client.log_text(self.run_id, json.dumps(run.provenance, indent=1), "provenance.json")

    def write(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, Sequence[str]]) -> None:
        """Logs numbers in one call, then texts as files ``rollouts/rollouts/STEP.txt``."""
        now = int(1000 * time.time())
        named = [(re.sub(r"[^\w\-. :/]", "_", name), number) for name, number in numbers.items()]
        metrics = [self._metric(name, number, now, step) for name, number in (*named, (STEP, step))]
        for name, lines in texts.items():
            self._client.log_text(self.run_id, "\n".join(lines), f"{name}/{step}.txt")
        self._client.log_batch(self.run_id, metrics=metrics)

    def flush(self) -> None:
        """Nothing: each call returns when the server has it."""

    def close(self, outcome: Outcome) -> None:
        """Says how it ended."""
        self._client.set_terminated(self.run_id, STATUS[outcome])

    def _experiment(self, project: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(project)
        if found is None:
            try:
                return self._client.create_experiment(project)
            except MlflowException:
                # Another cell of the same sweep was faster.
                found = self._client.get_experiment_by_name(project)
                if found is None:
                    raise
        return found.experiment_id

    def _known(self, run_id: str) -> Any:
        """The run that was written to before; None where this MLflow does not know it."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            LOG.warning("MLflow at %s has no run %s: a new one is made", self._client.tracking_uri, run_id)
            return None


def _leaves(config: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a config with their dotted names."""
    if not isinstance(config, Mapping):
        yield name, config
        return
    for key, value in config.items():
        yield from _leaves(value, f"{name}.{key}" if name else key)


register_metrics_writer("mlflow", MlflowWriter, package="mlflow")
