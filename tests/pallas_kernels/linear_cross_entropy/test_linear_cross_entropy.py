"""Every implementation against float32 logits formed at once: values and both gradients."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import platform
from pallas_kernels.linear_cross_entropy import LinearCrossEntropy, api, gpu, linear_cross_entropy, tpu, xla
from tests.pallas_kernels.devices import EVERY, chosen, one_absent_gpu
from tests.tiny_models import quick_jit

# A float32 sum over a row is off by a few units in the last place, 6e-8 each. Gradients of bfloat16 are rounded to 8
# bits, and so is each block of them before its product.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}
RULES: tuple[dict[str, Any], ...] = ({}, {"soft_cap": 3.0, "z_loss": 1e-2, "logit_scale": 0.5}, {"logit_scale": 2.0})

CASES = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 270),
        "features": st.integers(1, 40),
        "columns": st.integers(1, 400),
        "dtype": st.sampled_from(list(TOLERANCE)),
        "ignored": st.sampled_from([0.0, 0.3, 1.0]),
        "rule": st.sampled_from(RULES),
    }
)
SEVERAL_BLOCKS = {"rows": 200, "features": 33, "columns": 300, "dtype": "float32", "ignored": 0.3, "rule": RULES[1]}
WHOLE_BLOCKS = SEVERAL_BLOCKS | {"rows": 256, "features": 32, "columns": 256, "dtype": "bfloat16", "rule": {}}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(tpu, "BLOCKS", (128,))
    monkeypatch.setattr(xla, "BLOCK_LOGITS", 2**14)


def problem(rows, features, columns, dtype, ignored=0.0, **_):
    generator = np.random.default_rng([rows, features, columns])
    hidden, vocabulary = (generator.normal(size=(size, features)) for size in (rows, columns))
    labels = generator.integers(0, columns, rows)
    labels[generator.random(rows) < ignored] = -100
    return jnp.asarray(hidden, dtype), jnp.asarray(vocabulary / features**0.5, dtype), jnp.asarray(labels, jnp.int32)


def solve(hidden, vocabulary, labels, **options):
    """The outputs, and the gradients of a sum in which every row and both differentiable outputs have weights."""
    weights = jnp.cos(jnp.arange(labels.size))

    def weighted(hidden, vocabulary):
        found = linear_cross_entropy(hidden, vocabulary, labels, **options)
        return jnp.sum(found.losses * weights) + jnp.sum(found.log_normalizers * weights[::-1]), found

    compiled = quick_jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))
    (_, found), gradients = compiled(hidden, vocabulary)
    return found, gradients


def distance(found, expected, *, parts=None):
    """Norm of the difference over that of what is expected, or of the parts whose difference it is."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected if parts is None else parts)


def check(case, **options):
    arrays = problem(**case)
    found, gradients = solve(*arrays, **options, **case["rule"])
    expected, expected_gradients = solve(*arrays, implementation="reference", **case["rule"])
    # A vocabulary of one id has no loss but the rounding of two equal numbers.
    assert distance(found.losses, expected.losses, parts=expected.log_normalizers) < TOLERANCE["float32"]
    assert distance(found.log_normalizers, expected.log_normalizers) < TOLERANCE["float32"]
    np.testing.assert_array_equal(found.predictions, expected.predictions)
    np.testing.assert_array_equal(np.asarray(found.losses)[np.asarray(arrays[2]) == -100], 0.0)
    for mine, theirs, array in zip(gradients, expected_gradients, arrays[:2], strict=True):
        assert mine.shape == array.shape and mine.dtype == array.dtype
        assert distance(mine, theirs) < TOLERANCE[case["dtype"]]


# Memory that no kernel wrote to, and what it reads behind the end of an array, is NaN where they are interpreted.
@pytest.mark.parametrize("options", EVERY)
@example(SEVERAL_BLOCKS)
@example(WHOLE_BLOCKS)
@settings(max_examples=2, phases=(Phase.explicit, Phase.generate))
@given(CASES)
def test_values_and_gradients(options, case):
    check(case, **options)


