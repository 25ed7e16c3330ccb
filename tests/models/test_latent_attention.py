"""Latent attention: both of its forms are one function, whatever runs it, and thoughts train through it exactly."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.errors import CoconutError
from coconut.latent.feedback import Identity
from coconut.methods import METHODS
from coconut.methods.kava import KavaOptions
from coconut.models.adapters import AdapterConfig, add_adapters, merge_adapters
from coconut.models.cache import Segment, empty_segment, take_rows
from coconut.models.config import ExecutionConfig
from coconut.models.decoder import Decoder
from coconut.models.latent_attention import LatentCache
from coconut.models.latent_config import LatentAttentionConfig, YarnRotaryScaling
from tests.latent.slow_rollout import ONE_BLOCK, ONE_BLOCK_LENGTHS, assert_close, library, make_rows, slow_loop, weighed
from tests.tiny_models import LATENT_STYLE, LLAMA_STYLE, quick_jit, random_adapters, random_decoder

CONFIG = dataclasses.replace(LATENT_STYLE, param_dtype="float64")
assert LATENT_STYLE.latent_attention is not None
PLAIN_QUERIES = dataclasses.replace(LATENT_STYLE.latent_attention, query_latent_dim=None, interleaved=False)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def one_pass(decoder: Decoder, inputs: jax.Array, valid: jax.Array) -> jax.Array:
    """Every column expanded."""
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), valid.shape)
    return decoder.trunk(inputs, positions=positions, valid=valid)[0]


def three_passes(decoder: Decoder, inputs: jax.Array, valid: jax.Array) -> jax.Array:
    """A prompt, then columns that look back on it, then one column written beside them: two forms in one row."""
    T = inputs.shape[1]
    positions = jnp.broadcast_to(jnp.arange(T), valid.shape)
    pieces, past = [], []
    for start, end in ((0, 4), (4, T - 1)):
        here = slice(start, end)
        hidden, kept = decoder.trunk(inputs[:, here], positions=positions[:, here], valid=valid[:, here], past=past)
        pieces.append(hidden)
        past.append(Segment(kept, valid[:, here], jnp.arange(start, end)))
    room = empty_segment(past[0].key_values, len(valid), jnp.arange(T - 1, T + 1))
    room = dataclasses.replace(room, valid=room.valid.at[:, 1].set(valid[:, -1]))
    last, _ = decoder.trunk(
        *(inputs[:, -1:],),
        positions=positions[:, -1:],
        valid=valid[:, -1:],
        past=[*past, room],
        write_at=jnp.asarray(1),
    )
    return jnp.concatenate([*pieces, last], 1)


@pytest.mark.parametrize("sizes", [LATENT_STYLE.latent_attention, PLAIN_QUERIES], ids=["query_latent", "plain"])
def test_absorbed_is_expanded(sizes: LatentAttentionConfig) -> None:
    decoder = random_decoder(dataclasses.replace(CONFIG, latent_attention=sizes))
    rng = np.random.default_rng(0)
    inputs, weights = (jnp.asarray(rng.normal(size=(2, 8, 16))) for _ in range(2))
    valid = jnp.arange(8) >= jnp.asarray([0, 2])[:, None]

    def of(run: Any) -> Any:
        def loss(decoder: Decoder, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
            hidden = jnp.where(valid[..., None], run(decoder, inputs, valid), 0.0)
            return jnp.sum(hidden * weights), hidden

        return quick_jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(decoder, inputs)

    ((_, expected), gradients), ((_, hidden), own) = of(one_pass), of(three_passes)
    assert_close(hidden, expected)
    assert_close(own, gradients)


def test_rows_share_a_prompt() -> None:
    decoder, rng = random_decoder(dataclasses.replace(CONFIG, num_layers=1)), np.random.default_rng(0)
    prompt, inputs = jnp.asarray(rng.normal(size=(1, 4, 16))), jnp.asarray(rng.normal(size=(3, 2, 16)))

    def seen(rows: int, start: int, end: int) -> dict[str, Any]:
        positions = jnp.broadcast_to(jnp.arange(start, end), (rows, end - start))
        return {"positions": positions, "valid": jnp.ones((rows, end - start), bool)}

    @quick_jit
    def run(decoder: Decoder) -> tuple[jax.Array, jax.Array]:
        _, kept = decoder.trunk(prompt, **seen(1, 0, 4))
        shared = Segment(kept, jnp.ones((1, 4), bool), jnp.arange(4))
        own = take_rows(shared, jnp.zeros(3, jnp.int32))
        shared, own = (decoder.trunk(inputs, past=[past], **seen(3, 4, 6))[0] for past in (shared, own))
        return shared, own

    assert_close(*run(decoder))


def test_what_is_kept_is_narrow() -> None:
    decoder = random_decoder(CONFIG)
    kept = jax.eval_shape(
        lambda x: decoder.trunk(x, positions=jnp.zeros((3, 7), int), valid=jnp.ones((3, 7), bool))[1],
        jnp.zeros((3, 7, 16)),
    )
    assert all(isinstance(layer, LatentCache) for layer in kept)
    assert [x.shape for x in jax.tree.leaves(kept[0])] == [(3, 7, 6), (3, 7, 8)]


@pytest.mark.parametrize(
    "execution",
    [
        {},
        *(
            pytest.param(way, marks=pytest.mark.slow)
            for way in ({"scan_layers": True, "remat": "full"}, {"remat": "dots"})
        ),
    ],
    ids=str,
)
def test_thoughts_train_exactly(execution: dict[str, Any]) -> None:
    with jax.enable_x64(True):
        decoder, rows = random_decoder(CONFIG, **execution), make_rows(ONE_BLOCK, ONE_BLOCK_LENGTHS, CONFIG)

        def program(run: Any) -> Any:
            def loss(decoder: Decoder) -> jax.Array:
                return weighed(run(decoder, Identity(), rows, ONE_BLOCK), rows, ONE_BLOCK)

            return quick_jit(jax.value_and_grad(loss))(decoder)

        expected, gradients = program(slow_loop)
        for path, leaf in jax.tree_util.tree_flatten_with_path(gradients)[0]:
            assert np.linalg.norm(leaf) > 1e-2, jax.tree_util.keystr(path)
        value, own = program(library)
        assert_close(value, expected)
        assert_close(own, gradients)


def test_adapters_on_every_matrix_and_merged() -> None:
    config = dataclasses.replace(CONFIG, num_layers=1)
    decoder = random_adapters(random_decoder(config), AdapterConfig(rank=2, alpha=3.0))
    inputs, valid = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 16))), jnp.ones((2, 8), bool)
    assert decoder.layers[0].attention.expansion.lora_a is not None
    expected = quick_jit(one_pass)(merge_adapters(decoder), inputs, valid)
    for run in (one_pass, three_passes):
        assert_close(quick_jit(run)(decoder, inputs, valid), expected)
    with pytest.raises(CoconutError, match=r"AdapterConfig.dropout = 0.1: layers.0.attention.expansion is taken in"):
        add_adapters(random_decoder(config), AdapterConfig(rank=2, alpha=3.0, dropout=0.1), jax.random.key(0))


def test_yarn_keeps_short_wavelengths_and_stretches_long_ones() -> None:
    scaling = YarnRotaryScaling(factor=40.0, original_positions=4096, mscale=1.0, mscale_all_dim=1.0)
    assert scaling.blended(64, 10_000.0) == (10, 23)  # DeepSeek V3's.
    assert scaling.attention_factor == 1.0
    np.testing.assert_allclose(scaling.score_factor, (0.1 * np.log(40.0) + 1.0) ** 2)
    assert dataclasses.replace(scaling, mscale_all_dim=None).score_factor == 1.0


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (LATENT_STYLE, {"num_kv_heads": 2}, "DecoderConfig.num_kv_heads = 2: latent_attention needs None"),
        (LATENT_STYLE, {"head_dim": 8}, "DecoderConfig.head_dim = 8: latent_attention needs None"),
        (LATENT_STYLE, {"normalization": "layernorm"}, "normalization = 'layernorm': latent_attention needs 'rmsnorm'"),
        (LATENT_STYLE, {"query_key_norm": True}, "query_key_norm = True: latent_attention needs False"),
        (LLAMA_STYLE, {"rotary_scaling": LATENT_STYLE.rotary_scaling}, "rotary_scaling = Yarn.*needs latent_attention"),
        (LATENT_STYLE.latent_attention, {"latent_dim": 0}, "LatentAttentionConfig.latent_dim = 0: must be from 1"),
        (LATENT_STYLE.latent_attention, {"rotary_dim": 7}, "LatentAttentionConfig.rotary_dim = 7: must be even"),
        (LATENT_STYLE.rotary_scaling, {"factor": 0.0}, "YarnRotaryScaling.factor = 0.0: must be positive"),
        (LATENT_STYLE.rotary_scaling, {"beta_slow": 0.0}, "YarnRotaryScaling.beta_slow = 0.0: must be from 1e-6"),
        (LATENT_STYLE, {"rotary_base": 1.0}, "DecoderConfig.rotary_base = 1.0: YaRN needs one above 1"),
        (LATENT_STYLE.rotary_scaling, {"beta_slow": 2.0}, "beta_fast = 2.0: must be larger than beta_slow = 2.0"),
        (LATENT_STYLE.rotary_scaling, {"mscale": -1.0}, "YarnRotaryScaling.mscale = -1.0: must be None, or at least 0"),
    ],
)
def test_what_does_not_fit_is_refused(config: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CoconutError, match=message):
        dataclasses.replace(config, **fields)


def test_kernels_and_kava_are_refused() -> None:
    with pytest.raises(CoconutError, match=r"method kava learns the keys and values of each head \(KavaOptions.cache"):
        METHODS["kava"].parts(KavaOptions(), LATENT_STYLE, jax.random.key(0))
    with pytest.raises(CoconutError, match=r"ExecutionConfig.attention = 'xla': the kernels read keys and values by"):
        ExecutionConfig(attention="xla").check(LATENT_STYLE)
    ExecutionConfig(attention="auto").check(LATENT_STYLE)
