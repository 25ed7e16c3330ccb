"""The train loop on tiny runs: stages, resuming to the bit, what is kept, and what stops a run.

Most runs here are of No-CoT, whose stages share one program without thoughts. Compiled programs are kept on disk for
the length of this file, the subprocesses' ones included.
"""

import dataclasses
import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from coconut.errors import CoconutError, DivergedError, NotFiniteError
from coconut.losses import Term
from coconut.methods import METHODS
from coconut.storage import LOCK, hold
from coconut.training import loop
from coconut.training.checkpoint import Checkpoints
from coconut.training.config import RunConfig, to_json
from coconut.training.divergence import replay
from coconut.training.loading import load_model
from coconut.training.loop import TrainResult, train
from coconut.training.progress import Progress
from tests.tiny_runs import tiny_run

QUIET = Console(file=io.StringIO())
LANGUAGE = {"method": "no_cot"}
# What restores, too: optimizer moments, drawn stages, dropout masks, data order.
RANDOM = {"curriculum": {"uniform_prob": 0.5, "reset_optimizer": "epoch"}, "decoder": {"dropout": 0.2}}


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Keeps compiled programs on disk, and optimises none: the environment that tells a subprocess the same."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    compilation_cache.reset_cache()
    # What other tests compiled in this process was optimised, and rounds differently from the subprocess's programs.
    jax.clear_caches()
    for name, value in settings.items():
        jax.config.update(name, value)
    yield {name.upper(): str(value) for name, value in settings.items()}
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    jax.clear_caches()


def trained(config: RunConfig, workdir: Path, **options: Any) -> TrainResult:
    return train(config, workdir, **{"console": QUIET, **options})


