"""Experts are balanced by the correction bias alone: loads are what an obvious count says, on one device and on eight.

What needs eight devices runs in a process of its own: ``python -m tests.training.test_balancing``.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.errors import CoconutError
from coconut.latent.feedback import Identity
from coconut.latent.rollout import rollout_batch
from coconut.mesh import MeshConfig
from coconut.methods import METHODS
from coconut.model import Model, Template, parameters_of
from coconut.models.experts import is_correction
from coconut.models.experts_config import ExpertsConfig
from coconut.models.routes import routes
from coconut.sharding import make_mesh, put_rows, replicated, tree_sharding
from coconut.tokenizers import symbol_tokenizer
from coconut.training.optimizer import OptimizerConfig, make_optimizer
from coconut.training.state import TrainState, make_state
from coconut.training.step import make_train_step
from coconut.types import Batch, Latent
from tests.tiny_models import EXPERTS_STYLE, quick_compilation, quick_jit, random_decoder, run_on_eight_devices
from tests.tiny_pages import aligned, one_block, thinking_page
from tests.tiny_runs import tiny_run
from tests.training.trained_runs import assert_same_run, final_state, interrupt_at, lines_of, trained

METHOD = METHODS["coconut"]
RATE = 0.05
assert EXPERTS_STYLE.experts is not None
EXPERTS = dataclasses.replace(EXPERTS_STYLE.experts, first_layer=0, groups=1, groups_chosen=1)
CONFIG = dataclasses.replace(EXPERTS_STYLE, vocab_size=24, experts=EXPERTS)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, weight_decay=0.3, clip_norm=1.0)
CORRECTIONS = {f"decoder.layers.{layer}.mlp.router.correction" for layer in (0, 1)}


def make_batch() -> Batch:
    """Rows of several lengths and numbers of thoughts; the last one only fills the batch."""
    tokenizer, rng = symbol_tokenizer([str(number) for number in range(20)]), np.random.default_rng(1)
    draw = lambda length: rng.integers(0, 19, length).astype(np.int32)
    pages = [thinking_page(tokenizer, draw(2 + index % 3), index % 3, draw(1 + index % 4)) for index in range(7)]
    return aligned([*pages, None], one_block(5, 2, 6), tokenizer)


def fresh(optimizer: OptimizerConfig = OPTIMIZER, **trains: Any) -> tuple[Template, TrainState]:
    model = Model(random_decoder(CONFIG, seed=2), {"feedback": Identity()})
    template = Template.of(model, **trains)
    return template, make_state(template, parameters_of(model), make_optimizer(optimizer))


def step_of(template: Template, **settings: Any) -> Any:
    return make_train_step(template, METHOD, make_optimizer(OPTIMIZER), **{"correction_rate": RATE, **settings})


@quick_jit
def _chosen(model: Model, batch: Batch) -> Any:
    output = rollout_batch(model.decoder, model.feedback, batch)
    latent = np.concatenate([np.full(span.length, isinstance(span, Latent)) for span in batch.schedule])
    inputs = model.decoder.embed(batch.tokens).at[:, latent].set(output.thoughts[0])
    return routes(model.decoder, inputs, positions=batch.positions, valid=batch.valid)


def count_slowly(template: Template, state: TrainState, batch: Batch) -> dict[str, np.ndarray]:
    """How many columns choose each expert: of layer 0 all that something is read of, of the last those that predict."""
    latent = np.concatenate([np.full(span.length, isinstance(span, Latent)) for span in batch.schedule])
    chosen = np.asarray(_chosen(template.model(state.parameters), batch))
    loads = np.zeros((2, EXPERTS.count))
    for row in range(len(batch.tokens)):
        own = np.flatnonzero(batch.valid[row])
        labelled = np.flatnonzero(np.asarray(batch.labels)[row] >= 0)
        if not len(labelled):
            continue
        # A label is predicted by the column before it, a thought made of it; nothing is read of a row's last column.
        before = {int(own[own < column].max()) for column in (*labelled, *np.flatnonzero(latent & batch.valid[row]))}
        seen = [column for column in own if column <= max(before)]
        for layer, columns in enumerate((seen, before)):
            for column in columns:
                loads[layer, chosen[layer, row, column]] += 1
    return dict(zip(sorted(CORRECTIONS), loads, strict=True))


def run(step: Any, state: TrainState, batch: Batch, steps: int = 1) -> TrainState:
    for _ in range(steps):
        state, _ = step(state, {"main": batch}, np.float32(1e-3), jax.random.key(0))
    return state


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly() -> Iterator[None]:
    with quick_compilation():
        yield


@pytest.mark.slow
def test_biases_move_as_an_obvious_count_says_whatever_the_microbatches() -> None:
    batch = jax.tree.map(jnp.asarray, make_batch())
    template, state = fresh()
    assert template.balanced == CORRECTIONS
    before = {name: np.array(state.parameters[name]) for name in CORRECTIONS}
    loads = count_slowly(template, state, batch)
    following = run(step_of(template), state, batch)
    in_parts = run(step_of(template, microbatches=4), fresh()[1], batch)
    for name, load in loads.items():
        assert (load > load.mean()).any() and (load < load.mean()).any()
        expected = before[name] + RATE * np.sign(load.mean() - load)
        np.testing.assert_allclose(following.parameters[name], expected, rtol=1e-6)
        np.testing.assert_array_equal(in_parts.parameters[name], following.parameters[name])
    # Neither moments nor weight decay nor the rate of 0 know them; all else is the same with and without.
    assert not any("correction" in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state.opt_state))
    still = run(step_of(template, correction_rate=0.0), fresh()[1], batch)
    for name, value in following.parameters.items():
        np.testing.assert_array_equal(still.parameters[name], before[name] if name in CORRECTIONS else value)


def test_a_router_that_is_frozen_keeps_its_bias() -> None:
    one, other = sorted(CORRECTIONS)
    frozen = lambda name: name != one and name != other.replace("correction", "kernel")
    assert fresh(trains=frozen)[0].balanced == frozenset()
    assert fresh(trains=lambda name: name != one)[0].balanced == {other}


@pytest.mark.slow
def test_loads_get_even() -> None:
    """A router whose first experts win everywhere: the bias is all that moves much."""
    batch = jax.tree.map(jnp.asarray, make_batch())
    template, state = fresh()
    skewed = {name: jnp.linspace(2, 0, EXPERTS.count) for name in CORRECTIONS}
    state = dataclasses.replace(state, parameters={**state.parameters, **skewed})
    step, most_used = step_of(template), []
    for _ in range(2):
        loads = np.stack(list(count_slowly(template, state, batch).values()))
        most_used.append(loads.max(1) / loads.sum(1))
        state = run(step, state, batch, 60)
    # Of three choices, one is the first expert everywhere; one in eight would be even.
    assert (most_used[0] > 0.3).all() and (most_used[1] < 0.2).all(), most_used


@pytest.mark.slow
def test_a_run_resumes_to_the_bit_and_logs_what_thoughts_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"mlp": "swiglu", "mlp_bias": False, "experts": ExpertsConfig(count=4, chosen=1, width=8)}
    config = tiny_run(decoder=fields, optimizer={"correction_rate": 0.001}, evaluate_every=None)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    trained(config, whole)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 9)
        assert not trained(config, resumed).progress.finished
    trained(config, resumed)
    assert_same_run(whole, resumed)
    [bias] = [value for name, value in final_state(whole)[0].items() if is_correction(name.split("'")[-2])]
    assert bias.any()
    first, *_, last = lines_of(whole, "train")
    of_experts = {name: value for name, value in last.items() if name.startswith("expert_")}
    named = ("evenness_tokens", "most_used_tokens", "evenness_thoughts", "most_used_thoughts")
    assert of_experts.keys() == {f"expert_{name}" for name in (*named, "distance", "distance_of_tokens")}
    assert all(0 <= value <= 1 for value in of_experts.values())
    assert {name for name in first if name.startswith("expert_")} == {f"expert_{name}" for name in named[:2]}


def test_a_rate_out_of_range_is_named() -> None:
    with pytest.raises(CoconutError, match=r"OptimizerConfig.correction_rate = -0.1: must be in \[0, 1\]"):
        OptimizerConfig(correction_rate=-0.1)


# --- In a process of eight devices --------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_eight_devices() -> None:
    run_on_eight_devices("tests.training.test_balancing")


def check_meshes() -> None:
    """Biases are those of one device, to the bit."""
    batch, found = make_batch(), []
    for devices, size in (1, MeshConfig(data=1)), (8, MeshConfig(data=2, fsdp=2, tensor=2)):
        mesh = make_mesh(size, jax.devices()[:devices])
        template, state = fresh()
        state = jax.device_put(jax.device_get(state), tree_sharding(state, template.axes, mesh))
        with jax.set_mesh(mesh):
            key = jax.jit(jax.random.key, out_shardings=replicated(mesh))(0)
            rows = put_rows(batch, mesh, len(batch.tokens))
            state, _ = step_of(template)(state, {"main": rows}, np.float32(1e-3), key)
        found.append({name: np.asarray(state.parameters[name]) for name in CORRECTIONS})
    for name in CORRECTIONS:
        np.testing.assert_array_equal(found[0][name], found[1][name])
    print("equal")


if __name__ == "__main__":
    check_meshes()
    print("done")
