"""Experts: what an obvious loop gives, the same for a column alone and beside others, on one device and on eight.

What needs eight devices runs in a process of its own: ``python -m tests.models.test_experts``.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from coconut.errors import CoconutError
from coconut.latent.feedback import Identity
from coconut.mesh import MeshConfig
from coconut.model import Template, make_model
from coconut.models.adapters import AdapterConfig, add_adapters
from coconut.models.config import DecoderConfig, ExecutionConfig
from coconut.models.decoder import Decoder
from coconut.models.experts import Experts, apply_all_experts, apply_experts
from coconut.models.experts_config import ExpertsConfig
from coconut.models.parameters import decoder_of, decoder_parameters, parameter_axes
from coconut.sharding import make_mesh, parameter_sharding, row_sharding
from pallas_kernels.grouped_product import grouped_product
from tests.latent.slow_rollout import ONE_BLOCK, ONE_BLOCK_LENGTHS, assert_close, library, make_rows, slow_loop, weighed
from tests.tiny_models import EXPERTS_STYLE, quick_jit, random_decoder, run_on_eight_devices

CONFIG = dataclasses.replace(EXPERTS_STYLE, param_dtype="float64")
assert EXPERTS_STYLE.experts is not None
SIGMOID = EXPERTS_STYLE.experts
SOFTMAX = dataclasses.replace(SIGMOID, router="softmax", normalized=False)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def with_experts(experts: ExpertsConfig, **fields: Any) -> DecoderConfig:
    return dataclasses.replace(CONFIG, experts=experts, **fields)


def experts_of(decoder: Decoder, layer: int = 1) -> Experts:
    return decoder.layers[layer].mlp


# --- An obvious loop, in numpy ------------------------------------------------------------------------------------


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def choose_slowly(module: Experts, x: np.ndarray) -> dict[int, float]:
    """The experts of one column, and their weights."""
    config, logits = module.config, x @ np.asarray(module.router.kernel[...])
    if config.router == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
        choice = scores + np.asarray(module.router.correction[...])
    else:
        scores = choice = np.exp(logits) / np.exp(logits).sum()
    grouped = choice.reshape(config.groups, -1)
    best = np.sort(grouped, 1)[:, -2:].sum(1) if config.router == "sigmoid" else grouped.max(1)
    groups = set(np.argsort(best)[-config.groups_chosen :]) if config.groups > 1 else set(range(config.groups))
    size = config.count // config.groups
    inside = [expert for expert in range(config.count) if expert // size in groups]
    chosen = sorted(inside, key=lambda expert: -choice[expert])[: config.chosen]
    total = sum(scores[expert] for expert in chosen) if config.normalized else 1.0
    return {expert: scores[expert] / total * config.scaling for expert in chosen}


def run_slowly(module: Experts, x: np.ndarray) -> np.ndarray:
    """One column, expert by expert."""
    gate, up, down = (np.asarray(matrix.kernel[...]) for matrix in (module.gate, module.up, module.down))
    routed = sum(
        weight * (silu(x @ gate[expert]) * (x @ up[expert])) @ down[expert]
        for expert, weight in choose_slowly(module, x).items()
    )
    shared = [np.asarray(getattr(module.shared, name).kernel[...]) for name in ("gate", "up", "down")]
    return routed + (silu(x @ shared[0]) * (x @ shared[1])) @ shared[2]


@pytest.mark.parametrize("bias", [0.0, -2.0], ids=["", "negative"])  # Scores below 0 are chosen before other groups'.
@pytest.mark.parametrize(
    "experts",
    [SIGMOID, SOFTMAX, dataclasses.replace(SOFTMAX, groups=1, groups_chosen=1), dataclasses.replace(SIGMOID, chosen=1)],
    ids=["sigmoid", "softmax", "greedy", "one"],
)
def test_every_column_gets_what_an_obvious_loop_gives(experts: ExpertsConfig, bias: float) -> None:
    module = experts_of(random_decoder(with_experts(experts)))
    if experts.router == "sigmoid":
        module.router.correction[...] += bias
    x = np.random.default_rng(1).normal(size=(2, 7, 16))
    expected = np.stack([[run_slowly(module, column) for column in row] for row in x])
    assert_close(quick_jit(lambda module, x: module(x))(module, jnp.asarray(x)), expected)
    used = {expert for row in x for column in row for expert in choose_slowly(module, column)}
    assert len(used) > experts.count // 2


def test_a_column_is_the_same_whatever_its_neighbours_are() -> None:
    """Where all crowd into the same experts, too: nothing is dropped."""
    decoder = random_decoder(CONFIG)
    module, rng = experts_of(decoder), np.random.default_rng(1)
    run = quick_jit(lambda module, x: module(x))
    x = jnp.asarray(rng.normal(size=(2, 7, 16)))
    others = jnp.asarray(rng.normal(size=(2, 7, 16))).at[:, 3].set(x[:, 3])
    crowd = jnp.broadcast_to(x[:1, 3:4], x.shape)
    alone = run(module, x[:, 3:4])
    np.testing.assert_allclose(run(module, x)[:, 3:4], alone, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(run(module, others)[:, 3:4], alone, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(run(module, crowd), jnp.broadcast_to(alone[:1], x.shape), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("length", [1, 7])
def test_groups_and_a_dense_product_give_the_same(length: int) -> None:
    """A single CPU computes all experts, anything else those chosen."""
    module, rng = experts_of(random_decoder(CONFIG)), np.random.default_rng(1)
    x, pull = (jnp.asarray(rng.normal(size=(2, length, 16))) for _ in range(2))
    matrices = [matrix.kernel[...] for matrix in (module.gate, module.up, module.down)]
    chosen, weights = module.router(x)
    given = (x, weights, *matrices)
    loss = lambda apply: lambda x, weights, *matrices: jnp.vdot(apply(x, chosen, weights, *matrices), pull)
    ours, theirs = (
        quick_jit(jax.value_and_grad(loss(apply), argnums=range(len(given))))(*given)
        for apply in (apply_all_experts, apply_experts)
    )
    assert_close(ours, theirs)


def test_the_kernel_of_a_tpu_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    x, weights, *matrices, pull = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, 7, 16), (2, 7, 2), (4, 16, 12), (4, 16, 12), (4, 12, 16), (2, 7, 16))
    )
    chosen = jnp.asarray(rng.integers(0, 3, (2, 7, 2)), jnp.int32)  # Nobody chooses the last one.
    loss = lambda *given: jnp.vdot(apply_experts(given[0], chosen, *given[1:]), pull)
    compute = jax.value_and_grad(loss, argnums=range(5))
    expected = compute(x, weights, *matrices)
    kernel = functools.partial(grouped_product, implementation="tpu", interpret=True)
    monkeypatch.setattr("coconut.models.experts.grouped_product", kernel)
    for ours, theirs in zip(*map(jax.tree.leaves, (compute(x, weights, *matrices), expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def loss_of(run: Any, rows: Any) -> Any:
    return lambda decoder: weighed(run(decoder, Identity(), rows, ONE_BLOCK), rows, ONE_BLOCK)


@pytest.mark.parametrize(
    ("experts", "execution"),
    [
        (SIGMOID, {}),
        pytest.param(
            dataclasses.replace(SOFTMAX, first_layer=0), {"scan_layers": True, "remat": "full"}, marks=pytest.mark.slow
        ),
    ],
    ids=["sigmoid", "softmax, scanned"],
)
def test_thoughts_train_exactly(experts: ExpertsConfig, execution: dict[str, Any]) -> None:
    config = with_experts(experts)
    decoder, rows = random_decoder(config, **execution), make_rows(ONE_BLOCK, ONE_BLOCK_LENGTHS, config)
    expected, gradients = quick_jit(jax.value_and_grad(loss_of(slow_loop, rows)))(decoder)
    value, own = quick_jit(jax.value_and_grad(loss_of(library, rows)))(decoder)
    for name, gradient in decoder_parameters(gradients).items():
        assert (np.linalg.norm(gradient) > 1e-3) == (not name.endswith("correction")), name
    assert_close(value, expected)
    assert_close(own, gradients)


@pytest.mark.slow
def test_with_a_capacity_the_gradient_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why there is none: a thought alone keeps the expert that it would lose beside others, in the parallel pass."""

    def limited(x: Any, chosen: Any, weights: Any, *matrices: Any) -> Any:
        own = chosen.reshape(-1)
        before = jnp.tril(own[:, None] == own, -1).sum(1).reshape(chosen.shape)
        return apply_experts(x, chosen, jnp.where(before < 1, weights, 0.0), *matrices)

    def gap() -> float:
        decoder, rows = random_decoder(CONFIG), make_rows(ONE_BLOCK, ONE_BLOCK_LENGTHS, CONFIG)
        gradients = []
        for gradient in ("implicit", "autodiff"):
            loss = loss_of(functools.partial(library, gradient=gradient), rows)
            gradients.append(quick_jit(jax.grad(loss))(decoder))
        norm = lambda tree: float(jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree))))
        return norm(jax.tree.map(jnp.subtract, *gradients)) / norm(gradients[1])

    assert gap() < 1e-10
    monkeypatch.setattr("coconut.models.experts.apply_all_experts", limited)
    assert gap() > 1e-2


