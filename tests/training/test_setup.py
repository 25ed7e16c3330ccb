"""What a run starts from: the parameters of another one, where the two fit."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from coconut.errors import CoconutError
from coconut.latent.feedback import FeedbackConfig, Norm
from coconut.methods import METHODS
from coconut.model import parameters_of
from coconut.tasks import save_examples
from coconut.tokenizers import TokenizedExample, symbol_tokenizer
from coconut.training.loading import load_model
from coconut.training.loop import TrainResult, train
from coconut.training.run import Run
from coconut.training.setup import fit_to_positions, initial_model, prepare
from coconut.types import Example
from tests.tiny_models import quick_compilation
from tests.tiny_runs import tiny_run

QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly() -> Iterator[None]:
    with quick_compilation():
        yield


def test_examples_that_are_too_long_at_any_stage_are_an_error_or_dropped(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer, array = symbol_tokenizer(["a", "b"]), lambda length: np.zeros(length, np.int32)
    # Columns at stage 0, with both markers: 9, 10 and 11; the thought at stage 1 is shorter than the step.
    examples = [TokenizedExample(question=array(length), steps=(array(2),), answer=array(2)) for length in (3, 4, 5)]

    def fitting(limit: int, drop: bool = False, method: str = "coconut") -> list[TokenizedExample]:
        config = tiny_run(method=method, decoder={"max_positions": limit}, data={"drop_too_long": drop})
        return fit_to_positions(examples, Run(config, tokenizer, data=""))

    assert fitting(11) == examples
    with pytest.raises(
        CoconutError, match=r"1 of 3 training examples do not fit .*max_positions = 10; .* 11 positions"
    ):
        fitting(10)
    assert fitting(10, drop=True) == examples[:2]
    assert "1 of 3 training examples do not fit" in caplog.text and "dropped" in caplog.text
    with pytest.raises(CoconutError, match="nothing is left"):
        fitting(8, drop=True)
    # Without markers there is more room.
    assert fitting(9, method="cot") == examples


def test_data_without_steps_are_an_error_for_methods_that_learn_from_them(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    save_examples(path, [Example(question=f"a b {symbol}", steps=(), answer="a") for symbol in "abc"])
    data = {"train": str(path), "validation": 0, "options": {}}
    assert not any(METHODS[name].needs_steps for name in ("no_cot", "pause", "coconut_without_curriculum"))
    assert all(METHODS[name].needs_steps for name in ("coconut", "cot", "icot", "pause_as_thought"))
    for name, method in METHODS.items():
        if not method.needs_steps:
            prepare(tiny_run(method=name, data=data))
            continue
        with pytest.raises(CoconutError, match=f"method = '{name}' learns from steps, and none of the 3 training"):
            prepare(tiny_run(method=name, data=data))


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    """A run that has ended."""
    workdir = tmp_path_factory.mktemp("earlier") / "run"
    return workdir, train(tiny_run(), workdir, console=QUIET)


@pytest.mark.slow
def test_a_run_can_start_from_anothers_parameters(earlier: tuple[Path, TrainResult]) -> None:
    workdir, result = earlier
    run, _, _ = prepare(tiny_run(seed=4, method="cot", init_from=str(workdir)))
    taken, given = parameters_of(initial_model(run)), parameters_of(result.model)
    assert taken.keys() == given.keys()
    assert all((np.asarray(taken[name]) == given[name]).all() for name in given)
    fresh, _, _ = prepare(tiny_run(seed=4, method="cot"))
    assert any((np.asarray(value) != given[name]).any() for name, value in parameters_of(initial_model(fresh)).items())


@pytest.mark.slow
def test_the_feedback_travels_with_the_checkpoint(tmp_path: Path, earlier: tuple[Path, TrainResult]) -> None:
    result = train(tiny_run(feedback={"kind": "norm", "factor": 0.5}), tmp_path, console=QUIET)
    run, model, _ = load_model(tmp_path, "latest")
    assert run.config.feedback == FeedbackConfig(kind="norm", factor=0.5)
    assert isinstance(model.feedback, Norm)
    # It was trained: at stage 1 a gradient reaches it.
    assert np.abs(np.asarray(model.feedback.scale[...]) - 0.5).min() > 1e-4
    given = parameters_of(result.model)
    assert all((np.asarray(value) == given[name]).all() for name, value in parameters_of(model).items())
    # The same feedback is taken over with the rest; for another one the decoder alone is.
    for feedback, scale in (
        ({"kind": "norm", "factor": 0.5}, model.feedback.scale[...]),
        ({"kind": "norm"}, jnp.ones(16)),
    ):
        run, _, _ = prepare(tiny_run(init_from=str(tmp_path), feedback=feedback))
        taken = parameters_of(initial_model(run))
        assert (taken.pop("feedback.scale") == scale).all()
        assert all((np.asarray(value) == given[name]).all() for name, value in taken.items())
    run, _, _ = prepare(tiny_run(init_from=str(earlier[0]), feedback={"kind": "norm"}))
    assert (parameters_of(initial_model(run))["feedback.scale"] == 1).all()


@pytest.mark.parametrize(
    "changes,why",
    [
        ({"data": {"options": {"config": "e12"}}, "decoder": {"max_positions": 64}}, "its tokenizer is another one"),
        (
            {"decoder": {"embed_dim": 32}},
            "its decoder is another one:\n  embed_dim: 16 there, 32 here",
        ),
        ({"decoder": {"num_heads": 4}}, "its decoder is another one:\n  num_heads: 2 there, 4 here"),
    ],
)
def test_parameters_that_do_not_fit_are_an_error(
    earlier: tuple[Path, TrainResult], changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(CoconutError, match=rf"RunConfig\.init_from = .*{why}"):
        initial_model(prepare(tiny_run(init_from=str(earlier[0]), **changes))[0])


def test_starting_from_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CoconutError, match=r"holds no run: .*run\.json is missing"):
        prepare(tiny_run(init_from=str(tmp_path)))