def lines_of(workdir: Path, *kinds: str) -> list[dict[str, Any]]:
    """The metrics of a run, without times, which differ, and without what was compiled again after a restart."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    kinds = kinds or ("train", "stage", "validation")
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in lines if line["kind"] in kinds]


def final_state(workdir: Path) -> tuple[Mapping[str, np.ndarray], Progress]:
    """Every array of the latest checkpoint, by path, and where the run stands."""
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.step("latest")
    assert step is not None
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), checkpoints.arrays(step))
    state, progress = checkpoints._restore(step, abstract)
    checkpoints.close()
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}
    return jax.tree.map(np.asarray, leaves), progress


def assert_same_run(one: Path, two: Path) -> None:
    """Both ended with the same bits and the same metrics."""
    (state, progress), (other, other_progress) = final_state(one), final_state(two)
    assert state.keys() == other.keys()
    assert any("opt_state" in name for name in state)
    for name, value in state.items():
        assert value.tobytes() == other[name].tobytes(), name
    by_the_clock = {"seconds": 0.0, "log_seconds": 0.0}
    assert dataclasses.replace(progress, **by_the_clock) == dataclasses.replace(other_progress, **by_the_clock)
    assert lines_of(one) == lines_of(two)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, compiled_once: Any) -> tuple[Path, TrainResult]:
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    return workdir, trained(tiny_run(), workdir)


# --- Stages -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_goes_through_its_stages_and_says_so(uninterrupted: tuple[Path, TrainResult]) -> None:
    workdir, result = uninterrupted
    assert result.progress.finished
    assert (result.progress.step, result.progress.stage, result.compilations) == (14, 1, 2)
    assert [(line["step"], line["stage"]) for line in lines_of(workdir, "compile")] == [(0, 0), (7, 1)]
    train_lines = lines_of(workdir, "train")
    # Every second step, and the end of each stage; no line spans two stages.
    assert [(line["step"], line["stage"]) for line in train_lines] == [
        *((step, 0) for step in (2, 4, 6, 7)),
        *((step, 1) for step in (8, 10, 12, 14)),
    ]
    for line in train_lines:
        assert line["learning_rate"] == pytest.approx(1e-2)
        assert 0 <= line["padding"] < 1
        assert line["skipped"] == 0
        # There are no thoughts to measure at stage 0.
        assert ({"thought_norm", "token_norm"} <= set(line)) == (line["stage"] == 1)
        assert "norm_alert" not in line
        assert {"loss", "accuracy", "first_loss", "first_accuracy", "answer_loss", "gradient_norm"} <= set(line)
        assert line["loss"] > 0
        assert line["tokens"] > 0
    assert lines_of(workdir, "stage") == [
        {"kind": "stage", "step": 7, "stage": 0, "steps": 7, "learnt": None},
        {"kind": "stage", "step": 14, "stage": 1, "steps": 7, "learnt": None},
    ]
    assert [dict(stage)["steps"] for stage in result.progress.stages] == [7, 7]
    # Started again, a run that is done does nothing.
    before = (workdir / "metrics.jsonl").read_bytes()
    again = trained(tiny_run(), workdir)
    assert (again.progress.finished, again.compilations) == (True, 0)
    assert (workdir / "metrics.jsonl").read_bytes() == before
    for a, b in zip(jax.tree.leaves(again.model), jax.tree.leaves(result.model), strict=True):
        assert (np.asarray(a) == b).all()


@pytest.mark.slow
@pytest.mark.parametrize("bound,steps,learnt", [(100.0, 3, True), (1e-6, 7, False)])
def test_a_metric_ends_a_stage_or_its_cap_does(tmp_path: Path, bound: float, steps: int, learnt: bool) -> None:
    """The last stage has no next one to hurry to: it lasts its full length."""
    output = io.StringIO()
    curriculum = {"advance_metric": "loss", "advance_below": bound, "advance_window": 3}
    result = trained(tiny_run(curriculum=curriculum, **LANGUAGE), tmp_path, console=Console(file=output))
    assert [(line["step"], line["steps"], line["learnt"]) for line in lines_of(tmp_path, "stage")] == [
        (steps, steps, learnt),
        (steps + 7, 7, None),
    ]
    assert result.compilations == 1
    assert ("stage 0 was not learnt within 7 steps" in output.getvalue()) == (not learnt)
    # A stage that ends early logs what it had.
    assert lines_of(tmp_path, "train")[-1]["step"] == steps + 7


@pytest.mark.slow
@pytest.mark.parametrize(
    "reset,steps",
    # Stages of 7 steps, epochs of 6.
    [("never", 14), ("stage", 7), ("epoch", 2)],
)
def test_the_optimizer_starts_anew_when_it_is_told_to(tmp_path: Path, reset: str, steps: int) -> None:
    """Adam's count, and its moments: those that are left are a mean of as many gradients."""
    # Where parameters hardly move, moments that started from zero n steps ago tell n.
    optimizer = {"b1": 0.9, "b2": 0.9, "learning_rate": 1e-12, "weight_decay": 0.0}
    trained(tiny_run(curriculum={"reset_optimizer": reset}, optimizer=optimizer, **LANGUAGE), tmp_path)
    state, _ = final_state(tmp_path)
    (count,) = (value for name, value in state.items() if "count" in name)
    assert count == steps
    # The squares of gradients have one sign: their mean is short of the truth by what the start from zero left.
    moments = sum(float(value.sum()) for name, value in state.items() if "'nu'" in name)
    whole = tmp_path / "whole"
    trained(tiny_run(curriculum={"reset_optimizer": "never"}, optimizer=optimizer, **LANGUAGE), whole)
    unreset = sum(float(value.sum()) for name, value in final_state(whole)[0].items() if "'nu'" in name)
    assert moments / unreset == pytest.approx((1 - 0.9**steps) / (1 - 0.9**14), rel=0.2)


# --- Stopped and started again ------------------------------------------------------------------------------------

KILLED = """
import json, os, signal, sys
from pathlib import Path
from coconut.training.config import RunConfig, from_json
from coconut.training.loop import train
from coconut.training.metrics import MetricsLog

config, workdir, last_line = sys.argv[1:]
write, written = MetricsLog.write, []

def write_and_die(self, kind, step, values):
    write(self, kind, step, values)
    written.append(kind)
    if len(written) == int(last_line):
        os.kill(os.getpid(), signal.SIGKILL)

MetricsLog.write = write_and_die
train(from_json(RunConfig, json.loads(config), "config"), Path(workdir))
"""


def killed(config: RunConfig, workdir: Path, last_line: int, environment: dict[str, str]) -> None:
    """Trains in a process of its own, which is killed once it has written so many lines of metrics."""
    process = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(to_json(config)), str(workdir), str(last_line)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == last_line


@pytest.mark.slow
def test_a_run_killed_in_its_second_stage_ends_with_the_same_bits(
    tmp_path: Path, uninterrupted: tuple[Path, TrainResult], compiled_once: dict[str, str]
) -> None:
    # Lines: compile, 4 of stage 0 and its end, compile, steps 8 and 10.
    killed(tiny_run(), tmp_path, 9, compiled_once)
    assert (lines_of(tmp_path)[-1]["step"], final_state(tmp_path)[1].step) == (10, 9)
    # The line that was being written is torn.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    result = trained(tiny_run(), tmp_path)
    assert result.progress.finished
    assert_same_run(tmp_path, uninterrupted[0])


