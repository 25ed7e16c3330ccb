"""The train loop on tiny runs: stages, and resuming to the bit.

Most runs here are of No-CoT, whose stages share one program without thoughts. Compiled programs are kept on disk for
the length of this file, the subprocesses' ones included.
"""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from coconut.errors import CoconutError
from coconut.storage import LOCK, hold
from coconut.training import loop
from coconut.training.config import RunConfig, to_json
from coconut.training.loop import TrainResult
from tests.tiny_runs import tiny_run
from tests.training.trained_runs import LANGUAGE, assert_same_run, final_state, interrupt_at, lines_of, trained

pytestmark = pytest.mark.usefixtures("compiled_once")

# What restores, too: optimizer moments, drawn stages, dropout masks, data order.
RANDOM = {"curriculum": {"uniform_prob": 0.5, "reset_optimizer": "epoch"}, "decoder": {"dropout": 0.2}}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, compiled_once: Any) -> tuple[Path, TrainResult]:
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    seen: list[Any] = []
    result = trained(tiny_run(), workdir, look_at_step=lambda *told: seen.append(told))
    ((config, mesh, schedules, step),) = seen  # Of two programs the first.
    assert config == result.run.config and mesh.size == jax.device_count() and step.cost_analysis()
    assert [[type(span).__name__ for span in schedule] for schedule in schedules] == [["Language"]]
    return workdir, result


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
        assert "thought_cosine" not in line  # A single thought has no neighbour.
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
