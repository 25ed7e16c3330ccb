"""Training on a mesh: the numbers of one device on any of eight, and gathers that do not multiply with the thoughts.

What needs eight devices runs in processes of its own: ``python -m tests.training.test_mesh NAME``.
"""

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from coconut.batching import Shape
from coconut.commands.plan.collectives import collectives
from coconut.losses import Loss, Term, language_loss, ratio
from coconut.mesh import MeshConfig
from coconut.methods import METHODS
from coconut.methods.method import LossContext, Method, Views
from coconut.model import Model, Template, make_model, parameters_of
from coconut.models.config import DecoderConfig, ExecutionConfig
from coconut.packing import pack, packed_shapes, part_widths, share_rows, widest_rows
from coconut.sharding import make_mesh, placed, put_rows, replicated, tree_sharding
from coconut.tokenizers import symbol_tokenizer
from coconut.training.optimizer import OptimizerConfig, make_optimizer
from coconut.training.state import make_state
from coconut.training.step import make_train_step
from coconut.types import Batch
from pallas_kernels.flash_attention import xla
from tests.tiny_models import LLAMA_STYLE, quick_compilation, run_on_eight_devices
from tests.tiny_pages import aligned, one_block, thinking_page

METHOD = METHODS["coconut"]
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-3, clip_norm=1.0))
BATCH_SIZE = 16


def loss_of_two_terms(model: Model, views: Views, context: LossContext) -> Loss:
    """Their weights lie unevenly on the devices: labels, and the columns of each row."""
    output = context.rollout(model, views["main"])
    language, metrics = language_loss(model.decoder, views["main"], output)
    size = ratio(jnp.square(output.last).mean(1), 1.0 * views["main"].valid.sum(1))
    return Loss({"language": Term(language), "size": Term(size, 0.5)}, metrics)


# Beside all else that is compared on meshes, several terms are exact over the devices.
TWO_TERMS = dataclasses.replace(METHOD, loss=loss_of_two_terms)


@pytest.mark.parametrize(
    "name",
    [
        "collectives",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("equality", "kernels", "gathering", "packing")),
    ],
)
def test_on_eight_devices(name: str) -> None:
    assert "Involuntary full rematerialization" not in run_on_eight_devices("tests.training.test_mesh", name)


# --- In a process of eight devices ------------------------------------------------------------------------------


def make_batch(shape: Shape, rng: np.random.Generator, ragged: bool = True) -> Batch:
    """Rows of several lengths and numbers of thoughts; the last two only fill the batch."""
    tokenizer = symbol_tokenizer([str(number) for number in range(20)])
    draw = lambda length: rng.integers(0, 19, length).astype(np.int32)
    [most] = shape.thoughts
    pages = [
        thinking_page(
            tokenizer,
            draw(shape.prompt - 1 - index % 3 * ragged),
            index % (most + 1) if ragged else most,
            draw(1 + index % 3),
        )
        for index in range(BATCH_SIZE - 2)
    ]
    return aligned([*pages, None, None], shape, tokenizer)


Configs = tuple[DecoderConfig, ExecutionConfig]


def fresh_model(configs: Configs) -> Any:
    config, execution = configs
    return make_model(config, jax.random.key(0), execution=execution)


def fresh_state(configs: Configs) -> Any:
    model = fresh_model(configs)
    return make_state(Template.of(model), parameters_of(model), OPTIMIZER)


def template_of(configs: Configs) -> Template:
    return Template.of(jax.eval_shape(lambda: fresh_model(configs)))


