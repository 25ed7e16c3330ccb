"""Low-rank adapters: what they compute and how it is derived, against matrices that hold them; what is trained.

In float64, so that tolerances are those of the arithmetic.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from coconut.errors import CoconutError
from coconut.latent.feedback import Identity
from coconut.latent.rollout import rollout
from coconut.mesh import MESH_AXES
from coconut.methods import METHODS
from coconut.model import Model, parameters_of
from coconut.models.adapters import AdapterConfig, add_adapters, is_adapter, merge_adapters
from coconut.models.config import DecoderConfig, ExecutionConfig
from coconut.models.decoder import Decoder
from coconut.models.dropout import Dropout
from coconut.models.parameters import abstract_decoder, decoder_of, decoder_parameters, parameter_axes
from coconut.models.stacking import in_layout_of
from coconut.sharding import parameter_sharding
from coconut.tokenizers import symbol_tokenizer
from coconut.training.optimizer import OptimizerConfig, make_optimizer
from coconut.training.setup import token_ids
from coconut.training.state import make_state, template_of
from coconut.training.step import make_train_step
from coconut.types import Language, Latent, Schedule
from tests.tiny_models import GPT2_STYLE, LLAMA_STYLE, quick_compilation, quick_jit, random_adapters, random_decoder
from tests.tiny_pages import aligned, one_block, thinking_page
from tests.tiny_runs import tiny_run

# Tied to its head, so that a trained row is one of the head, too.
CONFIG = dataclasses.replace(GPT2_STYLE, num_layers=1, param_dtype="float64")
ADAPTER = AdapterConfig(rank=3, alpha=6.0, targets=("layers.*.attention.*", "layers.*.mlp.down"), trained_rows=(5, 2))
SCHEDULE: Schedule = (Language(3, 1), Latent(3), Language(3, 2))
LENGTHS = np.asarray([[3, 3, 3], [2, 1, 2]])


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def looked_at(decoder: Decoder, key: Any = None) -> jax.Array:
    """A number that depends on everything a rollout with thoughts returns, in rows that use columns differently."""
    T = sum(span.length for span in SCHEDULE)
    valid = np.concatenate(
        [
            np.arange(span.length) < own[:, None] if index else np.arange(span.length) >= span.length - own[:, None]
            for index, (span, own) in enumerate(zip(SCHEDULE, LENGTHS.T, strict=True))
        ],
        axis=1,
    )
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocabulary, (2, T))
    tokens[:, -2], tokens[0, 1] = 5, 2  # rows that are trained
    output = rollout(
        decoder,
        SCHEDULE,
        tokens=jnp.asarray(tokens, jnp.int32),
        positions=jnp.asarray(np.maximum(np.cumsum(valid, 1) - 1, 0), jnp.int32),
        valid=jnp.asarray(valid),
        dropout_key=key,
    )
    seen = (decoder.unembed(output.predictors), output.last, *output.thoughts)
    return sum((jnp.sin(x + index).sum() for index, x in enumerate(seen)), jnp.zeros(()))


def of_parameters(like: Decoder, parameters: dict[str, Any]) -> Decoder:
    return jax.tree.unflatten(jax.tree.structure(like), list(parameters.values()))


def dense(decoder: Decoder) -> Decoder:
    """The decoder whose matrices are ``W + 2 A B``, and whose table has the trained rows."""
    own = decoder_parameters(decoder)
    plain = {name: value for name, value in own.items() if not is_adapter(name)}
    for name in own:
        if name.endswith("lora_a"):
            module = name.removesuffix("lora_a")
            plain[f"{module}kernel"] = own[f"{module}kernel"] + 2.0 * own[name] @ own[f"{module}lora_b"]
    for index, token in enumerate(ADAPTER.trained_rows):
        row = own["tokens.trained_rows"][index]
        plain["tokens.embedding"] = plain["tokens.embedding"].at[token].set(row)
    return decoder_of(decoder.config, decoder.execution, plain)


def derivative(decoder: Decoder, function: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The value of a function of a decoder, and its derivative by all that is an adapter's."""
    every = decoder_parameters(decoder)
    adapters = {name: value for name, value in every.items() if is_adapter(name)}
    return quick_jit(jax.value_and_grad(lambda own: function(of_parameters(decoder, {**every, **own}))))(adapters)


