"""Where arrays lie on a mesh of devices: one table from what an axis means to the mesh axes it is split over.

The logical axes of a parameter stand beside it (`coconut.models.parameters.parameter_axes`).

- ``data``: copies of the model, each with its own rows.
- ``fsdp``: rows, too, and the parameters, their gradients and the optimizer's moments in shards. A matrix is gathered
  where a pass uses it and its gradient is scattered again (ZeRO, Rajbhandari et al. 2020, stage 3).
- ``sequence``: columns of long passes. Every device of it gathers all keys and values, and holds the same parameters.
- ``tensor``: heads, MLP, experts and vocabulary (Shoeybi et al. 2019).

A pass of one column, a thought or a decoded token, has so few rows that gathering matrices for it would cost far more
than its arithmetic, once for every thought. Such a pass leaves the matrices where they are and moves its activations:
their features are split as the matrices' rows are (``moving_rows``, ``split_features``). Where a training step has
gathered its matrices beforehand (`coconut.training.gathering`) nothing moves: see `matrices_are_whole`.

The mesh is that of `jax.set_mesh`; without one nothing is constrained.
"""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from coconut.errors import CoconutError
from coconut.mesh import MESH_AXES, MeshConfig

RULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        # Parameters.
        "layers": (),
        "positions": (),
        "rank": (),
        "trained_rows": (),
        "head": (),
        "latent": (),
        "embed": ("fsdp",),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "mlp": ("tensor",),
        "expert": ("tensor",),
        "expert_mlp": (),
        "router": (),
        "vocabulary": ("tensor",),
        # Activations.
        "rows": ("data", "fsdp"),
        "columns": ("sequence",),
        "past": (),
        "features": (),
        "moving_rows": ("data",),
        "split_features": ("fsdp",),
    }
)
"""Logical axis -> the mesh axes it is split over, none for not split."""

_WHOLE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {**RULES, "embed": (), "moving_rows": ("data", "fsdp"), "split_features": ()}
)
"""The rules where matrices are whole: ``fsdp`` splits rows alone, those of a pass of one column, too."""

matrices_are_whole = jax.make_user_context(False)
"""``with matrices_are_whole(True):`` what is traced inside has been given matrices that ``fsdp`` no longer splits."""

Axes = tuple[str, ...] | None
"""Logical axes of a parameter; None for one that every device holds whole."""


def make_mesh(config: MeshConfig | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all of ``devices``, whose partitioning XLA completes by itself.

    Args:
      config: its sizes; None for those of `MeshConfig()`.
      devices: the devices, such as those of `jax.experimental.topologies`; None for all there are.

    Raises:
      CoconutError: the sizes do not multiply to the number of devices.
    """
    config = config or MeshConfig()
    devices = jax.devices() if devices is None else devices
    others = config.fsdp * config.sequence * config.tensor
    data = max(len(devices) // others, 1) if config.data is None else config.data
    sizes = (data, config.fsdp, config.sequence, config.tensor)
    if math.prod(sizes) != len(devices):
        asked = ", ".join(f"{axis} = {size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        raise CoconutError(f"the mesh {asked} is one of {math.prod(sizes)} devices, there are {len(devices)}")
    # As `jax.make_mesh`, but an axis may also take a part of a torus's dimension: fsdp = 64 on 4 x 4 x 8 chips.
    ordered = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(ordered, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))


def partition(axes: Sequence[str], mesh: Any, rules: Mapping[str, tuple[str, ...]] = RULES) -> PartitionSpec:
    """What splits an array of the given logical axes on a mesh, which may lack some of `MESH_AXES`."""
    over = [tuple(axis for axis in rules[name] if mesh.shape.get(axis, 1) > 1) for name in axes]
    return PartitionSpec(*[names[0] if len(names) == 1 else names or None for names in over])


def constrain(x: Array, *axes: str) -> Array:
    """Splits an activation over the current mesh as its logical axes say; ``x`` itself where there is no mesh.

    An axis whose size is no multiple of its devices stays whole: a suffix of 21 columns on two shards of the sequence.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, fitting_partition(axes, x.shape))