def test_tpu_without_races():
    try:
        check(SEVERAL_BLOCKS, implementation="tpu", interpret=pltpu.InterpretParams(detect_races=True))
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def test_the_reference_is_what_it_should_be():
    hidden, vocabulary, labels = problem(rows=5, features=3, columns=7, dtype="float32")
    rule = {"soft_cap": 2.0, "z_loss": 0.1, "ignored_label": -1}
    call = functools.partial(linear_cross_entropy, implementation="reference", **rule)
    found = quick_jit(call)(hidden, vocabulary, labels.at[2].set(-1))
    logits = 2.0 * np.tanh(np.asarray(hidden, np.float64) @ np.asarray(vocabulary, np.float64).T / 2.0)
    log_normalizers = np.log(np.exp(logits).sum(1))
    losses = log_normalizers - logits[np.arange(5), labels] + 0.1 * log_normalizers**2
    losses[2] = 0.0
    np.testing.assert_allclose(found.losses, losses, rtol=1e-6)
    np.testing.assert_allclose(found.log_normalizers, log_normalizers, rtol=1e-6)
    np.testing.assert_array_equal(found.predictions, logits.argmax(1))


@pytest.mark.parametrize("options", [pytest.param({"implementation": "reference"}, id="reference"), *EVERY])
def test_the_first_of_equal_logits_is_predicted_and_a_wrong_label_is_no_loss(options):
    # Integers, whose products and sums are exact: two blocks hold the largest logits, and each of them twice.
    vocabulary = np.zeros((260, 2), np.float32)
    vocabulary[[40, 90, 200, 250]] = 3.0
    labels = jnp.array([40, 260, -1], jnp.int32)
    arrays = jnp.ones((3, 2)), jnp.asarray(vocabulary), labels
    found = quick_jit(functools.partial(linear_cross_entropy, **options))(*arrays)
    np.testing.assert_array_equal(found.predictions, [40, 40, 40])
    np.testing.assert_array_equal(np.isnan(found.losses), [False, True, True])
    assert np.isfinite(found.log_normalizers).all()


@pytest.mark.parametrize("options", EVERY)
def test_no_array_is_as_large_as_the_logits(options, monkeypatch):
    monkeypatch.undo()
    rows, features, columns = 8_192, 16, 50_257
    shapes = [jax.ShapeDtypeStruct((size, features), jnp.float32) for size in (rows, columns)]
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def loss(hidden, vocabulary, labels):
        return linear_cross_entropy(hidden, vocabulary, labels, **options).losses.sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*shapes, labels)
    assert largest_array(jaxpr.jaxpr) <= xla.BLOCK_LOGITS


def largest_array(jaxpr) -> int:
    """Elements of the largest array of a program, loops and kernels included."""
    inner = [x for equation in jaxpr.eqns for x in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program)]
    sizes = [getattr(variable.aval, "size", 0) for equation in jaxpr.eqns for variable in equation.outvars]
    return max([0, *sizes, *(largest_array(getattr(x, "jaxpr", x)) for x in inner if is_program(x))])


def is_program(x) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def test_largest_array_looks_into_loops():
    program = jax.make_jaxpr(lambda x: jax.lax.map(lambda y: jnp.outer(x, x).sum() * y, x))(jnp.ones(5))
    assert largest_array(program.jaxpr) == 25


@pytest.mark.parametrize(
    ("device", "rows", "columns", "features", "dtype", "expected"),
    [
        ("cpu", 8_192, 50_257, 768, "bfloat16", "xla"),
        ("NVIDIA H100 80GB HBM3", 2_560, 50_257, 768, "bfloat16", "gpu"),
        ("NVIDIA H100 80GB HBM3", 640, 50_257, 768, "bfloat16", "xla"),
        ("NVIDIA H100 80GB HBM3", 8_192, 50_257, 768, "float32", "xla"),
        ("NVIDIA A100-SXM4-80GB", 8_192, 50_257, 768, "bfloat16", "xla"),
        ("tpu", 8_192, 50_257, 768, "bfloat16", "tpu"),
        ("tpu", 8_192, 50_257, 2**16, "bfloat16", "xla"),
        ("tpu", 64, 50_257, 768, "bfloat16", "xla"),
    ],
)
def test_auto(device, rows, columns, features, dtype, expected, monkeypatch):
    monkeypatch.undo()
    shapes = [(length, features) for length in (rows, columns)]
    assert chosen(api.choose, device, monkeypatch, *shapes, dtype=dtype) == expected


