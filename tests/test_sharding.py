"""Where parameters lie on a mesh: the table covers every decoder, and sharded loading changes no number.

What needs eight devices runs in a process of its own: ``python -m tests.test_sharding``.
"""

import dataclasses
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from coconut.errors import CoconutError
from coconut.mesh import MESH_AXES, MeshConfig
from coconut.model import Template, make_model, parameters_of
from coconut.models.config import DecoderConfig, ExecutionConfig
from coconut.models.decoder import Decoder
from coconut.models.huggingface import load_pretrained, save_pretrained
from coconut.models.parameters import abstract_decoder, decoder_parameters, parameter_axes
from coconut.models.presets import PRESETS
from coconut.models.vocabulary import copy_token, resize_vocabulary
from coconut.sharding import (
    check_heads,
    make_mesh,
    own_rows,
    parameter_sharding,
    partition,
    rows_together,
    tree_sharding,
)
from coconut.training.optimizer import OptimizerConfig, make_optimizer
from coconut.training.state import make_state
from tests.tiny_models import GPT2_STYLE, LLAMA_STYLE, process_environment, quick_jit, random_decoder

EVERY_AXIS = AbstractMesh((2, 2, 2, 2), MESH_AXES)
PINNED = Path(__file__).with_name("preset_shardings.txt")


SCANNED = ExecutionConfig(scan_layers=True)