def test_the_correction_bias_is_no_trained_parameter() -> None:
    model = jax.eval_shape(lambda: make_model(CONFIG, jax.random.key(0)))
    template = Template.of(model)
    assert template.axes.keys() - template.trained == {"decoder.layers.1.mlp.router.correction"}


def test_routers_stay_in_float32() -> None:
    decoder = random_decoder(dataclasses.replace(EXPERTS_STYLE, param_dtype="bfloat16"))
    wide = {name for name, leaf in decoder_parameters(decoder).items() if leaf.dtype == jnp.float32}
    assert wide == {"layers.1.mlp.router.kernel", "layers.1.mlp.router.correction"}
    made = experts_of(decoder)(jnp.ones((1, 2, 16), jnp.bfloat16))
    assert made.dtype == jnp.bfloat16


def test_adapters_where_layers_differ() -> None:
    decoder = random_decoder(EXPERTS_STYLE)
    adapted = add_adapters(decoder, AdapterConfig(rank=2, alpha=1.0, targets=("layers.*.mlp.*",)), jax.random.key(0))
    names = {name.removesuffix(".lora_a") for name in decoder_parameters(adapted) if name.endswith(".lora_a")}
    assert names == {f"layers.{at}.{part}" for at in ("0.mlp", "1.mlp.shared") for part in ("up", "gate", "down")}
    with pytest.raises(CoconutError, match=r"'layers.0.mlp.shared.up' fits no matrix"):
        add_adapters(decoder, AdapterConfig(rank=2, alpha=1.0, targets=("layers.0.mlp.shared.up",)), jax.random.key(0))


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (SIGMOID, {"groups": 3}, "ExpertsConfig.groups = 3: must divide count = 8"),
        (SIGMOID, {"groups": 8, "groups_chosen": 4}, "ExpertsConfig.groups = 8: of count = 8 experts must have two"),
        (SIGMOID, {"groups_chosen": 5}, "ExpertsConfig.groups_chosen = 5: must be at most groups = 4"),
        (SIGMOID, {"chosen": 5}, "ExpertsConfig.chosen = 5: must be at most the 4 experts of groups_chosen = 2"),
        (SIGMOID, {"router": "tanh"}, "ExpertsConfig.router = 'tanh'"),
        (SOFTMAX, {"normalized": True}, "ExpertsConfig.normalized = True: is for the sigmoid router alone"),
        (SIGMOID, {"scaling": 0.0}, "ExpertsConfig.scaling = 0.0: must be positive"),
        (SIGMOID, {"count": 2**20}, "ExpertsConfig.count = 1048576: must be at most 10,000"),
        (SIGMOID, {"shared": 2**30}, "ExpertsConfig.shared = 1073741824: times width = 8 is more than"),
        (SIGMOID, {"shared": -1}, "ExpertsConfig.shared = -1: must be from 0"),
        (EXPERTS_STYLE, {"num_layers": 1}, "DecoderConfig.experts = .*first_layer must be less than num_layers = 1"),
        (EXPERTS_STYLE, {"mlp": "gelu"}, "DecoderConfig.experts = .*need mlp = 'swiglu'"),
    ],
)
def test_what_does_not_fit_is_refused(config: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CoconutError, match=message):
        dataclasses.replace(config, **fields)


