"""Every implementation against float32 attention written down plainly: values and all gradients."""

import functools
import itertools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import platform
from pallas_kernels.decode_attention import NO_COLUMN, api, decode_attention, gpu, merge_segments, tpu
from pallas_kernels.implementations import IMPLEMENTATIONS
from tests.pallas_kernels.devices import EVERY, chosen, one_absent_gpu
from tests.tiny_models import quick_jit

# A float32 sum is off by a few units in the last place, 6e-8 each. Outputs and gradients of bfloat16 are rounded to 8
# bits, and so are weights and gradients of scores before their products.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}
RULES: tuple[dict[str, Any], ...] = ({}, {"soft_cap": 2.0, "scale": 0.7})

CASES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "heads": st.sampled_from([1, 2]),
        "group": st.sampled_from([1, 3, 4]),
        "queries": st.integers(1, 6),
        "columns": st.integers(1, 300),
        "features": st.sampled_from([16, 32]),
        "dtype": st.sampled_from(list(TOLERANCE)),
        "rule": st.sampled_from(RULES),
    }
)
# Three blocks of 128 columns, the last one ragged; rows that see some, one that sees nothing, one that sees all.
SEVERAL_BLOCKS = {
    "batch": 4,
    "heads": 2,
    "group": 3,
    "queries": 2,
    "columns": 300,
    "features": 16,
    "dtype": "float32",
    "rule": RULES[1],
}
BOUNDS = ([130, 5, 0, 290], [200, 5, 300, 300])
ALL = ([0] * 4, [300] * 4)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(tpu, "LARGEST_BLOCK", 128)
    monkeypatch.setattr(gpu, "SHORTEST_PART", gpu.BLOCK)


def problem(batch, heads, group, queries, columns, features, dtype, bounds=None, **_):
    generator = np.random.default_rng([batch, heads, group, queries, columns])
    shapes = [(batch, heads * group, queries, features), *[(batch, heads, columns, features)] * 2]
    q, k, v = (generator.normal(size=shape) for shape in shapes)
    start, length = (np.asarray(x) for x in bounds or generator.integers(0, columns + 1, (2, batch)))
    seen = (np.arange(columns) >= start[:, None]) & (np.arange(columns) < length[:, None])
    # What a row does not see may be anything finite.
    k, v = (np.where(seen[:, None, :, None], x, 1e4) for x in (k, v))
    start, length = (jnp.asarray(x, jnp.int32) for x in (start, length))
    return [jnp.asarray(x, dtype) for x in (q, k, v)], start, length


def solve(arrays, start, length, **options):
    """Outputs, and the gradients of a sum in which outputs and log-normalizers have different weights."""

    def weighted(q, k, v):
        found = decode_attention(q, k, v, start, length, return_log_normalizers=True, **options)
        sums = [jnp.sum(x.astype(jnp.float32) * jnp.cos(jnp.arange(x.size)).reshape(x.shape)) for x in found]
        return sum(sums), found

    compiled = quick_jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))
    (_, found), gradients = compiled(*arrays)
    return found, gradients


def distance(found, expected):
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-20)


