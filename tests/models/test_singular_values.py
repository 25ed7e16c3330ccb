"""Scales of singular values: what they compute and how it is derived, against matrices that hold them.

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
from coconut.mesh import MESH_AXES
from coconut.models.adapters import add_singular_values, is_adapter, is_trained_adapter, merge_adapters
from coconut.models.config import DecoderConfig, ExecutionConfig
from coconut.models.decoder import Decoder
from coconut.models.parameters import abstract_decoder, decoder_of, decoder_parameters, parameter_axes
from coconut.models.singular_values import ScaleForm, SingularValueConfig
from coconut.sharding import parameter_sharding
from coconut.training.config import from_json, to_json
from tests.models.test_adapters import assert_close, derivative, hidden_states, looked_at, of_parameters
from tests.tiny_models import EXPERTS_STYLE, GPT2_STYLE, quick_jit, random_decoder
from tests.tiny_runs import BASE, tiny_run

CONFIG = dataclasses.replace(GPT2_STYLE, num_layers=1, param_dtype="float64")
TARGETS = ("layers.*.attention.*", "layers.*.mlp.down")
FORMS: tuple[ScaleForm, ...] = ("scales", "masks")


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def scaled(decoder: Decoder, form: ScaleForm = "scales", targets: tuple[str, ...] = TARGETS, **other: Any) -> Decoder:
    config = SingularValueConfig(form=form, targets=targets, **other)
    return quick_jit(lambda decoder: add_singular_values(decoder, config, jax.random.key(0)))(decoder)


def moved(decoder: Decoder) -> Decoder:
    """With vectors none of whose numbers is at its start."""
    rng = np.random.default_rng(0)
    own = {
        name: value + 0.5 * rng.normal(size=value.shape) if is_trained_adapter(name) else value
        for name, value in decoder_parameters(decoder).items()
    }
    return of_parameters(decoder, own)


def dense(decoder: Decoder, plain: Decoder, form: ScaleForm) -> Decoder:
    """The decoder whose matrices are ``U diag(s scale) V`` of a decomposition made here."""
    own, matrices = decoder_parameters(decoder), decoder_parameters(plain)
    for name, z in own.items():
        if name.endswith("singular_z"):
            kernel = f"{name.removesuffix('singular_z')}kernel"
            # Numpy's own decomposition may have other signs, which fall out of the product.
            left, values, right = np.linalg.svd(np.asarray(matrices[kernel]), full_matrices=False)
            scale = z
            if form == "masks":
                mask = 1 / (1 + jnp.exp(-z))
                scale = mask * values.sum(-1, keepdims=True) / (values * mask).sum(-1, keepdims=True)
            matrices[kernel] = jnp.einsum("...dr,...r,...rf->...df", left, values * scale, right)
    return decoder_of(plain.config, plain.execution, matrices)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_are_those_of_the_dense_matrices(form: ScaleForm) -> None:
    plain = random_decoder(CONFIG)
    decoder = moved(scaled(plain, form))
    own = decoder_parameters(decoder)
    value, gradients = derivative(decoder, looked_at)
    expected, expected_gradients = derivative(decoder, lambda decoder: looked_at(dense(decoder, plain, form)))
    np.testing.assert_allclose(value, expected, rtol=1e-11)
    trained = [name for name in own if is_trained_adapter(name)]
    assert [own[name].shape for name in trained] == [(16,)] * 5
    pick = lambda gradients: {name: gradients[name] for name in trained}
    assert_close(pick(gradients), pick(expected_gradients), 1e-9)
    assert all(np.abs(gradients[name]).max() > 1e-4 for name in trained)
    assert_close(decoder_parameters(merge_adapters(decoder)), decoder_parameters(dense(decoder, plain, form)), 1e-12)


def test_a_vector_changes_nothing_at_its_start() -> None:
    decoder = random_decoder(CONFIG)
    start = hidden_states(decoder)
    fresh = scaled(decoder)
    np.testing.assert_array_equal(hidden_states(fresh), start)
    assert_close(decoder_parameters(merge_adapters(fresh)), decoder_parameters(decoder), 0)
    # Masks start near each other, not at each other.
    change = np.abs(hidden_states(scaled(decoder, "masks")) - start).max()
    assert 0 < change < 0.05
    assert np.abs(hidden_states(moved(fresh)) - start).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [False, True])
def test_merged_is_unmerged_of_latent_attention_and_of_stacked_layers(scan_layers: bool) -> None:
    config = dataclasses.replace(GPT2_STYLE if scan_layers else EXPERTS_STYLE, param_dtype="float64")
    decoder = moved(scaled(random_decoder(config, scan_layers=scan_layers), "masks", ("layers.*",)))
    merged = merge_adapters(decoder)
    assert not any(map(is_adapter, decoder_parameters(merged)))
    np.testing.assert_allclose(hidden_states(decoder), hidden_states(merged), rtol=1e-9, atol=1e-11)


def test_factors_of_a_decoder_in_bfloat16_and_their_places_on_a_mesh() -> None:
    config = dataclasses.replace(CONFIG, param_dtype="bfloat16")
    make = lambda decoder: add_singular_values(decoder, SingularValueConfig(), jax.random.key(0))
    abstract = jax.eval_shape(make, abstract_decoder(config, ExecutionConfig()))
    own, axes = decoder_parameters(abstract), parameter_axes(abstract)
    kinds = {leaf: own[f"layers.0.mlp.up.singular_{leaf}"].dtype.name for leaf in "usvz"}
    assert kinds == {"u": "bfloat16", "s": "float32", "v": "bfloat16", "z": "float32"}
    assert "layers.0.attention.query.singular_z" not in own
    mesh = AbstractMesh((1, 2, 1, 2), MESH_AXES)
    spec = lambda name: parameter_sharding(name, own[name].shape, axes[name], mesh).spec
    assert spec("layers.0.mlp.down.singular_u") == PartitionSpec("tensor", None)
    assert spec("layers.0.mlp.down.singular_v") == PartitionSpec(None, "fsdp")
    assert spec("layers.0.mlp.down.singular_z") == PartitionSpec(None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "mask"}, "SingularValueConfig.form = 'mask': must be"),
        ({"targets": ()}, "SingularValueConfig.targets = (): must name a matrix"),
        ({"targets": ("*.c_fc",)}, "SingularValueConfig.targets = ('*.c_fc',): '*.c_fc' fits no matrix; there are lay"),
        ({"trained_rows": (23,)}, "SingularValueConfig.trained_rows = (23,): 23 is no id of a token"),
        ({"trained_rows": (1, 1)}, "SingularValueConfig.trained_rows = (1, 1): a token stands there twice"),
    ],
)
def test_what_fits_no_decoder_is_named(changes: dict[str, Any], message: str) -> None:
    plain: DecoderConfig = CONFIG
    with pytest.raises(CoconutError, match=re.escape(message)):
        config = SingularValueConfig(**changes)
        jax.eval_shape(lambda: add_singular_values(random_decoder(plain), config, jax.random.key(0)))


def test_a_run_keeps_its_kind_and_decays_no_vector() -> None:
    with pytest.raises(CoconutError, match=r"OptimizerConfig.weight_decay = 0.01: draws scales of singular values to"):
        tiny_run(adapter=SingularValueConfig())
    run = tiny_run(adapter=SingularValueConfig(form="masks"), optimizer={"weight_decay": 0.0})
    assert from_json(type(BASE), to_json(run), "run.json") == run
