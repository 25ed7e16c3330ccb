"""A vocabulary split over a mesh axis gives the values and gradients of the whole one.

What needs eight devices runs in a process of its own:
``python -m tests.pallas_kernels.linear_cross_entropy.test_sharded_vocabulary``.
"""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from tests.tiny_models import process_environment


@pytest.mark.slow
def test_on_eight_devices() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "tests.pallas_kernels.linear_cross_entropy.test_sharded_vocabulary"],
        cwd=Path(__file__).parents[3],
        env=process_environment(devices=8),
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == ["reference", "xla", "tpu", "gpu"]


# --- In a process of eight devices ------------------------------------------------------------------------------

ROWS, FEATURES, COLUMNS = 12, 8, 40
RULE = {"soft_cap": 3.0, "z_loss": 1e-2, "ignored_label": 7}


def weighted(hidden, vocabulary, labels, call):
    losses, log_normalizers, predictions = call(hidden, vocabulary, labels)
    weights = jnp.cos(jnp.arange(ROWS))
    return jnp.sum(losses * weights) + jnp.sum(log_normalizers * weights[::-1]), (losses, predictions)


def check(*, check_vma: bool, **options) -> None:
    """Rows over one axis, the vocabulary over the other; equal logits on several shards."""
    generator = np.random.default_rng(0)
    hidden = jnp.asarray(generator.normal(size=(ROWS, FEATURES)), jnp.float32)
    vocabulary = jnp.asarray(generator.normal(size=(COLUMNS, FEATURES)), jnp.float32)
    vocabulary = vocabulary.at[30].set(5.0 * hidden[0]).at[21].set(5.0 * hidden[0])
    labels = jnp.asarray(generator.integers(0, COLUMNS, ROWS), jnp.int32).at[2].set(7)
    differentiate = jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)
    whole = functools.partial(linear_cross_entropy, implementation="reference", **RULE)
    arrays = hidden, vocabulary, labels
    (_, expected), expected_gradients = jax.jit(functools.partial(differentiate, call=whole))(*arrays)
    assert expected[1][0] == 21

    sharded = jax.shard_map(
        functools.partial(linear_cross_entropy, axis_name="tensor", **RULE, **options),
        mesh=jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2),
        in_specs=(PartitionSpec("data"), PartitionSpec("tensor"), PartitionSpec("data")),
        out_specs=PartitionSpec("data"),
        check_vma=check_vma,
    )
    (_, found), gradients = jax.jit(functools.partial(differentiate, call=sharded))(*arrays)
    np.testing.assert_array_equal(found[1], expected[1])
    for mine, theirs in zip((found[0], *gradients), (expected[0], *expected_gradients), strict=True):
        assert np.linalg.norm(mine - theirs) < 2e-6 * np.linalg.norm(theirs)


def main() -> None:
    assert jax.device_count() == 8
    for check_vma in (True, False):
        check(implementation="reference", check_vma=check_vma)
    print("reference")
    for check_vma in (True, False):
        check(implementation="xla", check_vma=check_vma)
    print("xla")
    # Interpreted kernels read with indices that do not differ between devices, which the check rejects.
    for implementation in ("tpu", "gpu"):
        check(implementation=implementation, interpret=True, check_vma=False)
        print(implementation)


if __name__ == "__main__":
    main()
