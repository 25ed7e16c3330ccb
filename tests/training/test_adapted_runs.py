"""Runs that train adapters: resumed to the bit, gone on from, exported."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from coconut.errors import CoconutError
from coconut.model import parameters_of
from coconut.models.adapters import AdapterConfig, is_adapter, merge_adapters
from coconut.training.loading import load_model
from coconut.training.loop import TrainResult
from coconut.training.run import Run
from coconut.training.setup import initial_model, prepare
from tests.tiny_runs import tiny_run
from tests.training.trained_runs import assert_same_run, final_state, interrupt_at, trained

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_once")]

ADAPTER = AdapterConfig(rank=2, alpha=4.0, dropout=0.2, targets=("layers.*.mlp.down",), trained_rows=("latent", "eos"))
# Two steps at each stage: without thoughts, and with them.
CHANGES: dict[str, Any] = {"adapter": ADAPTER, "curriculum": {"steps_per_stage": 2}, "save_every": 1}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, compiled_once: Any) -> tuple[Path, TrainResult]:
    workdir = tmp_path_factory.mktemp("adapted") / "run"
    return workdir, trained(tiny_run(**CHANGES), workdir)


def test_a_run_resumes_to_the_bit(
    adapted: tuple[Path, TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir, result = adapted
    with monkeypatch.context() as patched:
        interrupt_at(patched, 2)
        assert not trained(tiny_run(**CHANGES), tmp_path / "run").progress.finished
    trained(tiny_run(**CHANGES), tmp_path / "run")
    assert_same_run(tmp_path / "run", workdir)
    state, _ = final_state(workdir)
    moments = {name.split("'")[-2] for name in state if "opt_state" in name and "decoder" in name}
    assert moments == {name for name in parameters_of(result.model) if is_adapter(name)}
    tokenizer = result.run.tokenizer
    assert result.run.config.adapter == dataclasses.replace(
        ADAPTER, trained_rows=tuple(sorted((tokenizer.latent_id, tokenizer.eos_id)))
    )
    assert Run.load(workdir).config.adapter == result.run.config.adapter


def test_a_run_goes_on_from_adapters_or_with_what_they_make(adapted: tuple[Path, TrainResult]) -> None:
    workdir, _ = adapted
    _, model, _ = load_model(workdir, "latest")
    learnt = parameters_of(model)
    merged = parameters_of(model._replace(decoder=merge_adapters(model.decoder)))
    start = lambda adapter: parameters_of(
        initial_model(prepare(tiny_run(adapter=adapter, seed=3, init_from=str(workdir)))[0])
    )
    assert_equal(start(ADAPTER), learnt)
    assert_equal(start(None), merged)
    other = start(dataclasses.replace(ADAPTER, rank=3, trained_rows=()))
    assert_equal({name: value for name, value in other.items() if not is_adapter(name)}, merged)
    assert other["decoder.layers.0.mlp.down.lora_a"].shape == (64, 3)
    assert not np.asarray(other["decoder.layers.0.mlp.down.lora_b"]).any()


def test_targets_that_fit_nothing_are_found_before_training() -> None:
    with pytest.raises(CoconutError, match=r"AdapterConfig.targets = .*'c_attn' fits no matrix"):
        prepare(tiny_run(adapter=dataclasses.replace(ADAPTER, targets=("c_attn",))))


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
