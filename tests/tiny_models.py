"""Decoders small enough to compile in a second, of both families, and a jit that compiles them quickly."""

import contextlib
import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coconut.models.adapters import AdapterConfig, add_adapters, is_adapter
from coconut.models.config import DecoderConfig, ExecutionConfig
from coconut.models.decoder import Decoder
from coconut.models.experts_config import ExpertsConfig
from coconut.models.latent_config import LatentAttentionConfig, YarnRotaryScaling
from coconut.models.local_config import LocalAttentionConfig
from coconut.models.parameters import abstract_decoder, decoder_parameters

# Standard deviations near those of trained weights, for attention and gradients that matter; 0.1 for all others.
SCALES = {".embedding": 0.5, ".kernel": 0.3}

GPT2_STYLE = DecoderConfig(
    vocab_size=23,
    num_layers=2,
    embed_dim=16,
    num_heads=2,
    max_positions=32,
)
LLAMA_STYLE = DecoderConfig(
    vocab_size=23,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=24,
    max_positions=32,
    position_embedding="rotary",
    normalization="rmsnorm",
    mlp="swiglu",
    qkv_bias=True,
    output_bias=False,
    mlp_bias=False,
    tied_head=False,
)
# Gemma 3's choices; a window shorter than any prompt, which thoughts leave.
LOCAL_STYLE = dataclasses.replace(
    LLAMA_STYLE,
    head_dim=16,
    qkv_bias=False,
    norm_placement="both",
    norm_around_one=True,
    mlp="geglu_tanh",
    query_key_norm=True,
    query_pre_attention_scalar=7,
    embedding_scale=4.0,
    tied_head=True,
    rotary_base=1000.0,
    local_attention=LocalAttentionConfig(window=3, pattern=("local", "global"), rotary_base=50.0),
)
# Latent vectors for queries, too; wavelengths of which one stays, one is stretched and two lie between.
LATENT_STYLE = dataclasses.replace(
    LLAMA_STYLE,
    num_kv_heads=None,
    latent_attention=LatentAttentionConfig(latent_dim=6, plain_dim=4, rotary_dim=8, value_dim=5, query_latent_dim=10),
    rotary_base=100.0,
    rotary_scaling=YarnRotaryScaling(
        factor=4.0, original_positions=16, beta_fast=2.0, beta_slow=0.2, mscale=0.7, mscale_all_dim=1.3
    ),
    output_bias=True,
)

EXPERTS_STYLE = dataclasses.replace(
    LATENT_STYLE,
    experts=ExpertsConfig(
        count=8,
        chosen=3,
        width=8,
        shared=1,
        first_layer=1,
        router="sigmoid",
        groups=4,
        groups_chosen=2,
        normalized=True,
        scaling=1.5,
    ),
)


def random_decoder(config: DecoderConfig, seed: int = 0, **execution: Any) -> Decoder:
    """A decoder none of whose parameters is at a special value: biases and norm scales are random, too.

    The numbers are numpy's: a decoder's own initialisers compile a program for every shape.

    Args:
      config: its config.
      seed: of the numbers.
      execution: fields of its `ExecutionConfig`, whose dtype is that of the parameters if it is not given.
    """
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        scale = next((scale for part, scale in SCALES.items() if part in name), 0.1)
        return jnp.asarray(scale * rng.normal(size=leaf.shape) + (".scale" in name), leaf.dtype)

    return jax.tree_util.tree_map_with_path(
        draw, abstract_decoder(config, ExecutionConfig(**{"dtype": config.param_dtype, **execution}))
    )


def random_adapters(decoder: Decoder, config: AdapterConfig) -> Decoder:
    """Adapters none of whose numbers is at its start."""
    abstract = jax.eval_shape(lambda: add_adapters(decoder, config, jax.random.key(0)))
    own, rng = decoder_parameters(decoder), np.random.default_rng(0)
    values = [
        jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype) if is_adapter(name) else own[name]
        for name, leaf in decoder_parameters(abstract).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract), values)


@functools.cache
def quick_options() -> dict[str, Any]:
    """XLA:CPU options that compile a rollout's gradient in a fifth of the time; none where this XLA has others.

    None on a device either: its tests are about what its compiler makes of a kernel.
    """
    if jax.default_backend() != "cpu":
        return {}
    options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda x: x, compiler_options=options)(jnp.zeros(()))
    except jax.errors.JaxRuntimeError:
        return {}
    return options


def process_environment(devices: int) -> dict[str, str]:
    """The environment of a process with so many CPU devices, whose programs are compiled quickly."""
    options = {"xla_force_host_platform_device_count": devices, **quick_options()}
    flags = " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def run_on_eight_devices(module: str, *arguments: str) -> str:
    """Runs ``python -m module`` with eight CPU devices, which has to end with ``done``; its standard error."""
    child = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=Path(__file__).parents[1],
        env=process_environment(devices=8),
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert child.stdout.split()[-1] == "done"
    return child.stderr


def quick_jit(function: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit` for programs that run a few times: most of the time of these tests would go into compiling them."""
    return jax.jit(function, compiler_options=quick_options(), **options)


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
    """The same for programs that the library compiles itself, as far as JAX can be told to."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
