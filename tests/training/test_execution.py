"""How a run is executed may change while it goes on, what it computes may not: resuming, starting, and reading."""

import dataclasses
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from rich.console import Console

from coconut.errors import CoconutError
from coconut.mesh import MESH_AXES
from coconut.model import Model, parameters_of
from coconut.models.config import ExecutionConfig
from coconut.models.stacking import in_layout_of
from coconut.sharding import make_mesh
from coconut.training.checkpoint import Checkpoints
from coconut.training.loading import load_model
from coconut.training.loop import TrainResult, train
from coconut.training.optimizer import OptimizerConfig, make_optimizer
from coconut.training.run import Run
from coconut.training.setup import abstract_state, initial_model, prepare
from tests.tiny_models import GPT2_STYLE, quick_compilation, random_decoder
from tests.tiny_runs import tiny_run

QUIET = Console(file=io.StringIO())
TWO_LAYERS = {"decoder": {"num_layers": 2}}
SCANNED = {"scan_layers": True, "remat": "full"}
NO_OPTIONS: dict[str, Any] = {}
EVERY_AXIS = AbstractMesh((2, 2, 2, 2), MESH_AXES)


class Stop(Exception):
    """Ends a run at its first validation, so that its latest checkpoint is that of step 6."""


def stop(*_: Any) -> dict[str, float]:
    raise Stop


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly() -> Iterator[None]:
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A run that was stopped at its first validation, with its layers one by one, and one with them stacked."""
    folders = {}
    for scan_layers in (False, True):
        folders[scan_layers] = tmp_path_factory.mktemp("stopped") / "run"
        with pytest.raises(Stop):
            train(
                tiny_run(**TWO_LAYERS, execution={"scan_layers": scan_layers}),
                folders[scan_layers],
                console=QUIET,
                validate=stop,
            )
    return folders


def goes_on(source: Path, workdir: Path, options: Any = NO_OPTIONS, **changes: Any) -> TrainResult:
    shutil.copytree(source, workdir)
    return train(tiny_run(**{**TWO_LAYERS, **changes}), workdir, console=QUIET, **options)


def losses(workdir: Path) -> list[float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("scanned", [False, True], ids=["one by one, then stacked", "stacked, then one by one"])
def test_a_run_goes_on_in_another_layout(scanned: bool, stopped: dict[bool, Path], tmp_path: Path) -> None:
    """The state is the same to the bit, and what follows to rounding."""
    same = goes_on(stopped[scanned], tmp_path / "same", execution={"scan_layers": scanned})
    execution = {} if scanned else SCANNED
    other = goes_on(stopped[scanned], tmp_path / "other", execution=execution, microbatches=2, save_every=4)
    assert same.progress.finished and other.progress.finished
    np.testing.assert_allclose(losses(tmp_path / "other"), losses(tmp_path / "same"), rtol=1e-3)
    assert json.loads((tmp_path / "same" / "run.json").read_text()).get("changes") is None
    [change] = json.loads((tmp_path / "other" / "run.json").read_text())["changes"]
    assert change["from_step"] == 6
    expected = {"execution.scan_layers": f"{scanned} there, {not scanned} here", "microbatches": "1 there, 2 here"}
    assert expected.items() <= change["fields"].items() and "save_every" in change["fields"]
    # Started again with the same command, nothing has changed.
    train(other.run.config, tmp_path / "other", console=QUIET)
    assert [change] == json.loads((tmp_path / "other" / "run.json").read_text())["changes"]


def test_a_state_is_restored_into_either_layout(stopped: dict[bool, Path]) -> None:
    optimizer, mesh = make_optimizer(OptimizerConfig()), make_mesh(devices=jax.devices()[:1])
    for scanned, workdir in stopped.items():
        checkpoints = Checkpoints(workdir, read_only=True)
        states = []
        for scan_layers in (scanned, not scanned):
            config = Run.load(workdir).config
            config = dataclasses.replace(config, execution=ExecutionConfig(scan_layers=scan_layers))
            _, expected = abstract_state(config, optimizer, mesh)
            state, progress = checkpoints.restore(6, expected)
            assert progress.step == 6
            jax.tree.map(lambda x, like: x.sharding == like.sharding or pytest.fail(str(x)), state, expected)
            states.append(state)
        checkpoints.close()
        theirs, ours = (jax.tree.leaves(in_layout_of(states[0].parameters, state)) for state in states)
        assert len(ours) == len(theirs) > 3 * 16
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(x, y)


def test_models_are_read_and_started_from_in_either_layout(stopped: dict[bool, Path]) -> None:
    for scanned, workdir in stopped.items():
        _, as_trained, _ = load_model(workdir, "latest")
        run, other, _ = load_model(workdir, "latest", execution=ExecutionConfig(scan_layers=not scanned))
        assert other.decoder.execution == run.config.execution != as_trained.decoder.execution
        started = tiny_run(**TWO_LAYERS, init_from=str(workdir), execution={"scan_layers": not scanned})
        expected = parameters_of(as_trained)
        for model in (other, initial_model(prepare(started)[0])):
            assert isinstance(model, Model)
            found = in_layout_of(expected, parameters_of(model))
            assert found.keys() == expected.keys()
            for name, value in found.items():
                np.testing.assert_array_equal(value, expected[name], name)


def test_what_changes_the_numbers_is_refused_or_allowed_by_name(stopped: dict[bool, Path], tmp_path: Path) -> None:
    faster = {"optimizer": {"learning_rate": 0.02}}
    message = r"(?s)optimizer\.learning_rate: 0\.01 there, 0\.02 here\n.*--allow optimizer\.learning_rate$"
    with pytest.raises(CoconutError, match=message):
        goes_on(stopped[False], tmp_path / "refused", **faster)
    with pytest.raises(Stop):
        goes_on(
            stopped[False], tmp_path / "allowed", {"allow": ["optimizer.learning_rate"], "validate": stop}, **faster
        )
    [change] = json.loads((tmp_path / "allowed" / "run.json").read_text())["changes"]
    assert change == {"from_step": 6, "fields": {"optimizer.learning_rate": "0.01 there, 0.02 here"}}
    # What is allowed allows nothing else, and what never can be is no name to allow.
    with pytest.raises(CoconutError, match=r"seed: 0 there, 1 here") as error:
        goes_on(stopped[False], tmp_path / "seed", {"allow": ["optimizer.learning_rate"]}, seed=1, **faster)
    assert "learning_rate" not in str(error.value) and "--allow" not in str(error.value)
    for name in ("seed", "optimizer.learning_rat", "optimizer.*"):
        with pytest.raises(CoconutError, match=rf"--allow {re.escape(name)}: only fields of optimizer\.\*, .* can be"):
            goes_on(stopped[False], tmp_path / f"never {name}", {"allow": [name]})


def test_a_run_of_before_goes_on(stopped: dict[bool, Path], tmp_path: Path) -> None:
    """Its ``run.json`` has the fields of `ExecutionConfig` among the decoder's."""
    workdir = tmp_path / "run"
    shutil.copytree(stopped[True], workdir)
    content = json.loads((workdir / "run.json").read_text())
    content["config"]["decoder"] |= content["config"].pop("execution")
    (workdir / "run.json").write_text(json.dumps(content))
    assert Run.load(workdir).config.execution == ExecutionConfig(scan_layers=True)
    run, _, _ = prepare(tiny_run(**TWO_LAYERS, execution={"scan_layers": True}), None, workdir)
    assert run.check(workdir) == {}


