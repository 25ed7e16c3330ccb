"""The kernels that a test of values and gradients runs: interpreted anywhere, and as they are where their device is."""

import pytest


def _interpreted_and_real(device: str) -> list:
    return [
        pytest.param({"implementation": device, "interpret": True}, id=f"{device}-interpreted"),
        pytest.param({"implementation": device}, id=f"{device}-real", marks=getattr(pytest.mark, device)),
    ]


XLA = pytest.param({"implementation": "xla"}, id="xla")
TPU = _interpreted_and_real("tpu")
GPU = _interpreted_and_real("gpu")
EVERY = [XLA, *TPU, *GPU]