def sharding_table() -> str:
    """Each preset's parameters, layers stacked where alike, with what splits each dimension, and what splits others."""
    lines = []
    for name, preset in PRESETS.items():
        vocabulary = 4 * -(-preset.vocabulary // 4)  # what a run sets DecoderConfig.vocab_size to on such a mesh
        config = dataclasses.replace(preset, vocab_size=vocabulary)
        lines.append(name)
        if preset.experts is not None:  # Layers that differ are not stacked; one of each kind says it all.
            config = dataclasses.replace(config, num_layers=preset.experts.first_layer + 1)
        decoder = abstract_decoder(config, SCANNED if preset.experts is None else ExecutionConfig())
        axes = parameter_axes(decoder)
        for parameter, leaf in decoder_parameters(decoder).items():
            spec = parameter_sharding(parameter, leaf.shape, axes[parameter], EVERY_AXIS).spec
            lines.append(f"  {parameter} {'x'.join(map(str, leaf.shape))}: {' '.join(map(str, spec))}")
    lines.append("activations")
    for what, axes in {
        "batch": ("rows",),
        "embedded tokens, hidden states": ("rows", "columns", "features"),
        "the same of one column": ("moving_rows", "columns", "split_features"),
        "queries": ("rows", "columns", "heads", "head"),
        "keys and values, cached": ("layers", "rows", "kv_heads", "past", "head"),
        "inside the MLP": ("rows", "columns", "mlp"),
        "logits": ("rows", "columns", "vocabulary"),
    }.items():
        lines.append(f"  {what}: {' '.join(map(str, partition(axes, EVERY_AXIS)))}")
    return "\n".join(lines) + "\n"


def test_the_shardings_of_each_preset_are_those_pinned() -> None:
    """After a change that is meant: ``python -m tests.test_sharding pin``, and read the difference."""
    print(table := sharding_table())
    assert table == PINNED.read_text()


def test_moments_lie_where_their_parameters_do() -> None:
    config = dataclasses.replace(LLAMA_STYLE, vocab_size=24)
    optimizer = make_optimizer(OptimizerConfig(clip_norm=1.0))
    model = jax.eval_shape(lambda: make_model(config, jax.random.key(0)))
    template = Template.of(model)
    state = jax.eval_shape(lambda: make_state(template, parameters_of(model), optimizer))
    places = tree_sharding(state, template.axes, EVERY_AXIS)
    moments = [
        x for x in jax.tree.leaves(places.opt_state, is_leaf=lambda x: isinstance(x, dict)) if isinstance(x, dict)
    ]
    assert len(moments) == 2
    for moment in moments:
        assert moment == places.parameters
    others = [x for x in jax.tree.leaves(places) if x.spec == PartitionSpec()]
    assert len(others) == 2, "the step and the optimizer's count"


def test_every_parameter_of_a_decoder_says_its_axes() -> None:
    with_query_norm = dataclasses.replace(LLAMA_STYLE, query_key_norm=True)
    for config, scan_layers in ((GPT2_STYLE, False), (LLAMA_STYLE, False), (with_query_norm, True)):
        decoder = abstract_decoder(config, ExecutionConfig(scan_layers=scan_layers))
        axes = parameter_axes(decoder)
        assert {name: leaf.ndim for name, leaf in decoder_parameters(decoder).items()} == {
            name: len(own or ()) for name, own in axes.items()
        }


@pytest.mark.slow
def test_a_part_that_says_nothing_lies_whole_on_every_device() -> None:
    part = {"bare": jnp.ones(3), "split": nnx.Param(jnp.ones((4, 8)), axes=("embed", "mlp"))}
    template = Template.of(make_model(GPT2_STYLE, jax.random.key(0), parts=lambda config, key: {"reader": part}))
    assert template.axes["reader.bare"] is None
    assert template.axes["reader.split"] == ("embed", "mlp")
    assert parameter_sharding("reader.bare", (3,), None, EVERY_AXIS).spec == PartitionSpec()
    assert parameter_sharding("reader.split", (4, 8), ("embed", "mlp"), EVERY_AXIS).spec == PartitionSpec(
        "fsdp", "tensor"
    )


@pytest.mark.parametrize("name", ["decoder", "feedback", "a.b", ""])
def test_a_part_needs_a_name_of_its_own(name: str) -> None:
    with pytest.raises(CoconutError, match=re.escape(f"a method's part cannot be named {name!r}")):
        make_model(GPT2_STYLE, jax.random.key(0), parts=lambda config, key: {name: jnp.ones(1)})


def test_axes_that_do_not_fit_are_named() -> None:
    mesh = make_mesh()
    with pytest.raises(
        CoconutError, match=r"parameter reader\.sink of shape \(4,\): its axes \('embed', 'mlp'\) are not"
    ):
        parameter_sharding("reader.sink", (4,), ("embed", "mlp"), mesh)
    with pytest.raises(CoconutError, match=r"parameter reader\.sink: axis 'model' is none of layers, positions"):
        parameter_sharding("reader.sink", (4,), ("model",), mesh)
    with pytest.raises(CoconutError, match=re.escape("the mesh has axes ['model']")):
        parameter_sharding("norm.scale", (4,), ("embed",), jax.make_mesh((1,), ("model",)))
    with pytest.raises(
        CoconutError, match="data = 4, fsdp = 4, sequence = 1, tensor = 4 is one of 64 devices, there are"
    ):
        make_mesh(MeshConfig(data=4, fsdp=4, tensor=4))
    with pytest.raises(CoconutError, match="num_kv_heads = 2: is no multiple of the mesh's tensor = 4"):
        check_heads(8, 2, AbstractMesh((1, 1, 1, 4), MESH_AXES))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fsdp", "'fsdp' must be AXIS=SIZE"),
        ("fsdp=two", "'fsdp=two' must be AXIS=SIZE"),
        ("model=2", "unknown axis 'model', known are data, fsdp, sequence, tensor"),
        ("fsdp=2,fsdp=4", "fsdp is named twice"),
        ("fsdp=0", "MeshConfig.fsdp = 0: must be at least 1"),
    ],
)
def test_a_mesh_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(CoconutError, match=re.escape(message)):
        MeshConfig.parse(text)


def test_a_mesh_is_read() -> None:
    assert MeshConfig.parse("") == MeshConfig()
    assert MeshConfig.parse("data=2, tensor=4") == MeshConfig(data=2, tensor=4)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    mesh = AbstractMesh((2, 3, 1, 1), MESH_AXES)
    message = (
        "batch_size = 12 in RunConfig.microbatches = 4: the rows of each are no multiple of the mesh's data x fsdp = 6"
    )
    with pytest.raises(CoconutError, match=re.escape(message)):
        own_rows(mesh, 12, 4)


def test_a_few_rows_fill_whole_devices() -> None:
    assert [rows_together(64, rows) for rows in (0, 5, 100)] == [1, 5, 64]
    with jax.sharding.use_abstract_mesh(AbstractMesh((4, 2), ("data", "fsdp"))):
        assert [rows_together(64, rows) for rows in (0, 5, 8, 9, 100)] == [8, 8, 8, 16, 64]


@pytest.mark.slow
def test_on_eight_devices() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "tests.test_sharding"],
        cwd=Path(__file__).parents[1],
        env=process_environment(devices=8),
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == ["placed", "computed", "named"]