@pytest.mark.slow
def test_a_run_with_drawn_stages_and_dropout_killed_in_its_first_stage_ends_with_the_same_bits(
    tmp_path: Path, compiled_once: dict[str, str]
) -> None:
    config = tiny_run(**RANDOM)
    whole = tmp_path / "whole"
    trained(config, whole)
    # The latest checkpoint stands between two lines of metrics.
    killed(config, tmp_path / "killed", 3, compiled_once)
    assert (lines_of(tmp_path / "killed")[-1]["step"], final_state(tmp_path / "killed")[1].step) == (4, 3)
    trained(config, tmp_path / "killed")
    assert_same_run(tmp_path / "killed", whole)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Presses Ctrl-C while the step after ``step`` is prepared."""
    learning_rate_at = loop.learning_rate_at

    def pressed(*arguments: Any, **keywords: Any) -> float:
        if keywords["step"] == step:
            signal.raise_signal(signal.SIGINT)
        return learning_rate_at(*arguments, **keywords)

    monkeypatch.setattr(loop, "learning_rate_at", pressed)


def test_an_interrupted_run_saves_and_goes_on_to_the_same_bits(
    tmp_path: Path, uninterrupted: tuple[Path, TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 4)
        result = trained(tiny_run(), tmp_path)
    assert not result.progress.finished
    # The step under way is finished and saved, though no checkpoint was due.
    assert result.progress.step == 5
    assert final_state(tmp_path)[1].step == 5
    assert signal.getsignal(signal.SIGINT) is handler
    assert trained(tiny_run(), tmp_path).progress.finished
    assert_same_run(tmp_path, uninterrupted[0])


@pytest.mark.slow
def test_a_warm_up_of_a_stage_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = {"warmup_steps": 2, "stage_warmup_steps": 4}
    config = tiny_run(log_every=1, optimizer=optimizer, curriculum={"reset_optimizer": "stage"}, **LANGUAGE)
    trained(config, tmp_path / "whole")
    rates = [line["learning_rate"] for line in lines_of(tmp_path / "whole", "train")]
    assert rates == pytest.approx([0.005] + [0.01] * 6 + [0.0025, 0.005, 0.0075] + [0.01] * 4)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 8)
        assert trained(config, tmp_path / "stopped").progress.step == 9
    trained(config, tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_an_interruption_between_two_steps_saves_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the signal comes, the call returns with a checkpoint of the last step."""
    add, calls = loop.Meter.add, []

    def counting(self: Any, metrics: Any, **others: float) -> None:
        calls.append(None)
        add(self, metrics, **others)

    class Clock:
        """The loop looks at the clock at the end of each step at which it stops to log: the last thing it does."""

        def __getattr__(self, name: str) -> Any:
            return getattr(loop_time, name)

        def perf_counter(self) -> float:
            clock.append(len(calls) // 2)
            # Step 2 is logged and not saved: the second look at the clock in it is the last.
            if clock.count(2) == 2 and clock[-1] == 2:
                signal.raise_signal(signal.SIGINT)
            return loop_time.perf_counter()

    loop_time, clock = loop.time, []
    monkeypatch.setattr(loop.Meter, "add", counting)
    monkeypatch.setattr(loop, "time", Clock())
    result = trained(tiny_run(**LANGUAGE), tmp_path)
    assert not result.progress.finished
    assert final_state(tmp_path)[1].step == result.progress.step


def test_a_workdir_that_holds_another_run_is_left_alone(uninterrupted: tuple[Path, TrainResult]) -> None:
    workdir, _ = uninterrupted
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(CoconutError) as error:
        trained(tiny_run(seed=3, optimizer={"learning_rate": 0.5}), workdir)
    message = str(error.value)
    assert f"{workdir} holds another run" in message
    assert "\n  seed: 0 there, 3 here" in message
    assert "optimizer.learning_rate: 0.01 there, 0.5 here" in message
    assert "data_fingerprint" in message
    assert "decoder" not in message and "--allow" not in message
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_two_processes_do_not_train_in_one_workdir(tmp_path: Path) -> None:
    with hold(tmp_path), pytest.raises(CoconutError, match="another process trains in this workdir"):
        trained(tiny_run(), tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != LOCK] == []


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
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
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


def skipped_steps(workdir: Path) -> list[int]:
    """The steps that were skipped, of a run that logs each."""
    return [line["step"] for line in lines_of(workdir, "train") if line["skipped"]]
