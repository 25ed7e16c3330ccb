"""What a program is being compiled for, and the parts of an implementation's choice that all ops share."""

import logging
from collections.abc import Iterable

import jax
from jaxtyping import Array

_logger = logging.getLogger("pallas_kernels")
_logged: set[str] = set()


def platform() -> str:
    """``cpu``, ``tpu`` or ``gpu``: that of the mesh in use (`jax.set_mesh`), else JAX's default.

    The mesh comes first, so that a program compiled ahead of time for devices that are not there is recognised.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    kind = device.device_kind.lower()
    return next((name for name in ("tpu", "cpu") if name in kind), "gpu")


def device_kind() -> str:
    """The vendor's name of the device that `platform` is of."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def log_once(message: str) -> None:
    """Logs a choice the first time that it is made in this process."""
    if message not in _logged:
        _logged.add(message)
        _logger.info(message)


def varying_axes(*arrays: Array) -> frozenset[str]:
    """The mesh axes over which any of the arrays differs, where `jax.shard_map` checks that."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def vary_over(array: Array, axes: Iterable[str]) -> Array:
    """The array as one that differs over ``axes`` too; gradients are summed over the axes that are added."""
    missing = tuple(sorted(set(axes) - jax.typeof(array).manual_axis_type.varying))
    return jax.lax.pcast(array, missing, to="varying") if missing else array
