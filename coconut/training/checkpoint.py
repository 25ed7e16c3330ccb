"""Checkpoints; the one module that knows Orbax."""

import contextlib
import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from coconut.errors import CoconutError
from coconut.methods import get_method
from coconut.model import Model, Parameters, Template, parameters_of, part_of
from coconut.models.config import ExecutionConfig
from coconut.models.stacking import in_layout_of
from coconut.sharding import placed
from coconut.storage import storage_errors
from coconut.storage_path import StoragePath, is_remote
from coconut.training.run import Run
from coconut.training.state import TrainState, fresh_model

Which = Literal["best", "latest"]
NOT_VALIDATED = -1.0


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
      skipped: steps of the run that were skipped because a gradient was not finite.
      skipped_in_a_row: how many of them were its last steps.
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
    finished: bool = False
    stages: tuple[Mapping[str, Any], ...] = ()

    def end_stage(self, outcome: Mapping[str, Any], *, finished: bool) -> "Progress":
        """The stage is over. A checkpoint saved here is still of this stage."""
        stages = (*self.stages, dict(outcome))
        return dataclasses.replace(self, stage_ended=True, finished=finished, stages=stages)

    def next_stage(self) -> "Progress":
        """The next stage begins."""
        return dataclasses.replace(self, stage=self.stage + 1, stage_step=0, stage_ended=False)


class Checkpoints:
    """The checkpoints of one workdir: the latest few and the best.

    A later stage is always better than an earlier one, whatever its accuracy: stage 0 reasons in language. Of one
    stage the most accurate on the validation split is best, and of equals the latest.
    """

    def __init__(self, workdir: StoragePath, *, keep_latest: int = 2, read_only: bool = False):
        self._folder = workdir / "checkpoints"
        policy = AnyPreservationPolicy([LatestN(keep_latest), BestN(get_metric_fn=_rank, n=1)])
        self._manager = ocp.CheckpointManager(
            self._folder if is_remote(workdir) else self._folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                best_fn=_rank,
                preservation_policy=policy,
                read_only=read_only,
                create=not read_only,
                cleanup_tmp_directories=not read_only,
                enable_async_checkpointing=False,
            ),
            item_handlers={"state": ocp.PyTreeCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()},
        )

    def save(self, state: TrainState, progress: Progress, validation: Mapping[str, float]) -> None:
        """Saves, and returns when the checkpoint is on disk, or in the object store.

        Args:
          state: the arrays.
          progress: the rest.
          validation: metrics of the validation split; ``accuracy`` ranks checkpoints of one stage. May be empty.

        Raises:
          CoconutError: a metric is not finite (Orbax would drop the best checkpoint), or the disk or the store refuses;
            earlier checkpoints stay as they are.
        """
        bad = {name: value for name, value in validation.items() if not math.isfinite(value)}
        if bad:
            raise CoconutError(f"validation metrics are not finite, and nothing was saved: {bad}")
        metrics = {"stage": float(progress.stage), "accuracy": validation.get("accuracy", NOT_VALIDATED)}
        try:
            self._manager.save(
                progress.step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(_tree(state)),
                    progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
                ),
                metrics=metrics,
                force=True,
            )
            self._manager.wait_until_finished()
        except (ValueError, *storage_errors(self._folder)) as error:
            # tensorstore reports a full disk as a ValueError.
            raise CoconutError(f"the checkpoint of step {progress.step} could not be saved: {error}") from error

    def step(self, which: Which) -> int | None:
        """The step of the best checkpoint or of the latest; None where there is none."""
        if which == "best" and (best := self._manager.best_step()) is not None:
            return best
        return self._manager.latest_step()

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, Progress]:
        """The arrays and the rest of one checkpoint.

        Args:
          step: a step that was saved.
          abstract: shapes and dtypes that are expected. Layers may be stacked there and one by one in the checkpoint,
            or the other way around.

        Raises:
          CoconutError: the checkpoint holds other arrays; the message names the first.
        """
        items, progress = self._restore(step, _tree(abstract))
        return TrainState(**items), progress

    def restore_parameters(
        self, step: int, abstract: Parameters, left_out: Collection[str] = ()
    ) -> tuple[Parameters, Progress]:
        """The parameters of one checkpoint without its optimizer, and the rest.

        Args:
          step: a step that was saved.
          abstract: shapes and dtypes that are expected. Layers may be stacked there and one by one in the checkpoint,
            or the other way around.
          left_out: names of parts that the checkpoint may hold besides.

        Raises:
          CoconutError: the checkpoint holds other parameters; the message names the first.
        """
        items, progress = self._restore(step, {"parameters": abstract}, left_out)
        return items["parameters"], progress

    def _restore(
        self, step: int, expected: dict[str, Any], left_out: Collection[str] = ()
    ) -> tuple[dict[str, Any], Progress]:
        names = self._manager.item_metadata(step)["state"].tree["parameters"].keys()
        wanted, expected = expected, in_layout_of(names, expected)
        self._check(step, expected, left_out)
        restored: Any = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    item=expected,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(expected),
                    partial_restore=True,
                ),
                progress=ocp.args.JsonRestore(),
            ),
        )
        progress = Progress(**{**restored.progress, "stages": tuple(restored.progress["stages"])})
        if expected is wanted:
            return restored.state, progress
        # Stacked there and one by one here, or the other way around.
        places = jax.tree.map(lambda x: x.sharding, wanted)
        change = jax.jit(lambda tree: in_layout_of(wanted["parameters"], tree), out_shardings=places)
        return change(restored.state), progress

    def close(self) -> None:
        """Waits for Orbax's threads."""
        self._manager.close()

    def _check(self, step: int, expected: Any, left_out: Collection[str]) -> None:
        """Orbax would pad or cast what does not fit, and leave out what nobody asked for: compare first."""
        metadata = self._manager.item_metadata(step)["state"]
        saved = {_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(metadata.tree)[0]}
        for path, leaf in jax.tree_util.tree_flatten_with_path(expected)[0]:
            name = _path(path)
            if name not in saved:
                raise CoconutError(f"{self._folder / str(step)}: array {name!r} is missing")
            there, here = (tuple(saved[name].shape), str(saved[name].dtype)), (tuple(leaf.shape), str(leaf.dtype))
            if there != here:
                raise CoconutError(f"{self._folder / str(step)}: array {name!r} is {there} there, {here} here")
        for name in metadata.tree["parameters"].keys() - expected["parameters"].keys():
            if part_of(name) not in left_out:
                raise CoconutError(f"{self._folder / str(step)}: parameter {name!r} is none of this run's model")


