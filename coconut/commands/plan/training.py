"""What `coconut train` says of its own step where a plan of it would promise little."""

import logging
import time
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from coconut.commands.plan.advice import faster
from coconut.commands.plan.cost import cost_of
from coconut.commands.plan.hardware import slice_of
from coconut.commands.plan.planning import model_flops
from coconut.training.config import RunConfig
from coconut.types import Schedule

LOG = logging.getLogger(__name__)

ENOUGH = 0.35
"""Model FLOPs utilisation above which nothing is said."""


def look_at_step(config: RunConfig, mesh: Mesh, schedules: Sequence[Schedule], step: jax.stages.Compiled) -> None:
    """Warns where a compiled train step can use little of its chips, and says what would help most.

    The same figures as those of `coconut plan`: a roofline of the program, nothing measured. Devices whose peak figures
    are not known are left alone, and so are several slices, steps on samples and frozen decoders, packed rows, and a
    program whose text is not understood.

    Args:
      config: the run.
      mesh: its devices.
      schedules: the spans of the batches of a step.
      step: the program.
    """
    # A plan knows no steps on samples, which have other rows, and no frozen decoder, which takes less arithmetic.
    if config.drawing is not None or config.adapter is not None or config.freeze or jax.process_index():
        return
    if config.pipeline.examples_per_row > 1:  # Nor columns that see a part of those before them.
        return
    where = slice_of(mesh.devices.flatten().tolist())
    if where is None:
        return
    started = time.perf_counter()
    try:
        cost = cost_of(step, where)
    except (ValueError, LookupError, AssertionError) as error:  # Another compiler's text is no reason not to train.
        LOG.info("the text of the train step is not understood: %r", error)
        return
    if cost.is_doubtful:
        shares = (cost.found, cost.traffic_found)
        LOG.info("the text of the train step is not understood: %s and %s of what XLA counts were found", *shares)
        return
    times = cost.roofline
    needed = sum(model_flops(config.decoder, schedule, config.pipeline.batch_size) for schedule in schedules)
    utilisation = needed / (times.expected * len(where.devices) * where.chip.flops)
    advice = faster(config, mesh, times)
    LOG.info("reading the train step's program took %.1f s", time.perf_counter() - started)
    if utilisation < ENOUGH and advice is not None:
        LOG.warning(
            "a step on %s can use %.1f %% of the chips' peak for the model's own operations, bound by %s; what would "
            "help most: %s. See coconut plan",
            where.name,
            100 * utilisation,
            times.bound,
            advice,
        )
