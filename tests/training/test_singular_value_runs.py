"""Runs that train scales of singular values: they learn, resume to the bit, are gone on from, lie on eight devices.

What needs eight devices runs in a process of its own: ``python -m tests.training.test_singular_value_runs``.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from coconut.errors import CoconutError
from coconut.latent.policies.config import PolicyConfig
from coconut.mesh import MeshConfig
from coconut.methods import METHODS
from coconut.model import parameters_of
from coconut.models.adapters import is_adapter, is_trained_adapter, merge_adapters
from coconut.models.config import ExecutionConfig
from coconut.models.singular_values import ScaleForm, SingularValueConfig, decomposed
from coconut.sharding import make_mesh, put_rows, replicated
from coconut.training.config import RunConfig
from coconut.training.loading import load_model
from coconut.training.loop import TrainResult
from coconut.training.optimizer import make_optimizer
from coconut.training.reinforcement import ReinforcementConfig
from coconut.training.setup import abstract_state, initial_model, prepare
from coconut.training.state import fresh_model, make_state
from coconut.training.step import make_train_step
from tests.tiny_models import GPT2_STYLE, quick_compilation, run_on_eight_devices
from tests.tiny_pages import one_block
from tests.tiny_runs import tiny_run
from tests.training.test_mesh import BATCH_SIZE, make_batch
from tests.training.trained_runs import assert_same_run, final_state, interrupt_at, trained

pytestmark = pytest.mark.slow

SCALES = SingularValueConfig(form="masks", targets=("layers.*.mlp.*", "layers.*.attention.value"))
CHANGES: dict[str, Any] = {
    "adapter": SCALES,
    "curriculum": {"steps_per_stage": 3},
    "optimizer": {"learning_rate": 0.1, "weight_decay": 0.0},
    "save_every": 2,
}
# With matrices that do something from the start, as trained ones do: none of their directions is trained.
DECODER = dataclasses.replace(GPT2_STYLE, num_layers=1, vocab_size=24, kernel_stddev=0.4, embedding_stddev=0.5)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, compiled_once: Any) -> Path:
    """A run that trained all of its decoder, for a few steps."""
    workdir = tmp_path_factory.mktemp("base") / "run"
    trained(tiny_run(curriculum={"steps_per_stage": 2}, save_every=None), workdir)
    return workdir


@pytest.fixture(scope="module")
def scaled(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    workdir = tmp_path_factory.mktemp("scaled") / "run"
    return workdir, trained(tiny_run(**CHANGES, init_from=str(base)), workdir)


def other_factors(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Those of a library that turns every pair of vectors around."""
    left, values, right = decomposed(matrix)
    return -left, values, -right


