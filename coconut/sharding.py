"""Where arrays lie on a mesh of devices: one table from what an axis means to the mesh axis it is split over."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from coconut.types import CoconutError

MESH_AXES = ("data", "fsdp", "tensor")
"""Mesh axes: copies of the model, shards of every parameter, shards of every matrix product."""

RULES: Mapping[str, str | None] = MappingProxyType(
    {
        "layers": None,
        "positions": None,
        "head": None,
        "embed": "fsdp",
        "heads": "tensor",
        "mlp": "tensor",
        "vocabulary": "tensor",
    }
)
"""Logical axis -> the mesh axis it is split over, None for not split."""

PARAMETER_AXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "tokens.embedding": ("vocabulary", "embed"),
        "positions.embedding": ("positions", "embed"),
        "head.kernel": ("embed", "vocabulary"),
        **{f"{norm}.scale": ("embed",) for norm in ("norm", "attention_norm", "mlp_norm")},
        **{f"{norm}.bias": ("embed",) for norm in ("norm", "attention_norm", "mlp_norm")},
        **{f"{norm}.scale": ("head",) for norm in ("query_norm", "key_norm")},
        **{f"{norm}.bias": ("head",) for norm in ("query_norm", "key_norm")},
        **{f"{part}.kernel": ("embed", "heads") for part in ("query", "key", "value")},
        **{f"{part}.bias": ("heads",) for part in ("query", "key", "value")},
        **{f"{part}.kernel": ("embed", "mlp") for part in ("up", "gate")},
        **{f"{part}.bias": ("mlp",) for part in ("up", "gate")},
        "output.kernel": ("heads", "embed"),
        "output.bias": ("embed",),
        "down.kernel": ("mlp", "embed"),
        "down.bias": ("embed",),
    }
)
"""The last two parts of a parameter's name -> its logical axes, without that of stacked layers."""


def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over ``data * fsdp * tensor`` devices, whose partitioning XLA completes by itself.

    Raises:
      CoconutError: there are fewer devices than that, or a size is not positive.
    """
    sizes = (data, fsdp, tensor)
    if min(sizes) < 1:
        raise CoconutError(f"data = {data}, fsdp = {fsdp}, tensor = {tensor}: must be at least 1 each")
    devices = jax.devices() if devices is None else devices
    needed = int(np.prod(sizes))
    if needed > len(devices):
        raise CoconutError(
            f"data = {data}, fsdp = {fsdp}, tensor = {tensor} need {needed} devices, there are {len(devices)}"
        )
    axis_types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=axis_types, devices=devices[:needed])


def parameter_sharding(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where a parameter lies.

    Args:
      name: its dotted path, such as ``layers.0.attention.query.kernel``.
      shape: its shape; one axis more than in `PARAMETER_AXES` is that of stacked layers.
      mesh: a mesh of any of `MESH_AXES`; an axis it lacks counts as one of size 1.

    Raises:
      CoconutError: no axes are known for the name, the mesh has an axis of another name, or a size is not a multiple
        of the devices it is split over.
    """
    if unknown := [axis for axis in mesh.axis_names if axis not in MESH_AXES]:
        raise CoconutError(f"the mesh has axes {unknown}: only {', '.join(MESH_AXES)} are known")
    axes = PARAMETER_AXES.get(".".join(name.split(".")[-2:]))
    if axes is not None and len(shape) == len(axes) + 1:
        axes = ("layers", *axes)
    if axes is None or len(axes) != len(shape):
        raise CoconutError(f"parameter {name} of shape {shape}: coconut.sharding.PARAMETER_AXES knows no such axes")
    split = [RULES[axis] if RULES[axis] in mesh.axis_names else None for axis in axes]
    for dimension, (axis, over) in enumerate(zip(axes, split, strict=True)):
        if over is not None and shape[dimension] % mesh.shape[over]:
            raise CoconutError(
                f"parameter {name} of shape {shape}: dimension {dimension} ({axis}) is {shape[dimension]}, which is no "
                f"multiple of the mesh's {over} = {mesh.shape[over]}"
            )
    return NamedSharding(mesh, PartitionSpec(*split))