def check(case, bounds=None, **options):
    arrays, start, length = problem(**case, bounds=bounds)
    found, gradients = solve(arrays, start, length, **options, **case["rule"])
    expected, expected_gradients = solve(arrays, start, length, implementation="reference", **case["rule"])
    sees = np.asarray(start) < np.asarray(length)
    normalizers, expected_normalizers = np.asarray(found[1]), np.asarray(expected[1])
    assert distance(normalizers, expected_normalizers) < TOLERANCE["float32"]
    assert distance(normalizers[sees], expected_normalizers[sees]) < TOLERANCE["float32"]
    for mine, theirs in zip((found[0], *gradients), (expected[0], *expected_gradients), strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(mine, np.float32)[~sees], 0.0)
        assert distance(mine, theirs) < TOLERANCE[case["dtype"]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", EVERY)
def test_several_blocks_of_columns(options, dtype):
    check(SEVERAL_BLOCKS | {"dtype": dtype}, BOUNDS, **options)


# Memory that no kernel wrote to, and what it reads behind the end of an array, is NaN where they are interpreted.
@pytest.mark.parametrize("options", EVERY)
@settings(max_examples=3, phases=(Phase.explicit, Phase.generate))
@given(CASES)
def test_random_cases(options, case):
    check(case, **options)


@pytest.mark.slow
def test_tpu_without_races():
    try:
        check(SEVERAL_BLOCKS, BOUNDS, implementation="tpu", interpret=pltpu.InterpretParams(detect_races=True))
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def test_the_reference_is_what_it_should_be():
    (q, k, v), start, length = problem(**SEVERAL_BLOCKS, bounds=BOUNDS)
    outputs, log_normalizers = decode_attention(
        q, k, v, start, length, return_log_normalizers=True, implementation="reference", soft_cap=2.0
    )
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    for row, head in np.ndindex(4, 6):
        seen = slice(int(start[row]), int(length[row]))
        scores = 2.0 * np.tanh(q[row, head] @ k[row, head // 3, seen].T / 16**0.5 / 2.0)
        total = np.exp(scores).sum(1, keepdims=True)
        if row == 1:
            np.testing.assert_array_equal(log_normalizers[row], NO_COLUMN)
            np.testing.assert_array_equal(outputs[row], 0.0)
            continue
        np.testing.assert_allclose(log_normalizers[row, head], np.log(total)[:, 0], rtol=1e-5)
        np.testing.assert_allclose(outputs[row, head], np.exp(scores) / total @ v[row, head // 3, seen], atol=2e-6)


def test_segments_merge_into_the_whole():
    arrays, start, _ = problem(**SEVERAL_BLOCKS, bounds=ALL)
    length = jnp.array([300, 100, 1, 0])

    def merged(q, k, v):
        edges = [0, 100, 170, 300]
        parts = [
            decode_attention(
                q, k[:, :, a:b], v[:, :, a:b], start, jnp.clip(length - a, 0, b - a), return_log_normalizers=True
            )
            for a, b in itertools.pairwise(edges)
        ]
        return merge_segments(*zip(*parts, strict=True))

    def whole(q, k, v):
        return decode_attention(q, k, v, start, length, return_log_normalizers=True)

    def weighted(attention, *arrays):
        return sum(jnp.sum(x * jnp.cos(jnp.arange(x.size)).reshape(x.shape)) for x in attention(*arrays))

    def values_and_gradients(attention):
        gradients = jax.grad(functools.partial(weighted, attention), argnums=(0, 1, 2))
        return quick_jit(lambda *arrays: (attention(*arrays), gradients(*arrays)))(*arrays)

    found, expected = (jax.tree.leaves(values_and_gradients(attention)) for attention in (merged, whole))
    for mine, theirs in zip(found, expected, strict=True):
        assert np.isfinite(mine).all()
        assert distance(mine, theirs) < TOLERANCE["float32"]


def test_traced_bounds_outside_of_the_cache_are_those_of_the_cache():
    (q, k, v), _, _ = problem(**SEVERAL_BLOCKS, bounds=ALL)
    whole = decode_attention(q, k, v, jnp.zeros(4, int), jnp.full(4, 300))
    for implementation in IMPLEMENTATIONS[1:]:
        call = functools.partial(
            decode_attention, implementation=implementation, interpret=implementation in api.KERNELS
        )
        found = quick_jit(call)(q, k, v, jnp.full(4, -200), jnp.full(4, 700))
        assert distance(found, whole) < TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("device", "columns", "features", "queries", "dtype", "expected"),
    [
        ("cpu", 4_096, 128, 4, "bfloat16", "xla"),
        ("NVIDIA H100 80GB HBM3", 4_096, 128, 4, "bfloat16", "gpu"),
        ("NVIDIA H100 80GB HBM3", 224, 64, 1, "bfloat16", "xla"),
        ("NVIDIA H100 80GB HBM3", 4_096, 128, 4, "float32", "xla"),
        ("NVIDIA H100 80GB HBM3", 4_096, 96, 4, "bfloat16", "xla"),
        ("NVIDIA A100-SXM4-80GB", 4_096, 128, 4, "bfloat16", "xla"),
        ("tpu", 4_096, 128, 4, "bfloat16", "tpu"),
        ("tpu", 4_096, 128, tpu.MOST_QUERIES + 1, "bfloat16", "xla"),
        ("tpu", 4_096, 64, 4, "bfloat16", "xla"),
        ("tpu", 512, 128, 4, "bfloat16", "xla"),
    ],
)
def test_auto(device, columns, features, queries, dtype, expected, monkeypatch):
    shapes = [(2, 1, length, features) for length in (queries, columns)]
    assert chosen(api.choose, device, monkeypatch, *shapes, dtype=dtype) == expected


def test_auto_says_once_what_it_chose(caplog, monkeypatch):
    monkeypatch.setattr(platform, "_logged", set())
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        for _ in range(2):
            jax.eval_shape(decode_attention, *ones((1, 4, 1, 8), (1, 2, 3, 8), (1, 2, 3, 8)), *bounds(0, 3))
    assert [record.message for record in caplog.records] == [
        "decode_attention, queries (1, 2, 2, 8) to keys (1, 2, 3, 8) float32 on cpu: xla"
    ]


def ones(*shapes, dtype: Any = jnp.float32):
    return [jnp.ones(shape, dtype) for shape in shapes]


def bounds(start, length):
    return [jnp.array([start]), jnp.array([length])]


Q, K = (1, 4, 1, 8), (1, 2, 3, 8)


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        (ones(Q, K, K[1:]), {}, r"q is \[B, H, T, D\].*v \(2, 3, 8\)"),
        (ones(Q, K, (1, 2, 4, 8)), {}, r"sizes differ.*v \(1, 2, 4, 8\) float32"),
        (ones((1, 4, 1, 4), K, K), {}, r"sizes differ.*q \(1, 4, 1, 4\)"),
        (ones((2, 4, 1, 8), K, K), {}, r"sizes differ.*q \(2, 4, 1, 8\)"),
        (ones((1, 4, 0, 8), K, K), {}, r"nothing to compute with: q \(1, 4, 0, 8\)"),
        (ones((1, 3, 1, 8), K, K), {}, r"3 heads of queries cannot share 2 heads of keys evenly: q \(1, 3, 1, 8\)"),
        ([*ones(Q, K), *ones(K, dtype=jnp.bfloat16)], {}, r"all float32 or all bfloat16.*v \(1, 2, 3, 8\) bfloat16"),
        (ones(Q, K, K, dtype=jnp.float16), {}, "all float32 or all bfloat16"),
        ([*ones(Q, K, K), *ones((1,), (1,))], {}, r"start and length are integers.*start \(1,\) float32"),
        ([*ones(Q, K, K), *bounds(-1, 2)], {}, r"start is -1 to -1, outside of the cache of k \(1, 2, 3, 8\)"),
        ([*ones(Q, K, K), *bounds(0, 4)], {}, r"length is 4 to 4, outside of the cache"),
        (ones(Q, K, K), {"scale": 0.0}, "scale=0.0"),
        (ones(Q, K, K), {"soft_cap": -1.0}, "soft_cap=-1.0"),
        (ones(Q, K, K), {"implementation": "cuda"}, "implementation='cuda': it is one of auto, reference, xla, tpu"),
        (ones(Q, K, K), {"implementation": "tpu"}, "'tpu' does not apply: this program is for a cpu; interpret=True"),
        (ones(Q, K, K), {"interpret": True}, "interpret is for the kernels tpu and gpu, not for 'auto'"),
        (ones(Q, K, K), {"implementation": "gpu", "interpret": True}, "heads have 8 features, .* power of two"),
        (ones((1, 2, 257, 8), K, K), {"implementation": "tpu", "interpret": True}, "257 queries share a head of keys"),
    ],
)
def test_bad_input(arrays, options, message):
    arrays = arrays if len(arrays) == 5 else [*arrays, *bounds(0, 3)]
    with pytest.raises(ValueError, match=message):
        decode_attention(*arrays, **options)


def test_the_gpu_kernel_lowers_for_cuda():
    (q, k, v), start, length = problem(**SEVERAL_BLOCKS | {"dtype": "bfloat16", "features": 64}, bounds=BOUNDS)
    call = functools.partial(gpu.attend, rule=api.LogitRule(soft_cap=2.0))
    grouped = q.reshape(4, 2, 6, 64)
    with one_absent_gpu():
        lowered = jax.jit(call).trace(grouped, k, v, start, length).lower(lowering_platforms=("cuda",))
    assert "__gpu$xla.gpu.triton" in lowered.as_text()
