"""The ways to run a step that a slice allows, tried one by one: meshes, and for each microbatches and remat."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from coconut.commands.plan.hardware import Slice
from coconut.commands.plan.planning import Columns, Plan, make_plan
from coconut.errors import CoconutError
from coconut.mesh import MeshConfig
from coconut.models.config import Remat
from coconut.training.config import RunConfig


def search(
    config: RunConfig,
    where: Slice,
    columns: Columns,
    report: Callable[[MeshConfig, RunConfig, Plan | CoconutError], None],
    mesh: MeshConfig | None = None,
) -> list[tuple[RunConfig, Plan]]:
    """For each mesh the first of its `ways` that fits, or the last one, which does not.

    Args:
      config: the run; other microbatches and another remat take the place of its own.
      where: the slice.
      columns: of the batch.
      report: told how each way went.
      mesh: the only one to try; None for all `meshes`.

    Returns:
      Runs with the microbatches and the remat that were found, and their plans, the best first.

    Raises:
      CoconutError: no mesh is allowed; the message is that of the last one tried.
    """
    found: list[tuple[RunConfig, Plan]] = []
    refused: CoconutError | None = None
    for tried in meshes(len(where.devices)) if mesh is None else [_whole(mesh, len(where.devices))]:
        last: tuple[RunConfig, Plan] | None = None
        for way in ways(config, tried):
            try:
                last = way, make_plan(way, where, tried, columns)
            except CoconutError as error:  # A mesh that splits no heads, or fewer rows than shards.
                refused = error
                report(tried, way, error)
                break
            report(tried, *last)
            if last[1].fits:
                break
        found += [] if last is None else [last]
    if not found and refused is not None:
        raise refused
    return sorted(found, key=lambda one: _rank(one[1]))


def _whole(mesh: MeshConfig, devices: int) -> MeshConfig:
    """The mesh with the ``data`` that its other axes leave."""
    if mesh.data is not None:
        return mesh
    return dataclasses.replace(mesh, data=max(devices // (mesh.fsdp * mesh.sequence * mesh.tensor), 1))


def _rank(plan: Plan) -> tuple[bool, float]:
    """Plans that fit come first, the fastest before the others; then those that lack the least memory."""
    assert plan.cost is not None or not plan.fits
    seconds = plan.cost.roofline.expected if plan.cost is not None else 0.0
    return not plan.fits, seconds if plan.fits else float(sum(plan.memory.values()))


def meshes(devices: int) -> Iterator[MeshConfig]:
    """Meshes of all devices: ``tensor`` and ``data`` powers of two up to 8, ``fsdp`` what is left, no ``sequence``."""
    powers = [2**power for power in range(4)]
    for tensor, data in itertools.product(powers, powers):
        if devices % (tensor * data) == 0:
            yield MeshConfig(data=data, fsdp=devices // (tensor * data), tensor=tensor)


def ways(config: RunConfig, mesh: MeshConfig) -> Iterator[RunConfig]:
    """The run with other microbatches and remat, from what is meant to be fastest to what needs least memory.

    Each microbatch gathers every matrix that ``fsdp`` splits once more, where recomputing costs a third more arithmetic
    at most. So with ``fsdp`` all is recomputed before there is a second microbatch; without it microbatches come first.

    Args:
      config: the run.
      mesh: its devices; ``data`` is given.
    """
    assert mesh.data is not None
    rows = config.pipeline.batch_size // (mesh.data * mesh.fsdp)
    parts = [count for count in (2**power for power in range(max(rows, 1).bit_length())) if rows % count == 0]
    remats: tuple[Remat, ...] = ("none", "dots", "full")
    if mesh.fsdp > 1:
        tried = [*((remat, 1) for remat in remats), *(("full", count) for count in parts[1:])]
    else:
        tried = [(remat, count) for remat in remats for count in parts]
    for remat, count in tried:
        execution = dataclasses.replace(config.execution, remat=remat)
        yield dataclasses.replace(config, execution=execution, microbatches=count)
