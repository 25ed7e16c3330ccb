"""Where parameters lie on a mesh: the table covers every decoder, and sharded loading changes no number.

What needs eight devices runs in a process of its own: ``python -m tests.test_sharding``.
"""

import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from coconut.models.config import DecoderConfig
from coconut.models.decoder import Decoder
from coconut.models.huggingface import load_pretrained, save_pretrained
from coconut.models.parameters import abstract_decoder, decoder_parameters
from coconut.models.presets import PRESETS
from coconut.models.vocabulary import resize_vocabulary
from coconut.sharding import MeshConfig, make_mesh, parameter_sharding
from coconut.types import CoconutError
from tests.tiny_models import GPT2_STYLE, LLAMA_STYLE, quick_jit, random_decoder


@pytest.mark.parametrize("name", ["gpt2", "llama-3.1-8b", "qwen2.5-0.5b", "qwen3-0.6b"])
def test_every_parameter_has_its_axes(name: str) -> None:
    mesh = make_mesh()
    stacked = decoder_parameters(abstract_decoder(dataclasses.replace(PRESETS[name], scan_layers=True)))
    for parameter, leaf in stacked.items():
        spec = parameter_sharding(parameter, leaf.shape, mesh).spec
        assert len(spec) == leaf.ndim
        assert (spec[0] is None) or not parameter.startswith("layers")
        if leaf.ndim - parameter.startswith("layers") == 2 and parameter != "positions.embedding":
            assert {"fsdp", "tensor"} <= set(spec), "a matrix is split both ways"


def test_what_the_table_does_not_know_is_named() -> None:
    mesh = make_mesh()
    with pytest.raises(CoconutError, match=r"parameter decoder\.layers\.0\.attention\.sink of shape \(4,\)"):
        parameter_sharding("decoder.layers.0.attention.sink", (4,), mesh)
    with pytest.raises(CoconutError, match=r"up\.kernel of shape \(4,\)"):
        parameter_sharding("layers.0.mlp.up.kernel", (4,), mesh)
    with pytest.raises(CoconutError, match=re.escape("the mesh has axes ['model']")):
        parameter_sharding("norm.scale", (4,), jax.make_mesh((1,), ("model",)))
    with pytest.raises(CoconutError, match="need 64 devices, there are"):
        make_mesh(data=4, fsdp=4, tensor=4)
    with pytest.raises(CoconutError, match="fsdp = 0"):
        make_mesh(fsdp=0)


def test_on_eight_devices() -> None:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    child = subprocess.run(
        [sys.executable, "-m", "tests.test_sharding"],
        cwd=Path(__file__).parents[1],
        env=os.environ | flags,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == ["placed", "computed", "named"]


# --- In a process of eight devices ------------------------------------------------------------------------------

CONFIGS = [
    dataclasses.replace(GPT2_STYLE, vocab_size=24),
    dataclasses.replace(LLAMA_STYLE, vocab_size=24, scan_layers=True),
]


def logits(decoder: Decoder) -> jax.Array:
    tokens, positions = jnp.arange(8).reshape(2, 4), jnp.broadcast_to(jnp.arange(4), (2, 4))
    hidden, _ = decoder.trunk(decoder.embed(tokens), positions=positions, valid=jnp.ones((2, 4), bool))
    return decoder.unembed(hidden)


def check(config: DecoderConfig, folder: Path) -> None:
    """A checkpoint loaded onto a mesh holds the same numbers, split as the table says, and computes the same."""
    plain = random_decoder(config)
    save_pretrained(plain, folder)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    sharded = load_pretrained(folder, config=config, mesh=mesh)
    expected = decoder_parameters(plain)
    for name, array in decoder_parameters(sharded).items():
        np.testing.assert_array_equal(array, expected[name], name)
        assert array.sharding.is_equivalent_to(parameter_sharding(name, array.shape, mesh), array.ndim)
    table = sharded.tokens.embedding[...]
    assert table.sharding == NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
    assert {shard.data.shape for shard in table.addressable_shards} == {(12, 8)}
    np.testing.assert_allclose(quick_jit(logits)(sharded), quick_jit(logits)(plain), rtol=0, atol=1e-5)
    save_pretrained(sharded, folder / "again")
    np.testing.assert_array_equal(load_pretrained(folder / "again").tokens.embedding[...], table)
    grown = resize_vocabulary(sharded, 26, copy_from=3).tokens.embedding[...]
    assert grown.sharding == table.sharding
    np.testing.assert_array_equal(grown[24], table[3])


def main() -> None:
    assert jax.device_count() == 8
    with tempfile.TemporaryDirectory() as temporary:
        for index, config in enumerate(CONFIGS):
            check(config, Path(temporary) / str(index))
        print("placed\ncomputed")
        decoder = random_decoder(dataclasses.replace(LLAMA_STYLE, vocab_size=23, mlp_dim=25))
        save_pretrained(decoder, Path(temporary) / "odd")
        with pytest.raises(CoconutError) as caught:
            load_pretrained(Path(temporary) / "odd", mesh=make_mesh(MeshConfig(tensor=2), jax.devices()[:2]))
        lines = str(caught.value).splitlines()[1:]
        assert len(lines) == 2 + 2 * 3, lines  # The table and the head; three matrices of the MLP in two layers.
        wanted = (
            "parameter layers.1.mlp.down.kernel of shape (25, 16): dimension 0 (mlp) is 25, "
            "which is no multiple of the mesh's tensor = 2"
        )
        assert any(wanted in line for line in lines), lines
        sharded = load_pretrained(Path(temporary) / "0", mesh=make_mesh(MeshConfig(tensor=2), jax.devices()[:2]))
        with pytest.raises(CoconutError, match=r"vocab_size = 25: tokens\.embedding cannot be split"):
            resize_vocabulary(sharded, 25, copy_from=0)
        print("named")


if __name__ == "__main__":
    main()
