"""Every implementation against the float32 reference: values, log-normalizers and all gradients."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention import NO_KEYS, flash_attention, gpu, tpu_blocks, xla
from tests.pallas_kernels.devices import EVERY, GPU, TPU
from tests.pallas_kernels.flash_attention.problems import Problem, assert_close, problems, solve
from tests.tiny_models import quick_jit

SEVERAL_BLOCKS = Problem(lengths=(40, 41), heads=(4, 2))
SHORT_WINDOW = dataclasses.replace(SEVERAL_BLOCKS, window=5, ranges=False)
WHOLE_BLOCKS = Problem(lengths=(40, 48), causal=False, offset="none", ranges=False, dtype="bfloat16")
BENT_SEGMENTS = Problem(lengths=(21, 35), segments=True, soft_cap=1.5, ranges=False)

# Blocks are small here, so that small problems have several. A device takes only its own, so there problems grow.
BLOCK = 16
GROWTH = {"gpu": gpu.BLOCK // BLOCK, "tpu": tpu_blocks.BLOCK // BLOCK}.get(jax.default_backend(), 1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    if GROWTH == 1:
        for module in (xla, gpu, tpu_blocks):
            monkeypatch.setattr(module, "BLOCK", BLOCK)
        monkeypatch.setattr(tpu_blocks, "LANES", BLOCK)


def check(problem: Problem, **implementation: Any) -> None:
    problem = problem.grown(GROWTH)
    assert_close(solve(problem, **implementation), solve(problem, implementation="reference"))


@pytest.mark.slow
@given(problems(widths=(1, 8)))
@settings(max_examples=14)
@example(SEVERAL_BLOCKS)
@example(SHORT_WINDOW)
@example(WHOLE_BLOCKS)
@example(BENT_SEGMENTS)
def test_xla(problem):
    check(problem, implementation="xla")


@pytest.mark.slow
@pytest.mark.parametrize("implementation", TPU)
@given(problems(widths=(8, 24)))
@settings(max_examples=3)
@example(SEVERAL_BLOCKS)
@example(SHORT_WINDOW)
@example(WHOLE_BLOCKS)
@example(BENT_SEGMENTS)
def test_tpu(implementation, problem):
    check(problem, **implementation)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", GPU)
@given(problems(widths=(16,)))
@settings(max_examples=3)
@example(SEVERAL_BLOCKS)
@example(SHORT_WINDOW)
@example(WHOLE_BLOCKS)
@example(BENT_SEGMENTS)
def test_gpu(implementation, problem):
    check(problem, **implementation)


@pytest.mark.slow
def test_tpu_has_no_races_and_leaves_nothing_unwritten():
    """Memory is NaN before it is written; two cores share what the grid calls parallel; one row sees nothing."""
    problem = Problem(lengths=(20, 36), width=8)
    try:
        check(
            problem,
            implementation="tpu",
            interpret=pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2),
        )
        from jax._src.pallas.mosaic.interpret import interpret_pallas_call

        assert interpret_pallas_call.races is not None and not interpret_pallas_call.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.slow
def test_the_reference_is_attention():
    """Against numpy, a query at a time."""
    problem = Problem(heads=(4, 2), lengths=(5, 9), width=3, segments=True, window=6, soft_cap=1.5)
    (q, k, v), data = problem.arrays()
    out, normalizers = flash_attention(
        q, k, v, **data, **problem.options(), scale=0.7, implementation="reference", return_log_normalizers=True
    )
    q, k, v, out, normalizers = (np.asarray(x, np.float64) for x in (q, k, v, out, normalizers))
    data = {name: np.asarray(x) for name, x in data.items()}
    seen_by_all = 0
    for b, h, t in np.ndindex(2, 4, 5):
        column = data["query_offset"][b] + t
        seen = [
            s
            for s in range(data["start"][b], data["length"][b])
            if column - 6 < s <= column and data["key_segment_ids"][b, s] == data["query_segment_ids"][b, t]
        ]
        seen_by_all += len(seen)
        if not seen:
            assert normalizers[b, h, t] == NO_KEYS and not out[b, h, t].any()
            continue
        weights = np.exp(1.5 * np.tanh(0.7 * k[b, h // 2, seen] @ q[b, h, t] / 1.5))
        np.testing.assert_allclose(out[b, h, t], weights @ v[b, h // 2, seen] / weights.sum(), rtol=1e-5)
        np.testing.assert_allclose(normalizers[b, h, t], np.log(weights.sum()), rtol=1e-5)
    assert seen_by_all > 20


@pytest.mark.parametrize("implementation", EVERY)
def test_nothing_seen_is_zero_and_dead_blocks_are_not_read(implementation):
    """A row without keys gives zeros everywhere; keys that only later queries could see may be NaN."""
    block = BLOCK * GROWTH
    q, k, v = (jnp.ones((2, 1, length, 16)) for length in (block, 3 * block, 3 * block))
    k, v = k.at[:, :, block:].set(jnp.nan), v.at[:, :, block:].set(jnp.nan)

    def loss(q, k, v):
        out, normalizers = flash_attention(
            q, k, v, causal=True, length=jnp.asarray([3 * block, 0]), return_log_normalizers=True, **implementation
        )
        return out.sum() + normalizers[0].sum(), (out, normalizers)

    gradients, (out, normalizers) = quick_jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    np.testing.assert_allclose(out[0], 1.0, rtol=1e-6)
    assert np.isfinite(normalizers[0]).all()
    np.testing.assert_array_equal(out[1], 0.0)
    np.testing.assert_array_equal(normalizers[1], NO_KEYS)
    for gradient in gradients:
        assert np.isfinite(gradient).all() and gradient[0].any() and not gradient[1].any()
    np.testing.assert_array_equal(gradients[2][:, :, block:], 0.0)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_calls_over_parts_of_the_keys_merge(implementation):
    """What the decoder does with its segments; one row sees nothing of the first."""
    (q, k, v), _ = Problem(lengths=(20, 40), ranges=False).arrays()
    start = jnp.asarray([0, 25])
    weights = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)

    def whole(q, k, v):
        out = flash_attention(q, k, v, causal=True, query_offset=20, start=start, implementation="reference")
        return jnp.sum(weights * cast(jax.Array, out))

    def merged(q, k, v):
        past = flash_attention(
            q,
            k[:, :, :20],
            v[:, :, :20],
            start=jnp.minimum(start, 20),
            implementation=implementation,
            return_log_normalizers=True,
        )
        own = flash_attention(
            q,
            k[:, :, 20:],
            v[:, :, 20:],
            causal=True,
            start=jnp.maximum(start - 20, 0),
            implementation=implementation,
            return_log_normalizers=True,
        )
        outs, normalizers = (jnp.stack(x) for x in zip(past, own, strict=True))
        shares = jax.nn.softmax(normalizers, axis=0)[..., None]
        return jnp.sum(weights * jnp.sum(shares * outs, axis=0))

    expected = quick_jit(jax.value_and_grad(whole, argnums=(0, 1, 2)))(q, k, v)
    found = quick_jit(jax.value_and_grad(merged, argnums=(0, 1, 2)))(q, k, v)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(mine - theirs) < 2e-6 * np.linalg.norm(theirs)


@pytest.mark.parametrize("implementation", EVERY)
def test_offsets_and_ranges_are_data(implementation):
    (q, k, v), _ = Problem(ranges=False).arrays()

    @quick_jit
    def run(offset, start, length):
        return flash_attention(q, k, v, causal=True, query_offset=offset, start=start, length=length, **implementation)

    for offset, start, length in ((0, 0, 40), (3, 1, 17), (30, 2, 40)):
        one = run(jnp.int32(offset), jnp.full(2, start), jnp.full(2, length))
        expected = flash_attention(
            q,
            k[:, :, start:length],
            v[:, :, start:length],
            causal=True,
            query_offset=jnp.int32(offset - start),
            implementation="reference",
        )
        np.testing.assert_allclose(one, expected, atol=1e-6)
    assert run._cache_size() == 1