def test_auto_says_once_what_it_chose(caplog, monkeypatch):
    monkeypatch.setattr(platform, "_logged", set())
    arrays = problem(rows=3, features=2, columns=5, dtype="float32")
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        for _ in range(2):
            jax.eval_shape(linear_cross_entropy, *arrays)
    assert [record.message for record in caplog.records] == [
        "linear_cross_entropy, hidden (3, 2) by (5, 2) float32 on cpu: xla"
    ]


def ones(*shape, dtype: Any = jnp.float32):
    return jnp.ones(shape, dtype)


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ((ones(2, 3, 4), ones(5, 4), ones(2, dtype=int)), {}, r"hidden is \[N, D\].*hidden \(2, 3, 4\) float32"),
        ((ones(2, 4), ones(5, 3), ones(2, dtype=int)), {}, r"sizes differ.*vocabulary \(5, 3\)"),
        ((ones(2, 4), ones(5, 4), ones(3, dtype=int)), {}, r"sizes differ.*labels \(3,\)"),
        ((ones(0, 4), ones(5, 4), ones(0, dtype=int)), {}, r"nothing to compute with: hidden \(0, 4\)"),
        ((ones(2, 4), ones(5, 4, dtype=jnp.bfloat16), ones(2, dtype=int)), {}, "both float32 or both bfloat16"),
        ((ones(2, 4, dtype=jnp.float16),) * 2 + (ones(2, dtype=int),), {}, r"\(2, 4\) float16"),
        ((ones(2, 4), ones(5, 4), ones(2)), {}, r"labels are integers.*labels \(2,\) float32"),
        (None, {"z_loss": -1.0}, r"z_loss=-1.0"),
        (None, {"soft_cap": 0.0}, r"soft_cap=0.0"),
        (None, {"logit_scale": float("nan")}, r"logit_scale=nan"),
        (None, {"axis_name": "tensor"}, "axis_name='tensor' is no axis"),
        (None, {"implementation": "cuda"}, "implementation='cuda': it is one of auto, reference, xla, tpu, gpu"),
        (None, {"implementation": "tpu"}, "'tpu' does not apply: this program is for a cpu; interpret=True"),
        (None, {"implementation": "gpu"}, "'gpu' does not apply: this program is for a cpu"),
        (None, {"interpret": True}, "interpret is for the kernels tpu and gpu, not for 'auto'"),
    ],
)
def test_bad_input(arrays, options, message):
    arrays = arrays or (ones(2, 4), ones(5, 4), ones(2, dtype=int))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(linear_cross_entropy, **options), *arrays)


def test_states_too_wide_for_the_kernel_are_refused():
    shapes = [jax.ShapeDtypeStruct((2, 2**16), jnp.float32)] * 2
    call = functools.partial(linear_cross_entropy, implementation="tpu", interpret=True)
    with pytest.raises(ValueError, match=r"hidden \(2, 65536\) by .*: blocks of 128 states .* do not fit into VMEM"):
        jax.eval_shape(call, *shapes, jax.ShapeDtypeStruct((2,), jnp.int32))


def test_the_gpu_kernel_lowers_for_cuda():
    arrays = problem(rows=130, features=40, columns=300, dtype="bfloat16")
    call = functools.partial(gpu.statistics, rule=api.LogitRule(soft_cap=3.0))
    with one_absent_gpu():
        lowered = jax.jit(call).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert "__gpu$xla.gpu.triton" in lowered.as_text()


@pytest.mark.parametrize("options", EVERY)
def test_traces_where_64_bits_are_enabled(options):
    # Three blocks of the vocabulary, the last of which overlaps.
    arrays = problem(rows=200, features=33, columns=300, dtype="float32")

    def loss(hidden, vocabulary, labels):
        return linear_cross_entropy(hidden, vocabulary, labels, soft_cap=3.0, **options).losses.sum()

    with jax.enable_x64(True):
        found = jax.eval_shape(functools.partial(linear_cross_entropy, **options), *arrays)
        traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(*arrays)
        traced.lower()
    assert [x.dtype for x in found] == [jnp.float32, jnp.float32, jnp.int32]
    assert {x.dtype.name for x in jax.tree.leaves(traced.out_info)} == {"float32"}


def test_result_is_a_named_tuple():
    found = jax.eval_shape(linear_cross_entropy, *problem(rows=3, features=2, columns=5, dtype="bfloat16"))
    assert isinstance(found, LinearCrossEntropy)
    assert [x.dtype for x in found] == [jnp.float32, jnp.float32, jnp.int32]