def fresh_adapters(decoder: Decoder, adapter: AdapterConfig = ADAPTER) -> Decoder:
    return quick_jit(lambda decoder: add_adapters(decoder, adapter, jax.random.key(0)))(decoder)


def abstract_adapters(config: DecoderConfig, adapter: AdapterConfig = ADAPTER, **execution: Any) -> Decoder:
    plain = abstract_decoder(config, ExecutionConfig(**execution))
    return jax.eval_shape(lambda decoder: add_adapters(decoder, adapter, jax.random.key(0)), plain)


def assert_close(ours: Any, theirs: Any, tolerance: float = 1e-11) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=tolerance, atol=tolerance, err_msg=name)


# --- What is computed -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gradients_are_those_of_the_dense_matrices() -> None:
    decoder = random_adapters(random_decoder(CONFIG), ADAPTER)
    value, gradients = derivative(decoder, looked_at)
    expected, expected_gradients = derivative(decoder, lambda decoder: looked_at(dense(decoder)))
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert_close(gradients, expected_gradients)
    assert all(np.abs(gradient).max() > 1e-3 for gradient in gradients.values())
    assert_close(decoder_parameters(merge_adapters(decoder)), decoder_parameters(dense(decoder)), 1e-15)


@pytest.mark.slow
def test_dropout_drops_the_same_units_wherever_a_column_is_computed() -> None:
    """A thought is made alone, and its gradient beside its neighbours: it is that of other numbers with other masks."""
    adapter = dataclasses.replace(ADAPTER, targets=("layers.*.mlp.down", "layers.*.attention.query"), dropout=0.4)
    decoder = random_adapters(random_decoder(CONFIG), adapter)
    every = decoder_parameters(decoder)
    start = {name: value for name, value in every.items() if is_adapter(name)}
    derive = quick_jit(
        jax.value_and_grad(lambda own: looked_at(of_parameters(decoder, {**every, **own}), jax.random.key(3)))
    )
    rng = np.random.default_rng(4)
    direction = {name: jnp.asarray(rng.normal(size=value.shape)) for name, value in start.items()}
    slope = sum(float(jnp.vdot(gradient, direction[name])) for name, gradient in derive(start)[1].items())
    at = lambda step: float(derive({name: value + step * direction[name] for name, value in start.items()})[0])
    assert slope == pytest.approx((at(1e-5) - at(-1e-5)) / 2e-5, rel=1e-6)


@quick_jit
def hidden_states(decoder: Decoder, key: Any = None) -> jax.Array:
    """Of one plain pass; with a key for dropout at the adapters' rate."""
    tokens = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
    dropout = None if key is None else Dropout(key, jnp.arange(4), 4, decoder.config.dropout)
    positions, valid = jnp.broadcast_to(jnp.arange(4), (2, 4)), jnp.ones((2, 4), bool)
    return decoder.trunk(decoder.embed(tokens), positions=positions, valid=valid, dropout=dropout)[0]


def test_an_adapter_changes_nothing_at_its_start_and_drops_its_own_inputs_alone() -> None:
    decoder = random_decoder(CONFIG)
    adapted = fresh_adapters(decoder, dataclasses.replace(ADAPTER, dropout=0.4))
    start = hidden_states(decoder)
    np.testing.assert_allclose(hidden_states(adapted, jax.random.key(0)), start, rtol=1e-13)
    moved = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.1 * ("lora_b" in jax.tree_util.keystr(path)), adapted
    )
    first, second, undropped = (hidden_states(moved, key) for key in (jax.random.key(0), jax.random.key(1), None))
    assert all(np.abs(a - b).max() > 1e-3 for a, b in ((first, second), (first, undropped), (undropped, start)))


