"""A trained model out of a workdir, in which another process may still be training."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from coconut.errors import CoconutError
from coconut.model import Model, Parameters, Template, parameters_of
from coconut.models.config import ExecutionConfig
from coconut.sharding import placed
from coconut.storage_path import StoragePath
from coconut.training.checkpoint import Checkpoints, Which
from coconut.training.progress import Progress
from coconut.training.run import BY_NAME, Run, folder_of_run
from coconut.training.state import fresh_model, train_only_parts


def load_model(
    workdir: StoragePath | str,
    which: Which | int = "best",
    mesh: Mesh | None = None,
    *,
    execution: ExecutionConfig | None = None,
    train_only: bool = False,
    verify: bool = True,
) -> tuple[Run, Model, Progress]:
    """A trained model, with the run it comes from and the stage it has reached.

    Args:
      workdir: of the run; the folder of a quickstart stands for its Coconut run.
      which: the best checkpoint by validation, the latest, or that of a step. Where the best or the latest is damaged,
        the next one that is whole.
      mesh: devices to put the parameters on, whatever mesh they were trained on; None for the default device.
      execution: how its decoder is run; None for as in training.
      train_only: load the parts that only training needs, too.
      verify: compare every file of the checkpoint with its SHA-256.

    Raises:
      CoconutError: the workdir holds no run, no checkpoint that is whole, or one that does not fit.
    """
    workdir = folder_of_run(workdir)
    run = Run.load(workdir)
    saved = run
    if execution is not None:
        run = dataclasses.replace(run, config=dataclasses.replace(run.config, execution=execution))
    left_out = frozenset() if train_only else train_only_parts(run.config)
    abstract = jax.eval_shape(lambda: fresh_model(run.config))
    abstract = abstract._replace(parts={name: part for name, part in abstract.parts.items() if name not in left_out})
    template, expected = Template.of(abstract), parameters_of(abstract)
    if mesh is not None:
        expected = placed(expected, template.axes, mesh)
    curriculum = run.config.curriculum
    with contextlib.closing(Checkpoints(workdir, read_only=True, verify=verify)) as checkpoints:

        def read(step: int) -> tuple[Parameters, Progress]:
            parameters, progress = checkpoints.restore_parameters(step, expected, left_out)
            where = f"{workdir}: the checkpoint of step {step}"
            saved.check_checkpoint(checkpoints.manifest(step).run, where, BY_NAME)
            progress.check_stage(curriculum.first_stage, curriculum.final_stage, where)
            return parameters, progress

        found = checkpoints.newest_good(which, read)
    if found is None:
        raise CoconutError(f"{workdir} holds no checkpoint")
    parameters, progress = found
    # Orbax gives numpy's arrays where it was told no device.
    return run, template.model(jax.tree.map(jnp.asarray, parameters)), progress
