"""Devices for the tests of kernels.

A test of values and gradients runs a kernel interpreted anywhere, and as it is where its device is. A test of lowering
names a device that need not be there, and so does one of what ``auto`` means.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import measured


def _interpreted_and_real(device: str) -> list:
    return [
        pytest.param({"implementation": device, "interpret": True}, id=f"{device}-interpreted"),
        pytest.param({"implementation": device}, id=f"{device}-real", marks=getattr(pytest.mark, device)),
    ]


XLA = pytest.param({"implementation": "xla"}, id="xla")
TPU = _interpreted_and_real("tpu")
GPU = _interpreted_and_real("gpu")
EVERY = [XLA, *TPU, *GPU]


def chosen(choose: Callable[..., str], device: str, monkeypatch: pytest.MonkeyPatch, *shapes: tuple, dtype: str) -> str:
    """What an op's ``choose`` says of arrays of these shapes on ``cpu``, ``tpu``, or a GPU by NVIDIA's name of it."""
    monkeypatch.setattr(measured, "device_kind", lambda: device)
    platform = "gpu" if device.startswith("NVIDIA") else device
    found: list[str] = []

    def ask(*arrays: jax.Array) -> None:
        found.append(choose(platform, *arrays))

    jax.eval_shape(ask, *(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes))
    return found[0]


def one_absent_gpu() -> AbstractContextManager:
    """Programs that are lowered in it are for a GPU, here or not. Make their arrays before it."""
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    return use_abstract_mesh(AbstractMesh((1,), ("device",), abstract_device=device))
