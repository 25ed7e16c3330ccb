"""Runs of the methods with several terms, views and parts: resumed to the bit, and started from another run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coconut.latent.feedback import FeedbackConfig
from coconut.methods import METHODS
from coconut.model import parameters_of
from coconut.training.loading import load_model
from coconut.training.setup import initial_model, prepare
from tests.tiny_runs import tiny_run
from tests.training.trained_runs import assert_same_run, interrupt_at, trained

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_once")]

ONE_STAGE = {"last_stage": 0, "steps_per_stage": 3}
RUNS: dict[str, dict[str, Any]] = {
    "simcot": {"curriculum": {"steps_per_stage": 2}},
    "kava": {"feedback": FeedbackConfig(kind="projection"), "curriculum": ONE_STAGE},
    "colar": {"feedback": FeedbackConfig(kind="gaussian"), "curriculum": ONE_STAGE},
    "ponder_codi": {"curriculum": ONE_STAGE, "microbatches": 2},
    **{
        name: {"feedback": FeedbackConfig(kind="projection"), "curriculum": ONE_STAGE}
        for name in ("codi", "simcot_codi", "pccot")
    },
    **{
        name: {"curriculum": ONE_STAGE}
        for name in ("cot", "no_cot", "marked_cot", "pause", "pause_as_thought", "interleaved", "ponder")
    },
}
"""What a method's run is but two stages of two steps."""


# Those with parts, views and draws of their own; the others differ in what they write on a page. Of coconut see
# test_loop.py.
SEVERAL = ("simcot", "kava", "colar", "ponder_codi", "random_thoughts")
ALIKE = sorted(METHODS.keys() - {"coconut", *SEVERAL})


@pytest.mark.parametrize("method", (*SEVERAL, *(pytest.param(name, marks=pytest.mark.heavy) for name in ALIKE)))
def test_a_run_resumes_to_the_bit(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = RUNS.get(method, {"curriculum": {"steps_per_stage": 2}})
    run = tiny_run(method=method, save_every=1, sampling={"max_new_tokens": 2}, **settings)
    trained(run, tmp_path / "whole")
    with monkeypatch.context() as patched:
        interrupt_at(patched, 2)
        assert not trained(run, tmp_path / "resumed").progress.finished
    trained(run, tmp_path / "resumed")
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")
    if method == "simcot":
        assert "reader" not in load_model(tmp_path / "whole", "latest")[1].parts
        check_readers(tmp_path / "whole")


def check_readers(workdir: Path) -> None:
    """A run goes on with the reader there is."""
    own = parameters_of(load_model(workdir, "latest", train_only=True)[1])
    readers = {name for name in own if name.startswith("reader.")}
    goes_on = parameters_of(initial_model(prepare(tiny_run(method="simcot", init_from=str(workdir)))[0]))
    for name in readers:
        np.testing.assert_array_equal(goes_on[name], own[name])


def test_a_reader_starts_as_a_copy_of_what_was_trained(tmp_path: Path) -> None:
    trained(tiny_run(curriculum=ONE_STAGE), tmp_path / "run")
    start = initial_model(prepare(tiny_run(method="simcot", init_from=str(tmp_path / "run")))[0])
    decoder = {f"reader.{name}": value for name, value in parameters_of(start).items() if name.startswith("decoder.")}
    reader = {name: value for name, value in parameters_of(start).items() if name.startswith("reader.")}
    assert {name.replace("reader.decoder.", "reader.") for name in decoder} == reader.keys()
    for name, value in decoder.items():
        copy = reader[name.replace("reader.decoder.", "reader.")]
        assert copy is not value
        np.testing.assert_array_equal(copy, value)
