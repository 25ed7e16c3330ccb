"""What a train loop keeps, and what stops it: validations, full disks, numbers that are not finite."""

import dataclasses
import json
import resource
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coconut.errors import CoconutError, DivergedError, NotFiniteError
from coconut.losses import Term
from coconut.methods import METHODS
from coconut.training import loop
from coconut.training.checkpoint import Checkpoints
from coconut.training.divergence import replay
from coconut.training.loading import load_model
from tests.tiny_runs import tiny_run
from tests.training.trained_runs import (
    LANGUAGE,
    assert_same_run,
    interrupt_at,
    lines_of,
    skipped_steps,
    trained,
)

pytestmark = pytest.mark.usefixtures("compiled_once")


# --- What is kept -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_validation_chooses_the_best_of_the_last_stage(tmp_path: Path) -> None:
    accuracies = iter([0.9, 1.0, 0.5, 0.3, 0.8, 0.4])
    seen = []

    def validate(model: Any, run: Any, dataset: Any, stage: int) -> Mapping[str, float]:
        seen.append((stage, len(dataset.splits["validation"])))
        return {"accuracy": next(accuracies), "tokens": 2.0}

    config = tiny_run(evaluate_every=2, save_every=None, keep_latest=1, curriculum={"steps_per_stage": 6}, **LANGUAGE)
    trained(config, tmp_path, validate=validate)
    assert seen == [(0, 4)] * 3 + [(1, 4)] * 3
    validations = [(line["step"], line["stage"], line["accuracy"]) for line in lines_of(tmp_path, "validation")]
    assert validations == [(2, 0, 0.9), (4, 0, 1.0), (6, 0, 0.5), (8, 1, 0.3), (10, 1, 0.8), (12, 1, 0.4)]
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [10, 12]
    _, _, progress = load_model(tmp_path, "best")
    assert (progress.step, progress.stage, progress.finished) == (10, 1, False)
    assert load_model(tmp_path, "latest")[2].finished


def test_validation_after_each_epoch(tmp_path: Path) -> None:
    """44 examples in batches of 8 are epochs of six steps, which stages of seven do not respect."""
    config = tiny_run(evaluate_every="epoch", save_every=None, **LANGUAGE)
    trained(config, tmp_path, validate=lambda model, run, dataset, stage: {"accuracy": 0.5})
    assert [line["step"] for line in lines_of(tmp_path, "validation")] == [6, 7, 12, 14]


@pytest.mark.slow
def test_a_validation_that_is_not_finite_stops_the_run_and_saves_nothing(tmp_path: Path) -> None:
    values = iter([0.5, float("nan")])

    def validate(*_: Any) -> Mapping[str, float]:
        return {"accuracy": next(values)}

    with pytest.raises(CoconutError, match=r"not finite, and nothing was saved: \{'accuracy': nan\}"):
        trained(tiny_run(**LANGUAGE), tmp_path, validate=validate)
    # The validated one of stage 0, and the latest two of stage 1 before its end.
    assert load_model(tmp_path, "latest")[2].step == 12
    assert load_model(tmp_path, "best")[2].stage == 1