def train_steps(
    configs: Configs, batches: list[Batch], mesh: Mesh, method: Method = TWO_TERMS
) -> tuple[list[float], Any]:
    """The loss of each step, and the state after them."""
    places = tree_sharding(jax.eval_shape(lambda: fresh_state(configs)), template_of(configs).axes, mesh)
    state = jax.jit(lambda: fresh_state(configs), out_shardings=places)()
    step, losses = make_train_step(template_of(configs), method, OPTIMIZER, microbatches=2), []
    with jax.set_mesh(mesh):
        key = jax.jit(jax.random.key, out_shardings=replicated(mesh))(0)
        for batch in batches:
            state, metrics = step(state, {"main": put_rows(batch, mesh, len(batch.tokens))}, 1e-3, key)
            losses.append(float(metrics["loss"].mean()))
    jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim) or pytest.fail(str(place)), state, places)
    return losses, state


def check_equality() -> None:
    """In float64, where rounding cannot hide an error: Adam would blow up a gradient of almost nothing in float32.

    Three meshes in which every axis splits something, beside others.
    """
    jax.config.update("jax_enable_x64", True)
    config = dataclasses.replace(
        LLAMA_STYLE,
        vocab_size=24,
        num_heads=8,
        num_kv_heads=8,
        head_dim=2,
        param_dtype="float64",
    )
    configs = (config, ExecutionConfig(dtype="float64", scan_layers=True, remat="full"))
    batches = 2 * [make_batch(one_block(6, 2, 6), np.random.default_rng(seed)) for seed in range(2)]
    with quick_compilation():
        expected_losses, expected = train_steps(configs, batches, make_mesh(devices=jax.devices()[:1]))
        assert expected_losses[2] < expected_losses[0] - 1e-3
        once = (config, dataclasses.replace(configs[1], gather="step"))
        for mesh, how in (
            (MeshConfig(data=2, fsdp=2, tensor=2), configs),
            (MeshConfig(data=2, fsdp=2, sequence=2), configs),
            (MeshConfig(sequence=2, tensor=4), configs),
            (MeshConfig(data=2, fsdp=2, tensor=2), once),
        ):
            losses, state = train_steps(how, batches, make_mesh(mesh))
            np.testing.assert_allclose(losses, expected_losses, rtol=1e-10, err_msg=str(mesh))
            # The moments are averages of the gradients.
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-12), state, expected)


def check_packing() -> None:
    """Rows of two examples on eight devices: the numbers of rows of one on one device."""
    jax.config.update("jax_enable_x64", True)
    config = dataclasses.replace(LLAMA_STYLE, vocab_size=24, num_heads=4, num_kv_heads=2, param_dtype="float64")
    configs = (config, ExecutionConfig(dtype="float64", scan_layers=True))
    shape, packed = one_block(6, 3, 6), []
    batches = 2 * [make_batch(shape, np.random.default_rng(seed)) for seed in range(2)]
    for batch in batches:
        widths = part_widths(batch, shape)
        members = share_rows(widths, BATCH_SIZE // 2)
        wide = packed_shapes(shape, 2, widest_rows(widths, members))[0]
        packed.append(pack(batch, shape, members, wide, pad_id=0, feeds_back=True))
    with quick_compilation():
        expected_losses, expected = train_steps(configs, batches, make_mesh(devices=jax.devices()[:1]), METHOD)
        assert expected_losses[2] < expected_losses[0] - 1e-3
        for mesh, gather in ((MeshConfig(data=2, fsdp=2, tensor=2), "pass"), (MeshConfig(fsdp=4, tensor=2), "step")):
            how = (config, dataclasses.replace(configs[1], gather=gather))
            losses, state = train_steps(how, packed, make_mesh(mesh), METHOD)
            np.testing.assert_allclose(losses, expected_losses, rtol=1e-10, err_msg=str(mesh))
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-12), state, expected)