def test_stacked_layers_start_from_the_same_adapters_and_compute_the_same() -> None:
    config = dataclasses.replace(CONFIG, num_layers=2)
    one_by_one, stacked = (random_decoder(config, scan_layers=scan_layers) for scan_layers in (False, True))
    own, other = (decoder_parameters(fresh_adapters(decoder)) for decoder in (one_by_one, stacked))
    draws = [np.asarray(value) for name, value in own.items() if name.endswith("lora_a")]
    assert len({draw.tobytes() for draw in draws}) == len(draws) == 10, "each matrix has its own"
    for draw in draws:
        assert 0.8 < np.abs(draw).max() * len(draw) ** 0.5 < 1 and abs(draw.mean()) * len(draw) ** 0.5 < 0.25
    layers = [own[f"layers.{index}.mlp.down.lora_a"] for index in range(2)]
    np.testing.assert_allclose(other["layers.mlp.down.lora_a"], layers, rtol=1e-14)
    # The same numbers in both layouts, with B at no special value.
    first, second = random_adapters(one_by_one, ADAPTER), random_adapters(stacked, ADAPTER)
    named = lambda decoder: {f"decoder.{name}": value for name, value in decoder_parameters(decoder).items()}
    values = in_layout_of(named(second), named(first))
    second = of_parameters(second, {name: values[f"decoder.{name}"] for name in decoder_parameters(second)})
    np.testing.assert_allclose(hidden_states(second), hidden_states(first), rtol=1e-12)
    merged = named(merge_adapters(first))
    assert_close(in_layout_of(merged, named(merge_adapters(second))), merged, 1e-15)


def test_adapters_of_a_decoder_in_bfloat16_are_kept_in_float32() -> None:
    config = dataclasses.replace(CONFIG, param_dtype="bfloat16")
    adapted = decoder_parameters(abstract_adapters(config))
    assert {value.dtype.name for name, value in adapted.items() if is_adapter(name)} == {"float32"}
    assert {value.dtype.name for name, value in adapted.items() if not is_adapter(name)} == {"bfloat16"}


