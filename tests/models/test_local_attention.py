"""Local layers: a window counts the columns of a row, whatever computes it and wherever they lie.

What needs eight devices runs in a process of its own: ``python -m tests.models.test_local_attention``.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from coconut.analysis.traces import run_layers
from coconut.errors import CoconutError
from coconut.latent.feedback import Identity
from coconut.mesh import MeshConfig
from coconut.models.attention import attend
from coconut.models.cache import KeyValue
from coconut.models.config import DecoderConfig, ExecutionConfig
from coconut.models.decoder import Decoder
from coconut.models.local_config import LocalAttentionConfig
from coconut.models.parameters import abstract_decoder, decoder_of, decoder_parameters, parameter_axes
from coconut.models.segment_attention import attend_by_kernels, choose_attention
from coconut.models.stacking import in_layout_of
from coconut.models.visibility import Visibility
from coconut.sharding import make_mesh, parameter_sharding, row_sharding
from coconut.types import Schedule
from tests.latent.slow_rollout import (
    ONE_BLOCK,
    ONE_BLOCK_LENGTHS,
    TWO_BLOCKS,
    TWO_BLOCKS_LENGTHS,
    Rows,
    assert_close,
    library,
    make_rows,
    slow_loop,
    weighed,
)
from tests.tiny_models import GPT2_STYLE, LATENT_STYLE, LOCAL_STYLE, quick_jit, random_decoder, run_on_eight_devices

CONFIG = dataclasses.replace(LOCAL_STYLE, param_dtype="float64")


def loss_of(way: Callable[..., Any], rows: Rows, schedule: Schedule) -> Callable[..., Any]:
    return lambda decoder: weighed(way(decoder, Identity(), rows, schedule), rows, schedule)


def named(decoder: Decoder) -> dict[str, Any]:
    return {f"decoder.{name}": value for name, value in decoder_parameters(decoder).items()}


@pytest.fixture
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("execution", [{}, {"remat": "full"}, {"scan_layers": True}])
def test_thoughts_leave_a_window(execution: dict[str, Any]) -> None:
    """Rows with padding on the left, thoughts and language that are not there: values and gradients of the loop."""
    rows = make_rows(TWO_BLOCKS, TWO_BLOCKS_LENGTHS, CONFIG)
    plain, run = random_decoder(CONFIG), ExecutionConfig(dtype="float64", **execution)
    expected = quick_jit(jax.value_and_grad(loss_of(slow_loop, rows, TWO_BLOCKS)))(plain)
    own = in_layout_of(named(abstract_decoder(CONFIG, run)), named(plain))
    decoder = decoder_of(CONFIG, run, {name.removeprefix("decoder."): value for name, value in own.items()})
    value, gradients = quick_jit(jax.value_and_grad(loss_of(library, rows, TWO_BLOCKS)))(decoder)
    assert_close(value, expected[0])
    assert_close(in_layout_of(named(plain), named(gradients)), named(expected[1]))


@pytest.mark.usefixtures("float64")
def test_padding_is_no_part_of_a_window() -> None:
    """Each row is the row alone, without the columns that it does not use."""
    rows = make_rows(TWO_BLOCKS, TWO_BLOCKS_LENGTHS, CONFIG)
    decoder = random_decoder(CONFIG)

    @quick_jit
    def run(tokens: Array, positions: Array, valid: Array) -> Array:
        return decoder.trunk(decoder.embed(tokens), positions=positions, valid=valid)[0]

    together = np.asarray(run(rows.tokens, rows.positions, rows.valid))
    for row, valid in enumerate(np.asarray(rows.valid)):
        tokens = np.zeros((1, rows.tokens.shape[1]), np.int32)
        tokens[0, : valid.sum()] = np.asarray(rows.tokens)[row, valid]
        here = np.arange(tokens.shape[1])[None]
        alone = np.asarray(run(tokens, here.astype(np.int32), here < valid.sum()))
        np.testing.assert_allclose(together[row, valid], alone[0, : valid.sum()], rtol=0, atol=1e-10)


# Rows of segments: one padded on the left, one on the right, and one of which a row has nothing.
VALID = [
    np.asarray([[0, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 0]], bool),
    np.asarray([[1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 0]], bool),
    np.asarray([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1]], bool),
]


@pytest.mark.parametrize("window", [1, 3, 40])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("implementation", ["xla", pytest.param("tpu_interpret", marks=pytest.mark.slow)])
def test_kernels_see_what_masks_show(implementation: str, shared: bool, window: int) -> None:
    config = dataclasses.replace(
        LOCAL_STYLE, num_layers=1, local_attention=LocalAttentionConfig(window=window), query_pre_attention_scalar=None
    )
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    segments = [np.repeat(VALID[0][::2], 2, axis=0) if shared else VALID[0], *VALID[1:]]
    rows = [2 if shared else 4, 4, 4]
    sources = [
        KeyValue(draw(number, 2, valid.shape[1], 16), draw(number, 2, valid.shape[1], 16))
        for number, valid in zip(rows, segments, strict=True)
    ]
    *before, own = map(jnp.asarray, segments)
    query = draw(4, 4, own.shape[1], 16)
    masks, ranges = (Visibility(config, before, own, dense=dense).of_layer(0) for dense in (True, False))

    def by_masks(query: Array, sources: list[KeyValue]) -> Array:
        return attend(query, sources, masks)[0] * own[:, None, :, None]

    def by_kernels(query: Array, sources: list[KeyValue]) -> Array:
        return attend_by_kernels(query, sources, ranges, implementation, window=window)[0] * own[:, None, :, None]

    cotangent = draw(*query.shape)
    (expected, pull), (found, pull_back) = (jax.vjp(function, query, sources) for function in (by_masks, by_kernels))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), pull_back(cotangent), pull(cotangent)
    )


@pytest.mark.usefixtures("float64")
def test_what_an_analysis_sees_of_a_window() -> None:
    decoder, T = random_decoder(CONFIG), 7
    tokens, positions = jnp.arange(T)[None], jnp.arange(T)[None]
    valid, inputs = jnp.arange(T)[None] >= 1, decoder.embed(tokens)
    seen = run_layers(decoder, inputs, positions=positions, valid=valid, wanted=positions, with_weights=True)
    hidden, _ = decoder.trunk(inputs, positions=positions, valid=valid)
    np.testing.assert_allclose(seen.hidden[0, 1:], hidden[0, 1:], rtol=0, atol=1e-10)
    assert seen.weights is not None
    local, global_ = (np.asarray(layer)[0].any(0) for layer in seen.weights)
    columns = np.arange(1, T)
    back = columns[:, None] - np.arange(T)
    np.testing.assert_array_equal(local[1:], (back >= 0) & (back < 3) & (np.arange(T) >= 1))
    np.testing.assert_array_equal(global_[1:], (back >= 0) & (np.arange(T) >= 1))


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (LOCAL_STYLE.local_attention, {"window": 0}, r"LocalAttentionConfig.window = 0: must be from 1 to"),
        (LOCAL_STYLE.local_attention, {"pattern": ("local", "sliding")}, "LocalAttentionConfig.pattern = .*'sliding'"),
        (LOCAL_STYLE.local_attention, {"pattern": ("global",)}, "pattern = .*has no 'local' layer"),
        (LOCAL_STYLE.local_attention, {"rotary_base": 0.0}, "LocalAttentionConfig.rotary_base = 0.0: must be None, or"),
        (LOCAL_STYLE, {"num_layers": 1}, "pattern = .*has 2 layers, and DecoderConfig.num_layers = 1"),
        (GPT2_STYLE, {"local_attention": LOCAL_STYLE.local_attention}, "rotary_base = 50.0: needs rotary positions"),
        (LATENT_STYLE, {"local_attention": LocalAttentionConfig(window=2)}, "local_attention = .*needs None"),
        (GPT2_STYLE, {"norm_around_one": True}, "norm_around_one = True: needs normalization = 'rmsnorm'"),
    ],
)
def test_what_does_not_fit(config: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CoconutError, match=message):
        dataclasses.replace(config, **fields)


def test_kernels_and_layers_that_are_scanned() -> None:
    with pytest.raises(CoconutError, match=r"ExecutionConfig.attention = 'xla': layers that are scanned are one"):
        random_decoder(LOCAL_STYLE, scan_layers=True, attention="xla")
    alike = dataclasses.replace(LOCAL_STYLE, local_attention=LocalAttentionConfig(window=3))
    assert choose_attention(alike, ExecutionConfig(scan_layers=True, attention="xla")) == "xla"
    random_decoder(alike, scan_layers=True, attention="xla")


def test_patterns_repeat() -> None:
    local = lambda *pattern: LocalAttentionConfig(window=2, pattern=pattern)
    config = dataclasses.replace(LOCAL_STYLE, num_layers=8, local_attention=local("local", "local", "global"))
    assert [config.window_of(layer) for layer in range(8)] == [2, 2, None, 2, 2, None, 2, 2]
    assert local(*("local", "global") * 3, "local").shortest().pattern == ("local", "global")
    assert local("global", "local", "local").shortest().pattern == ("global", "local", "local")
    assert local("local", "local").shortest().pattern == ("local",)


# --- In a process of eight devices --------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_eight_devices() -> None:
    run_on_eight_devices("tests.models.test_local_attention")


MESH = MeshConfig(data=1, fsdp=2, sequence=2, tensor=2)


def check_mesh(config: DecoderConfig, tolerance: float, **execution: Any) -> None:
    """Loss and gradients through thoughts are those of the obvious loop on one device."""
    rows = make_rows(ONE_BLOCK, [*ONE_BLOCK_LENGTHS, [4, 2, 3]], config)
    expected, gradients = quick_jit(jax.value_and_grad(loss_of(slow_loop, rows, ONE_BLOCK)))(random_decoder(config))
    decoder = random_decoder(config, **execution)
    axes, mesh = parameter_axes(decoder), make_mesh(MESH)
    placed = {
        name: jax.device_put(value, parameter_sharding(name, value.shape, axes[name], mesh))
        for name, value in decoder_parameters(decoder).items()
    }
    compute = lambda decoder, rows: jax.value_and_grad(loss_of(library, rows, ONE_BLOCK))(decoder)
    with jax.set_mesh(mesh):
        there = jax.device_put(rows, row_sharding(mesh))
        value, own = jax.jit(compute)(decoder_of(config, decoder.execution, placed), there)
    close = functools.partial(assert_close, tolerance=tolerance)
    close(np.asarray(value), np.asarray(expected))
    close(jax.device_get(decoder_parameters(own)), jax.device_get(decoder_parameters(gradients)))
    print(config.param_dtype, execution, "equal")


if __name__ == "__main__":
    wide = dataclasses.replace(LOCAL_STYLE, vocab_size=24)
    check_mesh(wide, 1e-4, attention="xla")
    jax.config.update("jax_enable_x64", True)
    check_mesh(dataclasses.replace(wide, param_dtype="float64"), 1e-10)
    print("done")