def load_model(
    workdir: StoragePath,
    which: Which = "best",
    mesh: Mesh | None = None,
    *,
    execution: ExecutionConfig | None = None,
    train_only: bool = False,
) -> tuple[Run, Model, Progress]:
    """A trained model, with the run it comes from and the stage it has reached.

    Args:
      workdir: of the run.
      which: the best checkpoint by validation, or the latest.
      mesh: devices to put the parameters on, whatever mesh they were trained on; None for the default device.
      execution: how its decoder is run; None for as in training.
      train_only: load the parts that only training needs, too.

    Raises:
      CoconutError: the workdir holds no run, no checkpoint, or one that does not fit.
    """
    run = Run.load(workdir)
    if execution is not None:
        run = dataclasses.replace(run, config=dataclasses.replace(run.config, execution=execution))
    left_out = frozenset() if train_only else get_method(run.config.method).train_only
    abstract = jax.eval_shape(lambda: fresh_model(run.config))
    abstract = abstract._replace(parts={name: part for name, part in abstract.parts.items() if name not in left_out})
    template, expected = Template.of(abstract), parameters_of(abstract)
    if mesh is not None:
        expected = placed(expected, template.axes, mesh)
    with contextlib.closing(Checkpoints(workdir, read_only=True)) as checkpoints:
        step = checkpoints.step(which)
        if step is None:
            raise CoconutError(f"{workdir} holds no checkpoint")
        parameters, progress = checkpoints.restore_parameters(step, expected, left_out)
    # Orbax gives numpy's arrays where it was told no device.
    return run, template.model(jax.tree.map(jnp.asarray, parameters)), progress


def _rank(metrics: Mapping[str, float]) -> float:
    return 2 * metrics["stage"] + metrics["accuracy"]


def _tree(state: TrainState) -> dict[str, Any]:
    return {"parameters": state.parameters, "opt_state": state.opt_state, "step": state.step}


def _path(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