def test_layers_are_stacked_and_taken_apart_with_their_places() -> None:
    single = parameters_of(Model(random_decoder(GPT2_STYLE), {}))
    stacked = parameters_of(Model(random_decoder(GPT2_STYLE, scan_layers=True), {}))
    assert in_layout_of(stacked, stacked) is stacked and in_layout_of(single, single) is single
    there = in_layout_of(stacked, {"moments": single, "count": np.ones(())})
    assert {name: x.shape for name, x in there["moments"].items()} == {name: x.shape for name, x in stacked.items()}
    name = "decoder.layers.{}mlp.up.kernel"
    np.testing.assert_array_equal(there["moments"][name.format("")][1], single[name.format("1.")])
    back = in_layout_of(single, there)
    jax.tree.map(np.testing.assert_array_equal, back["moments"], single)
    # Abstract values keep what splits them.
    place = NamedSharding(EVERY_AXIS, PartitionSpec(None, "fsdp", "tensor"))
    whole = {name.format(""): jax.ShapeDtypeStruct((2, 16, 64), "float32", sharding=place)}
    [one, other] = in_layout_of(single, whole).values()
    assert one.shape == other.shape == (16, 64)
    assert one.sharding.spec == other.sharding.spec == PartitionSpec("fsdp", "tensor")
    assert in_layout_of(whole, in_layout_of(single, whole)) == whole


def test_vectors_are_not_decayed_in_either_layout() -> None:
    """A bias of each layer is a vector, also where all of them are one matrix."""
    optimizer = make_optimizer(OptimizerConfig(decay_matrices_only=True))
    for scan_layers in (False, True):
        parameters = parameters_of(Model(random_decoder(GPT2_STYLE, scan_layers=scan_layers), {}))
        still = jax.tree.map(np.zeros_like, parameters)
        updates: Any = optimizer.update(still, optimizer.init(parameters), parameters)[0]
        moved = {name for name, update in updates.items() if np.any(update)}
        assert moved == {name for name in parameters if name.endswith(("kernel", "embedding"))}