def stay(x: Array) -> Array:
    """An activation where it lies, as a value of its own to the partitioner; ``x`` itself where there is no mesh.

    From there it can be moved. XLA moves a value whose split axis a product has summed over by gathering all of it on
    every device (seen with jax 0.12), even where each device needs as much of it as it has.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*[PartitionSpec.UNCONSTRAINED] * x.ndim))


def fitting_partition(axes: Sequence[str], shape: Sequence[int]) -> PartitionSpec:
    """What splits an activation over the current mesh; an axis that does not divide stays whole, as in `constrain`."""
    mesh = jax.sharding.get_abstract_mesh()
    spec = partition(axes, mesh, _WHOLE if matrices_are_whole.value else RULES)
    sizes = [math.prod(mesh.shape[axis] for axis in _names(over)) for over in spec]
    return PartitionSpec(*[over if n % size == 0 else None for over, n, size in zip(spec, shape, sizes, strict=True)])


def parameter_sharding(
    name: str, shape: tuple[int, ...], axes: Axes, mesh: Any, *, may_stay_whole: Collection[str] = ()
) -> NamedSharding:
    """Where a parameter lies.

    Args:
      name: its dotted path, such as ``layers.0.attention.query.kernel``, for messages.
      shape: its shape.
      axes: its logical axes, one a dimension; None for a whole copy on every device.
      mesh: a mesh, or an abstract one, of any of `MESH_AXES`; an axis it lacks counts as one of size 1.
      may_stay_whole: logical axes that are not split where the mesh does not divide them.

    Raises:
      CoconutError: the axes are not one a dimension or not among `RULES`, the mesh has an axis of another name, or a
        size is not a multiple of the devices it is split over.
    """
    if unknown := [axis for axis in mesh.axis_names if axis not in MESH_AXES]:
        raise CoconutError(f"the mesh has axes {unknown}: only {', '.join(MESH_AXES)} are known")
    if axes is None:
        return replicated(mesh)
    if unknown := [axis for axis in axes if axis not in RULES]:
        raise CoconutError(f"parameter {name}: axis {unknown[0]!r} is none of {', '.join(RULES)}")
    if len(axes) != len(shape):
        raise CoconutError(f"parameter {name} of shape {shape}: its axes {axes} are not one a dimension")
    spec = partition(axes, mesh)
    for dimension, (axis, over) in enumerate(zip(axes, spec, strict=True)):
        shards = math.prod(mesh.shape[part] for part in _names(over))
        if shape[dimension] % shards and axis in may_stay_whole:
            spec = PartitionSpec(*[None if i == dimension else names for i, names in enumerate(spec)])
        elif shape[dimension] % shards:
            sizes = " x ".join(f"{part} = {mesh.shape[part]}" for part in _names(over))
            raise CoconutError(
                f"parameter {name} of shape {shape}: dimension {dimension} ({axis}) is {shape[dimension]}, which is no "
                f"multiple of the mesh's {sizes}"
            )
    return NamedSharding(mesh, spec)


def tree_sharding(tree: Any, axes: Mapping[str, Axes], mesh: Any) -> Any:
    """Where the arrays of a tree lie, which is keyed by parameters' names somewhere on the way to each of them.

    Parameters, their gradients and an optimizer's moments lie where `parameter_sharding` says; what belongs to no
    parameter, such as a count of steps, is on every device.

    Args:
      tree: arrays or their abstract values.
      axes: those of each parameter by name.
      mesh: a mesh, or an abstract one.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in axes]
        return parameter_sharding(names[-1], leaf.shape, axes[names[-1]], mesh) if names else replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, tree)


def placed(tree: Any, axes: Mapping[str, Axes], mesh: Mesh) -> Any:
    """The abstract values of such a tree with their places on a mesh."""
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(place, tree, tree_sharding(tree, axes, mesh))


