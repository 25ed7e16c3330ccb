"""What `flash_attention` refuses, and what `auto` chooses."""

import functools
import logging

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from pallas_kernels import platform
from pallas_kernels.flash_attention import choose, flash_attention
from tests.pallas_kernels.devices import chosen
from tests.tiny_models import quick_jit

Q, K = (2, 4, 5, 16), (2, 2, 7, 16)


@pytest.fixture
def unchecked_types():
    """Turns the tests' own type checks off: a user meets our messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


def ids(*shape):
    return jnp.zeros(shape, jnp.int32)


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ((zeros(4, 5, 16), zeros(*K), zeros(*K)), {}, r"q \(4, 5, 16\).*must have 4 axes"),
        ((zeros(*Q), zeros(*K), zeros(2, 2, 8, 16)), {}, "keys and values must have one shape"),
        ((zeros(*Q), zeros(3, 2, 7, 16), zeros(3, 2, 7, 16)), {}, r"k \(3, 2, 7, 16\).*must agree in rows"),
        ((zeros(*Q), zeros(2, 2, 7, 8), zeros(2, 2, 7, 8)), {}, "head dimension"),
        ((zeros(2, 3, 5, 16), zeros(*K), zeros(*K)), {}, "must be a multiple of that of key heads"),
        ((zeros(*Q), zeros(2, 2, 0, 16), zeros(2, 2, 0, 16)), {}, "no axis may be empty"),
        ((zeros(*Q, dtype=jnp.bfloat16), zeros(*K), zeros(*K)), {}, "bfloat16.*must have one floating dtype"),
        (None, {"start": ids(3)}, r"start \(3,\) int32: must be integers, one or one for each of 2 rows"),
        (None, {"length": zeros(2)}, r"length \(2,\) float32: must be integers"),
        (None, {"length": np.asarray([3, 8])}, r"length = \[3 8\]: must not be negative nor beyond 7"),
        (None, {"query_offset": -1}, "query_offset = -1: must not be negative"),
        (None, {"query_offset": ids(3)}, r"query_offset \(3,\)"),
        (None, {"query_segment_ids": ids(2, 5)}, "must be given together"),
        (
            None,
            {"query_segment_ids": ids(2, 5), "key_segment_ids": ids(2, 5)},
            r"key_segment_ids \(2, 5\) int32: must be integers of shape \(2, 7\)",
        ),
        (None, {"window": 0}, "window = 0: must be at least 1"),
        (None, {"soft_cap": 0.0}, "soft_cap = 0.0: must be positive"),
        (None, {"implementation": "cudnn"}, "implementation='cudnn': it is one of auto, reference"),
        (None, {"implementation": "tpu"}, "'tpu' does not apply: this program is for a cpu"),
        (None, {"implementation": "gpu"}, "'gpu' does not apply: this program is for a cpu"),
        (None, {"implementation": "xla", "interpret": True}, "interpret is for the kernels tpu and gpu"),
        (
            (zeros(2, 2, 5, 264), zeros(2, 2, 7, 264), zeros(2, 2, 7, 264)),
            {"implementation": "tpu", "interpret": True},
            r"q \(2, 2, 5, 264\), k \(2, 2, 7, 264\) float32: head dimension 264 is not a multiple of 8 up to 256",
        ),
        (
            (zeros(2, 2, 5, 24), zeros(2, 2, 7, 24), zeros(2, 2, 7, 24)),
            {"implementation": "gpu", "interpret": True},
            "head dimension 24 is not a power of two from 16 to 128",
        ),
        (
            tuple(zeros(*shape, dtype=jnp.float16) for shape in (Q, K, K)),
            {"implementation": "tpu", "interpret": True},
            "dtype float16 is neither float32 nor bfloat16",
        ),
    ],
)
def test_what_does_not_fit_is_refused(arrays, options, message, unchecked_types):
    q, k, v = (zeros(*Q), zeros(*K), zeros(*K)) if arrays is None else arrays
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda q, k, v: flash_attention(q, k, v, **options), q, k, v)


@pytest.mark.parametrize(
    ("device", "queries", "keys", "width", "dtype", "expected"),
    [
        ("cpu", 2048, 2048, 128, "bfloat16", "xla"),
        ("NVIDIA H100 80GB HBM3", 2048, 2048, 128, "bfloat16", "gpu"),
        ("NVIDIA H200", 20, 160, 64, "bfloat16", "gpu"),
        ("NVIDIA H100 80GB HBM3", 2048, 2048, 128, "float32", "xla"),
        ("NVIDIA H100 80GB HBM3", 2048, 2048, 96, "bfloat16", "xla"),
        ("NVIDIA A100-SXM4-80GB", 2048, 2048, 128, "bfloat16", "xla"),
        ("tpu", 2048, 2048, 128, "bfloat16", "tpu"),
        ("tpu", 128, 128, 64, "float32", "tpu"),
        ("tpu", 127, 2048, 128, "bfloat16", "xla"),
        ("tpu", 2048, 127, 128, "bfloat16", "xla"),
        ("tpu", 2048, 2048, 512, "bfloat16", "xla"),
        ("tpu", 2048, 2048, 128, "float16", "xla"),
    ],
)
def test_auto(device, queries, keys, width, dtype, expected, monkeypatch):
    shapes = [(1, 1, length, width) for length in (queries, keys)]
    assert chosen(choose, device, monkeypatch, *shapes, dtype=dtype) == expected


def test_the_choice_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(platform, "_logged", set())
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        for _ in range(2):
            jax.eval_shape(flash_attention, zeros(*Q), zeros(*K), zeros(*K))
    assert caplog.messages == ["flash_attention, q (2, 4, 5, 16), k (2, 2, 7, 16) float32 on cpu: xla"]


def test_float64_is_kept():
    """By what is not a kernel: the decoder's own tests need it."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        q, k, v = (jnp.asarray(rng.normal(size=shape)) for shape in (Q, K, K))
        for implementation in ("reference", "xla"):
            call = functools.partial(flash_attention, causal=True, implementation=implementation)
            out, normalizers = quick_jit(functools.partial(call, return_log_normalizers=True))(q, k, v)
            assert out.dtype == normalizers.dtype == jnp.float64
            np.testing.assert_allclose(out[:, :, 0], np.repeat(v[:, :, 0], 2, axis=1), rtol=1e-14)