# --- In a process of eight devices ------------------------------------------------------------------------------

CONFIGS = [
    (dataclasses.replace(GPT2_STYLE, vocab_size=24), ExecutionConfig()),
    (dataclasses.replace(LLAMA_STYLE, vocab_size=24), SCANNED),
]


def logits(decoder: Decoder) -> jax.Array:
    tokens, positions = jnp.arange(8).reshape(2, 4), jnp.broadcast_to(jnp.arange(4), (2, 4))
    hidden, _ = decoder.trunk(decoder.embed(tokens), positions=positions, valid=jnp.ones((2, 4), bool))
    return decoder.unembed(hidden)


def check(config: DecoderConfig, execution: ExecutionConfig, folder: Path) -> None:
    """A checkpoint loaded onto a mesh holds the same numbers, split as the table says, and computes the same."""
    plain = random_decoder(config, scan_layers=execution.scan_layers)
    save_pretrained(plain, folder)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    sharded = load_pretrained(folder, config=config, execution=execution, mesh=mesh)
    expected, axes = decoder_parameters(plain), parameter_axes(plain)
    for name, array in decoder_parameters(sharded).items():
        np.testing.assert_array_equal(array, expected[name], name)
        assert array.sharding.is_equivalent_to(parameter_sharding(name, array.shape, axes[name], mesh), array.ndim)
    table = sharded.tokens.embedding[...]
    assert table.sharding == NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
    assert {shard.data.shape for shard in table.addressable_shards} == {(12, 8)}
    np.testing.assert_allclose(quick_jit(logits)(sharded), quick_jit(logits)(plain), rtol=0, atol=1e-5)
    save_pretrained(sharded, folder / "again")
    np.testing.assert_array_equal(load_pretrained(folder / "again").tokens.embedding[...], table)
    grown = resize_vocabulary(sharded, 26, copy_from=3).tokens.embedding[...]
    assert grown.sharding == table.sharding
    np.testing.assert_array_equal(grown[24], table[3])


def check_odd_vocabulary(folder: Path) -> None:
    """A published vocabulary that the mesh does not divide is whole until the markers have made it one that it does."""
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    save_pretrained(random_decoder(GPT2_STYLE), folder)
    loaded = load_pretrained(folder, mesh=mesh)
    assert loaded.config.vocabulary == 23
    assert loaded.tokens.embedding[...].sharding == NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    copied = copy_token(loaded, [5], copy_from=3).tokens.embedding[...]
    np.testing.assert_array_equal(copied[5], loaded.tokens.embedding[...][3])
    grown = resize_vocabulary(loaded, 26, copy_from=3).tokens.embedding[...]
    assert grown.sharding == NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
    np.testing.assert_array_equal(grown[:23], loaded.tokens.embedding[...])


def main() -> None:
    assert jax.device_count() == 8
    with tempfile.TemporaryDirectory() as temporary:
        for index, (config, execution) in enumerate(CONFIGS):
            check(config, execution, Path(temporary) / str(index))
        check_odd_vocabulary(Path(temporary) / "odd_vocabulary")
        print("placed\ncomputed")
        decoder = random_decoder(dataclasses.replace(LLAMA_STYLE, vocab_size=23, mlp_dim=25))
        save_pretrained(decoder, Path(temporary) / "odd")
        with pytest.raises(CoconutError) as caught:
            load_pretrained(Path(temporary) / "odd", mesh=make_mesh(MeshConfig(tensor=2), jax.devices()[:2]))
        lines = str(caught.value).splitlines()[1:]
        assert len(lines) == 2 * 3, lines  # Three matrices of the MLP in two layers.
        wanted = (
            "parameter layers.1.mlp.down.kernel of shape (25, 16): dimension 0 (mlp) is 25, "
            "which is no multiple of the mesh's tensor = 2"
        )
        assert any(wanted in line for line in lines), lines
        sharded = load_pretrained(Path(temporary) / "0", mesh=make_mesh(MeshConfig(tensor=2), jax.devices()[:2]))
        with pytest.raises(CoconutError, match=r"^vocab_size = 25: parameter tokens.embedding of shape"):
            resize_vocabulary(sharded, 25, copy_from=0)
        print("named")


if __name__ == "__main__":
    if sys.argv[1:] == ["pin"]:
        PINNED.write_text(sharding_table())
    else:
        main()
