"""`pallas_kernels` works where nothing else of ours can be imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys


class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("coconut", "experiments", "gin_configs", "tests"):
            raise ModuleNotFoundError(f"{name} is not to be had here", name=name)


sys.meta_path.insert(0, Refusal())
try:
    import coconut
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("coconut can be imported, so this shows nothing")

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.linear_cross_entropy import linear_cross_entropy

x = jnp.ones((1, 1, 2, 4))
attended = flash_attention(x, x, x, causal=True)
decoded = decode_attention(x, x, x, jnp.zeros(1, int), jnp.full(1, 2))
losses = linear_cross_entropy(x[0, 0], jnp.zeros((8, 4)), jnp.zeros(2, int)).losses
assert jnp.allclose(attended, 1.0) and jnp.allclose(decoded, 1.0) and jnp.allclose(losses, jnp.log(8.0))
"""


@pytest.mark.slow
def test_without_coconut() -> None:
    child = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