def test_layers_that_differ_are_not_scanned() -> None:
    message = (
        r"ExecutionConfig.scan_layers = True: ExpertsConfig.first_layer = 1: layers that are scanned must be alike"
    )
    with pytest.raises(CoconutError, match=message):
        Decoder(EXPERTS_STYLE, ExecutionConfig(scan_layers=True), rngs=nnx.Rngs(0))


# --- In a process of eight devices --------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_eight_devices() -> None:
    run_on_eight_devices("tests.models.test_experts")


# Every mesh axis splits something, and the experts of one lie on two devices.
MESHES = [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=2, sequence=2, tensor=2)]


def check_meshes() -> None:
    """Loss and gradients through thoughts are those of the obvious loop on one device."""
    jax.config.update("jax_enable_x64", True)
    config = dataclasses.replace(CONFIG, vocab_size=24)
    decoder, rows = random_decoder(config), make_rows(ONE_BLOCK, [*ONE_BLOCK_LENGTHS, [4, 2, 3]], config)
    expected, gradients = quick_jit(jax.value_and_grad(loss_of(slow_loop, rows)))(decoder)
    axes = parameter_axes(decoder)
    for size in MESHES:
        mesh = make_mesh(size)
        placed = {
            name: jax.device_put(value, parameter_sharding(name, value.shape, axes[name], mesh))
            for name, value in decoder_parameters(decoder).items()
        }
        with jax.set_mesh(mesh):
            there = jax.device_put(rows, row_sharding(mesh))
            compute = jax.jit(lambda decoder, rows: jax.value_and_grad(loss_of(library, rows))(decoder))
            value, own = compute(decoder_of(config, decoder.execution, placed), there)
        assert_close(np.asarray(value), np.asarray(expected))
        assert_close(jax.device_get(decoder_parameters(own)), jax.device_get(decoder_parameters(gradients)))
        print(size, "equal")


if __name__ == "__main__":
    check_meshes()
    print("done")
