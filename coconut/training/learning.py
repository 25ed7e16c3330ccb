"""What a step learns from: the data's own pages, or the model's samples and what they are worth.

The train loop (`coconut.training.loop`) is the same for both: it asks for the views of a step and runs the step on
them.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import optax
from jax.sharding import Mesh

from coconut.methods import get_method
from coconut.methods.method import Method, Views
from coconut.model import Template
from coconut.sharding import put_rows
from coconut.training.config import RunConfig
from coconut.training.state import TrainState
from coconut.training.step import TrainStep, make_train_step

Measured = tuple[float, float]
"""What was measured on the host: a sum and its weight."""


class StepViews(NamedTuple):
    """What a step is given.

    Attributes:
      host: the batches as the data pipeline made them; several of them where a step took several.
      device: what the step learns from.
      metrics: what was measured on the host, as sums and weights.
    """

    host: tuple[Views, ...]
    device: Views
    metrics: Mapping[str, Measured]

    @property
    def examples(self) -> list[int]:
        """Ids of the examples of this process's rows; -1 for one that only fills a batch."""
        return [int(example) for views in self.host for example in views["main"].examples.flat]


@runtime_checkable
class Learning(Protocol):
    """What a step learns from.

    Attributes:
      method: writes the pages of the data pipeline, and has the loss of a step.
      step: the train step.
    """

    method: Method
    step: TrainStep

    def views(self, state: TrainState, batches: Iterator[Views], number: int) -> StepViews:
        """What step ``number``, counted from 0, is given.

        Args:
          state: before the step.
          batches: this process's rows of the data's batches, on the host; as many are taken as the step needs.
          number: steps taken before.
        """
        ...

    def abstract_views(self, state: TrainState, host: Views) -> Views:
        """The shapes of what a step is given, of a state that may be abstract itself."""
        ...

    def shown(self, state: TrainState, host: Views) -> Mapping[str, Any]:
        """What a line of the log shows of a batch that is always the same; empty for nothing."""
        ...

    def compile_seconds(self) -> float:
        """Seconds spent compiling since the last call, beside the step itself."""
        ...


class Imitation:
    """Learns to write what the data say."""

    def __init__(self, config: RunConfig, template: Template, optimizer: optax.GradientTransformation, mesh: Mesh):
        self.method, self._mesh, self._rows = get_method(config.method), mesh, config.pipeline.rows
        self.step = make_train_step(
            *(template, self.method, optimizer),
            options=config.options,
            microbatches=config.microbatches,
            spikes=config.spikes,
            correction_rate=config.optimizer.correction_rate,
        )

    def views(self, state: TrainState, batches: Iterator[Views], number: int) -> StepViews:
        """The next batch."""
        del state, number
        host = next(batches)
        return StepViews((host,), put_rows(host, self._mesh, self._rows), {})

    def abstract_views(self, state: TrainState, host: Views) -> Views:
        """The batch itself."""
        del state
        return put_rows(host, self._mesh, self._rows)

    def shown(self, state: TrainState, host: Views) -> Mapping[str, Any]:
        """Nothing."""
        del state, host
        return {}

    def compile_seconds(self) -> float:
        """None."""
        return 0.0