def test_a_run_resumes_to_the_bit(
    base: Path, scaled: tuple[Path, TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir, result = scaled
    with monkeypatch.context() as patched:
        interrupt_at(patched, 4)
        assert not trained(tiny_run(**CHANGES, init_from=str(base)), tmp_path / "run").progress.finished
    # The factors are read, not made again: here they would be others.
    monkeypatch.setattr("coconut.models.adapters.decomposed", other_factors)
    trained(tiny_run(**CHANGES, init_from=str(base)), tmp_path / "run")
    assert_same_run(tmp_path / "run", workdir)
    state, _ = final_state(workdir)
    own = parameters_of(result.model)
    moments = {name.split("'")[-2] for name in state if "opt_state" in name and "decoder" in name}
    assert moments == {name for name in own if is_trained_adapter(name)} and len(moments) == 3
    # All but the vectors is what the run started from, and what they make is what is exported.
    _, first, _ = load_model(base, "latest")
    kept = {name: value for name, value in own.items() if not is_adapter(name)}
    jax.tree.map(np.testing.assert_array_equal, kept, parameters_of(first))
    merged = merge_adapters(result.model.decoder).layers[0].mlp.up.kernel[...]
    factors = [np.asarray(own[f"decoder.layers.0.mlp.up.singular_{leaf}"], np.float64) for leaf in "usvz"]
    masks = 1 / (1 + np.exp(-factors[3]))
    scales = masks * factors[1].sum() / (masks * factors[1]).sum()
    np.testing.assert_allclose(merged, (factors[0] * factors[1] * scales) @ factors[2], atol=2e-6)


def test_a_run_goes_on_from_vectors_or_with_what_they_make(scaled: tuple[Path, TrainResult]) -> None:
    workdir, result = scaled
    start = lambda **changes: parameters_of(
        initial_model(prepare(tiny_run(**{**CHANGES, **changes}, seed=3, init_from=str(workdir)))[0])
    )
    same = jax.tree.map(lambda one, two: bool((one == two).all()), start(), parameters_of(result.model))
    assert all(same.values())
    plain = parameters_of(result.model._replace(decoder=merge_adapters(result.model.decoder)))
    jax.tree.map(np.testing.assert_array_equal, start(adapter=None), plain)
    with pytest.raises(CoconutError, match=r"SingularValueConfig.targets = .*'c_fc' fits no matrix"):
        start(adapter=dataclasses.replace(SCALES, targets=("c_fc",)))


def test_vectors_learn_from_rewards(base: Path, tmp_path: Path) -> None:
    reinforcement = ReinforcementConfig(
        group=4, rewards={"answer": 1.0, "format": 0.5}, policy=PolicyConfig(kind="gaussian"), kl_weight=0.01
    )
    changes = {**CHANGES, "curriculum": {"first_stage": 1, "steps_per_stage": 3}, "reinforcement": reinforcement}
    result = trained(tiny_run(**changes, init_from=str(base)), tmp_path / "run")
    own, start = parameters_of(result.model), parameters_of(initial_model(result.run))
    moved = {name for name in own if not (own[name] == start[name]).all()}
    assert moved == {name for name in own if is_trained_adapter(name)}


@pytest.mark.parametrize("form", ["scales", "masks"])
def test_vectors_learn(form: ScaleForm) -> None:
    """A few answers by heart, with 3 x 16 + 16 numbers a layer of a decoder that is not trained."""
    adapter = SingularValueConfig(form=form, targets=("layers.*.mlp.*", "layers.*.attention.value"))
    config = tiny_run(decoder=DECODER, adapter=adapter, optimizer={"weight_decay": 0.0})
    with quick_compilation():
        losses, _ = steps(config, make_mesh(devices=jax.devices()[:1]), seeds=[0] * 20)
    assert losses[-1] < losses[0] - 1.5


def test_on_eight_devices() -> None:
    assert "Involuntary full rematerialization" not in run_on_eight_devices("tests.training.test_singular_value_runs")


# --- In a process of eight devices ------------------------------------------------------------------------------


def steps(config: RunConfig, mesh: Any, seeds: Sequence[int]) -> tuple[list[float], dict[str, Any]]:
    """The losses of a few steps, and the vectors after them."""
    optimizer = make_optimizer(config.optimizer)
    template, expected = abstract_state(config, optimizer, mesh)
    places = jax.tree.map(lambda x: x.sharding, expected)
    make = lambda: make_state(template, parameters_of(fresh_model(config)), optimizer)
    state = jax.jit(make, out_shardings=places)()
    step, losses = make_train_step(template, METHODS["coconut"], optimizer), []
    with jax.set_mesh(mesh):
        key = jax.jit(jax.random.key, out_shardings=replicated(mesh))(0)
        for seed in seeds:
            batch = make_batch(one_block(6, 2, 6), np.random.default_rng(seed))
            state, metrics = step(state, {"main": put_rows(batch, mesh, BATCH_SIZE)}, 0.1, key)
            losses.append(float(metrics["loss"].mean()))
    return losses, {name: np.asarray(state.parameters[name]) for name in template.trained}


def main() -> None:
    """The numbers of one device in float64, where rounding cannot hide an error."""
    jax.config.update("jax_enable_x64", True)
    # Rotary, since XLA moves what it looks up in a table of positions by gathering all of it, with adapters or without.
    decoder = dataclasses.replace(DECODER, param_dtype="float64", position_embedding="rotary")
    config = tiny_run(
        decoder=decoder, execution=ExecutionConfig(dtype="float64"), adapter=SCALES, optimizer={"weight_decay": 0.0}
    )
    with quick_compilation():
        expected_losses, expected = steps(config, make_mesh(devices=jax.devices()[:1]), [0, 1, 0])
        assert abs(expected_losses[2] - expected_losses[0]) > 1e-3
        losses, found = steps(config, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), [0, 1, 0])
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-9)
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-7, err_msg=name)
    print("done")


if __name__ == "__main__":
    main()
