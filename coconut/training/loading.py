"""A trained model out of a workdir, in which another process may still be training."""

import contextlib
import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from coconut.errors import CoconutError, check_fields
from coconut.model import Model, Parameters, Template, parameters_of
from coconut.models.config import DTYPES, DecoderConfig, ExecutionConfig
from coconut.models.decoder import Decoder
from coconut.models.parameters import abstract_decoder, decoder_of, decoder_parameters
from coconut.sharding import placed
from coconut.storage_path import StoragePath
from coconut.training.checkpoint import Checkpoints, Which
from coconut.training.progress import Progress
from coconut.training.run import BY_NAME, Run, folder_of_run
from coconut.training.state import fresh_model, train_only_parts


@no_type_check  # Its own checks name the field and the value
@dataclasses.dataclass(frozen=True, kw_only=True)
class Numerics:
    """The numbers in which a trained model is kept and computed, where they are not those of its training.

    Parameters in bfloat16 that are computed with in float32 need the memory of the one and round like the other: each
    matrix is widened where it is used, which is exact. It is what Yuan et al. 2025 ("Give me FP32 or give me death?")
    call LayerCast, by which an answer depends on batch size and devices far less than in bfloat16.

    Attributes:
      dtype: of activations and matrix products; None for the run's own. Where float32 is asked for here, products are
        exact in it on every device (`products`).
      param_dtype: what parameters are rounded to when they were read; None for what they are stored in. A parameter
        that a decoder always keeps wider, such as a router's, stays so.

    Raises:
      CoconutError: an unknown dtype; the message names the field and the value.
    """

    dtype: str | None = None
    param_dtype: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for field in ("dtype", "param_dtype"):
            if (value := getattr(self, field)) not in (None, *DTYPES):
                raise CoconutError(f"Numerics.{field} = {value!r}: must be one of {', '.join(DTYPES)}")
            if value == "float64" and not jax.config.read("jax_enable_x64"):
                raise CoconutError(f"Numerics.{field} = 'float64': JAX needs JAX_ENABLE_X64=1 for it")

    def decoder(self, config: DecoderConfig) -> DecoderConfig:
        """The config of a decoder whose parameters are kept so."""
        return config if self.param_dtype is None else dataclasses.replace(config, param_dtype=self.param_dtype)

    def execution(self, config: ExecutionConfig) -> ExecutionConfig:
        """How a decoder is run that computes so.

        Raises:
          CoconutError: an implementation that ``config`` asks for does not compute so.
        """
        return config if self.dtype is None else dataclasses.replace(config, dtype=self.dtype)

    def of(self, decoder: Decoder) -> Decoder:
        """A decoder without adapters, kept and computed so."""
        config, execution = self.decoder(decoder.config), self.execution(decoder.execution)
        expected = decoder_parameters(abstract_decoder(config, execution))
        own = {name: x.astype(expected[name].dtype) for name, x in decoder_parameters(decoder).items()}
        return decoder_of(config, execution, own)

    def products(self) -> contextlib.AbstractContextManager[object]:
        """In it, matrix products of float32 are as exact as float32 where that was asked for.

        JAX makes them of bfloat16 on a TPU and of TF32 on a GPU if it is not told otherwise.
        """
        wide = self.dtype in ("float32", "float64")
        return jax.default_matmul_precision("highest") if wide else contextlib.nullcontext()


def load_model(
    workdir: StoragePath | str,
    which: Which | int = "best",
    mesh: Mesh | None = None,
    *,
    execution: ExecutionConfig | None = None,
    numerics: Numerics = Numerics(),
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
      numerics: the numbers it is kept and computed in; the run that is returned says so, too.
      train_only: load the parts that only training needs, too.
      verify: compare every file of the checkpoint with its SHA-256.

    Raises:
      CoconutError: the workdir holds no run, no checkpoint that is whole, or one that does not fit.
    """
    workdir = folder_of_run(workdir)
    run = Run.load(workdir)
    saved = run
    stored = dataclasses.replace(run.config, execution=numerics.execution(execution or run.config.execution))
    run = dataclasses.replace(run, config=dataclasses.replace(stored, decoder=numerics.decoder(stored.decoder)))
    left_out = frozenset() if train_only else train_only_parts(run.config)

    def without_those(model: Model) -> Model:
        return model._replace(parts={name: part for name, part in model.parts.items() if name not in left_out})

    abstract, as_stored = (
        without_those(jax.eval_shape(lambda config=config: fresh_model(config))) for config in (run.config, stored)
    )
    template, wanted, expected = Template.of(abstract), parameters_of(abstract), parameters_of(as_stored)
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
    kept = {name: jnp.asarray(value).astype(wanted[name].dtype) for name, value in parameters.items()}
    return run, template.model(kept), progress