def constrain_tree(tree: Any, axes: Mapping[str, Axes]) -> Any:
    """Keeps the arrays of a tree where `tree_sharding` says on the current mesh; nothing where there is no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, tree_sharding(tree, axes, mesh))


def gather(x: Array, axes: Axes) -> Array:
    """A parameter of which each device has what ``fsdp`` had split; not outside of `matrices_are_whole`."""
    return jax.lax.with_sharding_constraint(x, fitting_partition(axes, x.shape) if axes else PartitionSpec())


def replicate(tree: Any) -> Any:
    """Puts a whole copy of each array on every device of the current mesh, so that every process can read it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), tree)


def check_heads(num_heads: int, kv_heads: int, mesh: Any) -> None:
    """Refuses a mesh that would split a head.

    Raises:
      CoconutError: the mesh's tensor axis does not divide the query or the key/value heads.
    """
    tensor = mesh.shape.get("tensor", 1)
    for field, count in (("num_heads", num_heads), ("num_kv_heads", kv_heads)):
        if count % tensor:
            raise CoconutError(f"DecoderConfig.{field} = {count}: is no multiple of the mesh's tensor = {tensor}")


def rows_together(batch_size: int, rows: int) -> int:
    """The rows of a batch for so many in all: ``batch_size``, or as many as they are, a whole number on each device."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.size
    return min(batch_size, -(-max(rows, 1) // devices) * devices)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Where the rows of a batch lie; its other axes are whole."""
    return NamedSharding(mesh, partition(("rows",), mesh))


def replicated(mesh: Any) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_rows(mesh: Any, batch_size: int, microbatches: int = 1, examples_per_row: int = 1) -> None:
    """Refuses a mesh that cannot split the rows of each microbatch evenly, or columns that hold several examples.

    Raises:
      CoconutError: the rows of a microbatch are no multiple of the mesh's row shards, or the mesh splits the columns of
        packed rows.
    """
    shards = mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1)
    if batch_size % (shards * microbatches * examples_per_row):
        packed = f", PipelineConfig.examples_per_row = {examples_per_row}" if examples_per_row > 1 else ""
        raise CoconutError(
            f"PipelineConfig.batch_size = {batch_size} in RunConfig.microbatches = {microbatches}{packed}: the rows of "
            f"each are no multiple of the mesh's data x fsdp = {shards}"
        )
    if examples_per_row > 1 and mesh.shape.get("sequence", 1) > 1:
        raise CoconutError(
            f"PipelineConfig.examples_per_row = {examples_per_row}: the mesh's sequence = {mesh.shape['sequence']} "
            "splits the columns of a row, and packed rows stay whole"
        )


def own_rows(mesh: Any, batch_size: int, microbatches: int = 1, examples_per_row: int = 1) -> slice:
    """The rows of a batch that this process's devices hold.

    Raises:
      CoconutError: see `check_rows`; or a process would hold rows that do not follow each other.
    """
    check_rows(mesh, batch_size, microbatches, examples_per_row)
    rows_of_all = batch_size // examples_per_row
    held = row_sharding(mesh).addressable_devices_indices_map((rows_of_all,)).values()
    bounds = sorted({rows.indices(rows_of_all)[:2] for (rows,) in filter(None, held)})
    if any(end != start for (_, end), (start, _) in itertools.pairwise(bounds)):
        raise CoconutError(
            f"the mesh {dict(mesh.shape)} gives this process rows {bounds}, which do not follow each other"
        )
    return slice(bounds[0][0], bounds[-1][1])


def put_rows(tree: Any, mesh: Mesh, batch_size: int) -> Any:
    """Host arrays of this process's rows (`own_rows`) as arrays of the whole batch on the mesh."""
    sharding = row_sharding(mesh)

    def put(rows: np.ndarray) -> Array:
        return jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))

    return jax.tree.map(put, tree)


def _names(over: Any) -> tuple[str, ...]:
    return () if over is None else (over,) if isinstance(over, str) else tuple(over)
