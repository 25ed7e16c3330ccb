"""The meshes that a slice and a run allow, tried one by one."""

import itertools
from collections.abc import Callable, Iterator

from coconut.commands.plan.hardware import Slice
from coconut.commands.plan.planning import Columns, Plan, make_plan
from coconut.errors import CoconutError
from coconut.mesh import MeshConfig
from coconut.training.config import RunConfig


def search(
    config: RunConfig, where: Slice, columns: Columns, report: Callable[[MeshConfig, Plan | CoconutError], None]
) -> list[Plan]:
    """Plans of every mesh the slice and the run allow, those that fit first, the fastest before the others.

    Args:
      config: the run.
      where: the slice.
      columns: of the batch.
      report: told how each mesh went.

    Raises:
      CoconutError: no mesh is allowed; the message is that of the last one tried.
    """
    plans: list[Plan] = []
    refused: CoconutError | None = None
    for mesh in meshes(len(where.devices)):
        try:
            plans.append(make_plan(config, where, mesh, columns))
        except CoconutError as error:
            refused = error
            report(mesh, error)
        else:
            report(mesh, plans[-1])
    if not plans and refused is not None:
        raise refused
    return sorted(plans, key=lambda plan: (not plan.fits, plan.cost.roofline.expected if plan.cost else 0.0))


def meshes(devices: int) -> Iterator[MeshConfig]:
    """Meshes of all devices: ``tensor`` and ``data`` powers of two up to 8, ``fsdp`` what is left, no ``sequence``."""
    powers = [2**power for power in range(4)]
    for tensor, data in itertools.product(powers, powers):
        if devices % (tensor * data) == 0:
            yield MeshConfig(data=data, fsdp=devices // (tensor * data), tensor=tensor)