# --- What stops a run -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's own threads complain, too.
def test_a_disk_that_fills_during_a_save_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the system refuses to write on."""
    config = tiny_run(save_every=None, keep_latest=1, **LANGUAGE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def validate(model: Any, run: Any, dataset: Any, stage: int) -> Mapping[str, float]:
        if stage == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
        return {}

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(CoconutError, match="the checkpoint of step 14 could not be saved"):
            trained(config, tmp_path, validate=validate)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    for which in ("best", "latest"):
        _, model, progress = load_model(tmp_path, which)
        assert (progress.step, progress.stage_ended) == (7, True)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model))
    # With room again the run ends as one that never met a full disk.
    assert trained(config, tmp_path).progress.finished
    trained(config, tmp_path / "whole")
    assert_same_run(tmp_path, tmp_path / "whole")


def break_above(monkeypatch: pytest.MonkeyPatch, largest: float) -> None:
    """The loss of No-CoT is no number where a parameter is larger."""
    method = METHODS["no_cot"]

    def breaking(model: Any, views: Any, context: Any) -> Any:
        loss = method.loss(model, views, context)
        own = loss.terms["language"].ratio
        broken = jnp.stack([jnp.abs(leaf).max() for leaf in jax.tree.leaves(model)]).max() > largest
        return loss._replace(terms={"language": Term(own._replace(total=jnp.where(broken, jnp.nan, own.total)))})

    monkeypatch.setitem(METHODS, "no_cot", dataclasses.replace(method, loss=breaking))


@pytest.mark.slow
def test_a_run_whose_gradients_stay_infinite_ends_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first update breaks the model; nothing after it is finite."""
    break_above(monkeypatch, 100.0)
    config = tiny_run(log_every=1, save_every=1, max_skipped_steps=3, optimizer={"learning_rate": 1e6}, **LANGUAGE)
    # What was saved of the broken model is set aside.
    message = r"3 steps in a row .* step 4; the latest checkpoint is that of step None. To do .* coconut replay .*/4"
    with pytest.raises(DivergedError, match=message):
        trained(config, tmp_path)
    assert [(line["step"], line["skipped"], "loss" in line) for line in lines_of(tmp_path, "train")] == [
        (1, 0, True),
        (2, 1, False),
        (3, 1, False),
    ]
    (line,) = lines_of(tmp_path, "diverged")
    assert (line["step"], line["stage"], line["skipped_in_a_row"]) == (4, 0, 3)
    skipped = [record.getMessage() for record in caplog.records if "was skipped" in record.getMessage()]
    assert [text.split(" was")[0] for text in skipped] == ["step 2", "step 3", "step 4"]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert all(len(event["examples"]) in (8, 4) for event in events if event["kind"] == "skip")
    assert [path.name for path in (tmp_path / "checkpoints" / "set_aside").iterdir()] == ["1.diverged"]
    # The step can be done again: no example is to blame.
    result = replay(tmp_path / "diverged" / "4")
    assert np.isnan(result["loss"])
    assert "decoder.tokens.embedding" in result["parameters"]
    assert all(np.isnan(row["loss"]) for row in result["rows"])
    # The count goes on where the run was stopped.
    with monkeypatch.context() as patched:
        interrupt_at(patched, 2)
        assert trained(config, tmp_path / "stopped").progress.skipped_in_a_row == 2
    with pytest.raises(DivergedError, match=r"3 steps in a row .* step 4; the latest checkpoint is that of step None"):
        trained(config, tmp_path / "stopped")
    # Between two looks, too: the steps are counted one by one.
    config = dataclasses.replace(config, log_every=6, save_every=None)
    with pytest.raises(DivergedError, match=r"5 steps in a row .* step 6; the latest checkpoint is that of step None"):
        trained(config, tmp_path / "rarely")


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["finish", "validation", "signal", "infinite"])
def test_a_wrecked_model_displaces_no_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """One wild update in the last step before a checkpoint that is not the periodic one."""
    break_above(monkeypatch, 100.0)
    config = tiny_run(save_every=3, keep_latest=1, **LANGUAGE)
    rate = loop.learning_rate_at
    wild = 1e38 if ending == "infinite" else 1e6
    monkeypatch.setattr(loop, "learning_rate_at", lambda *a, **k: wild if k["step"] == 13 else rate(*a, **k))
    if ending == "signal":
        interrupt_at(monkeypatch, 13)
        # The process has to go: what it had is saved beside what is known to be good.
        assert trained(config, tmp_path).progress.step == 14
        assert Checkpoints(tmp_path, read_only=True).steps() == [12, 14]
        assert load_model(tmp_path, "best")[2].step == 12
        return

    def validate(model: Any, run: Any, dataset: Any, stage: int) -> Mapping[str, float]:
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(model))
        if ending == "validation" and largest > 100:
            raise NotFiniteError("question 0")
        return {"accuracy": 0.5} if ending == "validation" else {}

    with pytest.raises(DivergedError, match="step 14"):
        trained(config, tmp_path, validate=validate)
    for which in ("best", "latest"):
        _, model, progress = load_model(tmp_path, which)
        # Without a validation the best is what a later checkpoint has proven.
        assert progress.step == {"latest": 12, "best": 9}[which]
        assert all(float(jnp.abs(leaf).max()) < 100 for leaf in jax.tree.leaves(model))


@pytest.mark.slow
def test_a_run_goes_on_past_steps_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One example spoils the batch that holds it, in each epoch of six batches."""
    method = METHODS["no_cot"]

    def spoiled(model: Any, views: Any, context: Any) -> Any:
        loss = method.loss(model, views, context)
        own = loss.terms["language"].ratio
        total = jnp.where((views["main"].examples == 5).any(), jnp.nan, own.total)
        return loss._replace(terms={"language": Term(own._replace(total=total))})

    monkeypatch.setitem(METHODS, "no_cot", dataclasses.replace(method, loss=spoiled))
    # A window of one step has nothing to judge by where that step was skipped.
    curriculum = {"advance_metric": "loss", "advance_below": 1e-6, "advance_window": 1}
    config = tiny_run(log_every=1, max_skipped_steps=3, curriculum=curriculum, **LANGUAGE)
    result = trained(config, tmp_path / "whole")
    assert result.progress.finished
    assert result.progress.step == 14
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.model))
    steps = skipped_steps(tmp_path / "whole")
    # Once in steps 1 to 6, once in 7 to 12.
    assert [(step - 1) // 6 for step in steps][:2] == [0, 1]
    assert result.progress.skipped == len(steps) < 4
    # The count goes on where the run was stopped.
    with monkeypatch.context() as patched:
        interrupt_at(patched, steps[0] - 1)
        stopped = trained(config, tmp_path / "stopped")
    assert (stopped.progress.skipped, stopped.progress.skipped_in_a_row) == (1, 1)
    trained(config, tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_checkpoints_are_closed_where_a_run_diverges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, close = [], Checkpoints.close
    monkeypatch.setattr(Checkpoints, "close", lambda self: (closed.append(self), close(self))[1])

    def diverge(*args: Any, **settings: Any) -> None:
        raise DivergedError("stopped")

    monkeypatch.setattr(loop, "make_iterator", diverge)
    with pytest.raises(DivergedError):
        trained(tiny_run(), tmp_path)
    assert len(closed) == 1


@pytest.mark.slow
def test_the_rate_is_that_of_the_steps_since_the_last_line(tmp_path: Path) -> None:
    meter = loop.Meter({"tokens": [300.0, 3.0], "loss": [2.0, 4.0], "accuracy": [1.0, 4.0]})
    assert loop._numbers(meter, 2.0) == "loss 0.500  accuracy 0.250  150 tokens/s"
    # A run that goes on counts from the last line, too.
    progress = trained(tiny_run(), tmp_path).progress
    assert 0 < progress.log_seconds == progress.seconds