def check_kernels() -> None:
    """Attention and loss of `pallas_kernels`, each device with its own rows, heads, columns and part of the ids."""
    config = dataclasses.replace(LLAMA_STYLE, vocab_size=24, num_heads=8, num_kv_heads=4, head_dim=2)
    dense = (config, ExecutionConfig(attention="dense", cross_entropy="full"))
    blocked = (config, ExecutionConfig(attention="xla", cross_entropy="xla"))
    batches = [make_batch(one_block(6, 2, 6), np.random.default_rng(seed)) for seed in range(2)]
    xla.BLOCK = 2  # Several blocks, so that their loops run on every device, too.
    with quick_compilation():
        expected, _ = train_steps(dense, batches, make_mesh(devices=jax.devices()[:1]))
        assert expected[-1] != expected[0]
        losses, _ = train_steps(blocked, batches, make_mesh(MeshConfig(fsdp=2, sequence=2, tensor=2)))
        np.testing.assert_allclose(losses, expected, rtol=2e-6)


def check_gathering() -> None:
    """Matrices that are rounded to bfloat16 and gathered once: as in bfloat16 where each pass gathers its own."""
    config = dataclasses.replace(LLAMA_STYLE, vocab_size=24, num_heads=8, num_kv_heads=8, head_dim=2)
    batches = 2 * [make_batch(one_block(6, 2, 6), np.random.default_rng(seed)) for seed in range(2)]
    mesh, losses = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), {}
    with quick_compilation():
        for gather in ("pass", "step"):
            configs = (config, ExecutionConfig(dtype="bfloat16", scan_layers=True, gather=gather))
            losses[gather], state = train_steps(configs, batches, mesh)
            assert {leaf.dtype for leaf in jax.tree.leaves(state.parameters)} == {np.dtype("float32")}
    assert losses["step"][2] < losses["step"][0] - 1e-3
    np.testing.assert_allclose(losses["step"], losses["pass"], rtol=5e-3)


def parameter_collectives(configs: Configs, thoughts: int, mesh: Mesh) -> dict[str, int]:
    """How often a step gathers or reduces something as large as a matrix, a loop's body counted as often as it runs."""
    batch = make_batch(one_block(4, thoughts, 4), np.random.default_rng(0), ragged=False)
    config, _ = configs
    state = placed(jax.eval_shape(lambda: fresh_state(configs)), template_of(configs).axes, mesh)
    with jax.set_mesh(mesh):
        key = jax.jit(jax.random.key, out_shardings=replicated(mesh))(0)
        lowered = make_train_step(template_of(configs), METHOD, OPTIMIZER).lower(
            state, {"main": put_rows(batch, mesh, BATCH_SIZE)}, np.float32(1e-3), key
        )
        text = lowered.compile(compiler_options={"xla_backend_optimization_level": 0}).as_text()
    smallest = config.embed_dim * config.num_heads * config.width_of_head
    assert BATCH_SIZE * max(thoughts, 4) * config.width_of_mlp < smallest, "activations are smaller than any matrix"
    counts: dict[str, int] = {}
    for found in collectives(text):
        if found.elements >= smallest // mesh.shape["tensor"]:
            counts[found.kind] = counts.get(found.kind, 0) + found.times
    return counts


def check_collectives() -> None:
    config = dataclasses.replace(LLAMA_STYLE, vocab_size=24, embed_dim=256, mlp_dim=512, num_heads=4, num_kv_heads=4)
    configs = (config, ExecutionConfig(scan_layers=True))
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    # One thought of a span is no pass of its own, and a single column beside it moves no matrix at all.
    few, many = (parameter_collectives(configs, thoughts, mesh) for thoughts in (3, 7))
    assert few == many, (few, many)
    assert few["all-gather"] > 0 and few["all-reduce"] + few.get("reduce-scatter", 0) > 0, few
    # Gathered beforehand, each of a layer's seven kinds of matrices moves once.
    once = parameter_collectives((config, dataclasses.replace(configs[1], gather="step")), 3, mesh)
    assert once["all-gather"] == 7 < few["all-gather"], (once, few)


def main(name: str) -> None:
    assert jax.device_count() == 8
    {
        "equality": check_equality,
        "kernels": check_kernels,
        "collectives": check_collectives,
        "gathering": check_gathering,
        "packing": check_packing,
    }[name]()
    print("done")


if __name__ == "__main__":
    main(sys.argv[1])
