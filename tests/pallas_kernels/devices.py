"""The kernels that a test of values and gradients runs: interpreted anywhere, and as they are where their device is.

And what ``auto`` means on devices that are not there.
"""

from collections.abc import Callable

import jax
import pytest

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