# --- What is trained --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_adapters_and_chosen_rows_are_trained_and_nothing_else_is() -> None:
    decoder = random_adapters(random_decoder(CONFIG), ADAPTER)
    model = Model(decoder, {"feedback": Identity()})
    template = template_of(tiny_run(adapter=ADAPTER), model)
    assert template.trained == {name for name in parameters_of(model) if is_adapter(name)}
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1))
    state = make_state(template, parameters_of(model), optimizer)
    before = jax.tree.map(np.asarray, state.parameters)
    moments = [
        str(path[-1].key)
        for path, _ in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
        if isinstance(path[-1], jax.tree_util.DictKey)
    ]
    assert sorted(moments) == sorted([*template.trained] * 2)
    tokenizer = symbol_tokenizer([str(number) for number in range(CONFIG.vocabulary - 4)])
    draw = lambda length: np.random.default_rng(length).integers(0, 19, length).astype(np.int32)
    pages = [thinking_page(tokenizer, draw(4), 3, draw(4)), thinking_page(tokenizer, draw(3), 2, draw(4))]
    views = {"main": jax.tree.map(jnp.asarray, aligned(pages, one_block(5, 3, 6), tokenizer))}
    step = make_train_step(template, METHODS["coconut"], optimizer)
    with quick_compilation():
        compiled = step.lower(state, views, 0.1, jax.random.key(0)).compile()  # pyright: ignore[reportFunctionMemberAccess]
    after, metrics = compiled(state, views, 0.1, jax.random.key(0))
    assert metrics["gradient_norm"].mean() > 0
    for name, value in after.parameters.items():
        assert (np.asarray(value) == before[name]).all() == (not is_adapter(name)), name
    # Weight gradients of the MLP, which nobody wants, would be formed by products of this shape.
    made = re.findall(r"= f\d+\[(\d+),(\d+)\]\S* dot\(", compiled.as_text())
    assert made and not {("16", "64"), ("64", "16")} & set(made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "AdapterConfig.rank = 0: must be at least 1"),
        ({"rank": 2.0}, "AdapterConfig.rank = 2.0: must be int"),
        ({"alpha": 0.0}, "AdapterConfig.alpha = 0.0: must be positive"),
        ({"alpha": float("inf")}, "AdapterConfig.alpha = inf: must be positive"),
        ({"dropout": 1.0}, "AdapterConfig.dropout = 1.0: must be in [0, 1)"),
        ({"targets": ()}, "AdapterConfig.targets = (): must name a matrix"),
        ({"trained_rows": (1, 1)}, "AdapterConfig.trained_rows = (1, 1): a token stands there twice"),
        ({"targets": ("layers.*", "*.c_attn")}, "'*.c_attn' fits no matrix; there are layers.*.attention.key, layers"),
        ({"targets": ("head",)}, "'head' fits no matrix"),
        ({"targets": ("layers.0.*",)}, "some layers alone have layers.*.attention.key, which ExecutionConfig.scan_lay"),
        ({"trained_rows": (23,)}, "AdapterConfig.trained_rows = (23,): 23 is no id of a token, which run from 0 to 22"),
        ({"trained_rows": ("eos",)}, "'eos' is no id of a token"),
    ],
)
def test_what_fits_no_decoder_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CoconutError, match=re.escape(message)):
        config = AdapterConfig(**{"rank": 2, "alpha": 2.0, **changes})
        abstract_adapters(dataclasses.replace(CONFIG, num_layers=2), config, scan_layers=True)


def test_targets_and_scalings() -> None:
    adapter = AdapterConfig(rank=4, alpha=2.0, targets=("layers.1.mlp.gate", "layers.*.attention.value"))
    found = decoder_parameters(abstract_adapters(LLAMA_STYLE, adapter))
    own = [name.removesuffix(".lora_a") for name in found if name.endswith("lora_a")]
    assert own == ["layers.0.attention.value", "layers.1.attention.value", "layers.1.mlp.gate"]
    assert (adapter.scaling, dataclasses.replace(adapter, rank_stabilized=True).scaling) == (0.5, 1.0)


def test_adapters_lie_on_a_mesh_as_their_matrices_do() -> None:
    adapted = abstract_adapters(CONFIG)
    mesh, axes, shapes = AbstractMesh((1, 2, 1, 2), MESH_AXES), parameter_axes(adapted), decoder_parameters(adapted)
    spec = lambda name: parameter_sharding(name, shapes[name].shape, axes[name], mesh).spec
    assert spec("layers.0.mlp.down.lora_a") == PartitionSpec("tensor", None)
    assert spec("layers.0.mlp.down.lora_b") == PartitionSpec(None, "fsdp")
    assert spec("layers.0.attention.query.lora_b") == PartitionSpec(None, "tensor")
    assert spec("tokens.trained_rows") == PartitionSpec(None, "fsdp")


def test_tokens_by_name() -> None:
    tokenizer = symbol_tokenizer(["a", "b"])
    ids = token_ids(("latent", "b", "eos", 0, "<|latent|>"), tokenizer, "AdapterConfig.trained_rows")
    assert ids == tuple(sorted({0, *tokenizer.encode("b"), tokenizer.eos_id, tokenizer.latent_id}))
    with pytest.raises(CoconutError, match=r"AdapterConfig.trained_rows = \('a b',\): the tokenizer makes 2 tokens of"):
        token_ids(("a b",), tokenizer, "AdapterConfig.trained_rows")
