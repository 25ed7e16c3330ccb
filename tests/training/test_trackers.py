"""Trackers of experiments: what they hold of a run that was killed and went on, and what happens where they fail."""

import json
import signal
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from coconut.errors import CoconutError
from coconut.training.loop import train
from coconut.training.metrics import MetricsLog
from coconut.training.run import changes_metrics
from coconut.training.setup import prepare
from coconut.training.trackers import writer as writers
from coconut.training.trackers.feeding import open_trackers
from coconut.training.trackers.writer import TrackedRun, TrackingConfig, register_metrics_writer
from tests.tiny_runs import tiny_run

CONFIG = {"method": "coconut", "seed": 3, "decoder": {"num_layers": 1}, "options": None}
VALUES = {"loss": 0.5, "broken": float("nan"), "rollouts": [{"text": "→ 3"}], "learnt": None}


def tracked(workdir: Path, start: int, **changes: Any) -> TrackedRun:
    fields: dict[str, Any] = {
        **{"workdir": workdir, "start": start, "name": "runs/x", "project": None, "tags": ("baseline",)},
        **{"config": CONFIG, "provenance": {"commit": "abc"}},
    }
    return TrackedRun(**fields | changes)


def log_steps(
    workdir: Path, name: str, start: int, steps: Sequence[int], *, saved: Sequence[int] = (), differs: bool = False
) -> None:
    """Logs a line for each step as `train` does, with a validation at those `saved`; ends as if killed if none is."""
    trackers = open_trackers(TrackingConfig(writers=(name,)), tracked(workdir, start), differs=differs)
    log = MetricsLog(workdir, start=start, trackers=trackers)
    for step in steps:
        log.write("train", step, VALUES | {"loss": 1 / step})
        if step in saved:
            log.write("validation", step, {"accuracy": step / 100})
            log.flush()
    log.outcome = "finished" if saved and saved[-1] == steps[-1] else "stopped"
    log.close()


class Memory:
    """A tracker whose server forgets nothing, and may be out of reach."""

    server: dict[str, list[tuple[int, dict[str, float]]]]
    outcomes: list[writers.Outcome]
    broken: Exception | None = None

    def __init__(self, run: TrackedRun, run_id: str | None) -> None:
        self.run_id: str | None = run_id or f"run{len(self.server)}"
        self.own = self.server.setdefault(self.run_id, [])
        self.last_step = self.own[-1][0] if self.own else -1

    def write(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, Sequence[str]]) -> None:
        if self.broken:
            raise self.broken
        self.own.append((step, dict(numbers)))

    def flush(self) -> None: ...

    def close(self, outcome: writers.Outcome) -> None:
        self.outcomes.append(outcome)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Memory]]:
    monkeypatch.setattr(writers, "WRITERS", known := dict(writers.WRITERS))
    monkeypatch.setattr("coconut.training.trackers.feeding.WRITERS", known)
    kind = type("Fresh", (Memory,), {"server": {}, "outcomes": []})
    register_metrics_writer("memory", kind)
    yield kind


def steps_of(kept: list[tuple[int, dict[str, float]]]) -> list[int]:
    return [step for step, _ in kept]


def test_a_killed_run_goes_on_in_the_same_run_without_a_step_twice(memory: type[Memory], tmp_path: Path) -> None:
    log_steps(tmp_path, "memory", 0, [1, 2, 3, 4, 5], saved=[2])
    # Of step 5, whose lines may not have been all, nothing is there.
    assert steps_of(memory.server["run0"]) == [1, 2, 3, 4]
    assert memory.server["run0"][1][1] == {"train/loss": 0.5, "validation/accuracy": 0.02}
    log_steps(tmp_path, "memory", 2, [3, 4, 5, 6], saved=[6])
    assert steps_of(memory.server["run0"]) == [1, 2, 3, 4, 5, 6]
    # What is still to come of the step at which it stopped is new; a process that compiles says so again.
    log_steps(tmp_path, "memory", 6, [6], saved=[6])
    assert steps_of(memory.server["run0"]) == [1, 2, 3, 4, 5, 6, 6]
    # On with another learning rate from step 2: the steps behind it that are there already are another run's.
    log_steps(tmp_path, "memory", 2, [3, 4], saved=[4], differs=True)
    assert steps_of(memory.server["run1"]) == [1, 2, 3, 4]
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"memory": "run1"}


def test_only_the_first_process_writes(memory: type[Memory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax.process_index", lambda: 1)
    log_steps(tmp_path, "memory", 0, [1, 2], saved=[2])
    assert memory.server == {} and list(tmp_path.iterdir()) == []


def test_a_tracker_that_fails_is_left_out_and_catches_up(
    memory: type[Memory], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory.broken = OSError("no route to host")
    log_steps(tmp_path, "memory", 0, [1, 2, 3], saved=[3])
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "no route to host" in caplog.text
    assert memory.server["run0"] == []
    memory.broken = None
    log_steps(tmp_path, "memory", 3, [4], saved=[4])
    assert steps_of(memory.server["run0"]) == [1, 2, 3, 4]


def test_what_is_set_up_wrongly_is_said_at_once(memory: type[Memory], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CoconutError, match=r"none is named 'wandbb', did you mean 'wandb'\?"):
        TrackingConfig(writers=("wandbb",))
    with pytest.raises(CoconutError, match="each may be named once"):
        TrackingConfig(writers=("memory", "memory"))
    with pytest.raises(CoconutError, match="a metrics writer named 'wandb' is registered already"):
        register_metrics_writer("wandb", memory)
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CoconutError, match=r"mlflow needs `pip install coconut-jax\[mlflow\]`"):
        prepare(tiny_run(tracking={"writers": ("memory", "mlflow")}))


def test_a_run_that_goes_on_with_other_lines_is_another_run_of_the_tracker() -> None:
    assert not changes_metrics([]) and not changes_metrics(["save_every", "pipeline.threads", "tracking.writers"])
    for name in ("log_every", "microbatches", "execution.dtype", "optimizer.learning_rate"):
        assert changes_metrics(["save_every", name]), name


@pytest.mark.slow
def test_training_feeds_a_tracker_as_it_feeds_its_file(
    memory: type[Memory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, workdir = MetricsLog.write, tmp_path / "run"
    run = lambda **changes: train(
        tiny_run(**changes, curriculum={"steps_per_stage": 3}, log_every=1, save_every=2, decoder={"embed_dim": 8}),
        workdir,
        console=Console(quiet=True),
    )

    def write_and_die(self: MetricsLog, kind: str, step: int, values: Mapping[str, Any]) -> None:
        write(self, kind, step, values)
        if kind == "train" and step == 4:
            raise RuntimeError("killed")

    with monkeypatch.context() as killed, pytest.raises(RuntimeError):
        killed.setattr(MetricsLog, "write", write_and_die)
        run(tracking={"writers": ("memory",)})
    assert run().progress.finished, "a run may go on without its tracker"
    assert run(tracking={"writers": ("memory",)}).progress.finished, "and later with it"
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    own = {(step, numbers["train/loss"]) for step, numbers in memory.server["run0"] if "train/loss" in numbers}
    assert own == {(line["step"], line["loss"]) for line in lines if line["kind"] == "train"} and len(own) == 6
    names = [(step, name) for step, numbers in memory.server["run0"] for name in numbers]
    assert len(set(names)) == len(names) and {step for step, _ in names} == {line["step"] for line in lines}


def test_a_validation_that_a_stop_put_off_reaches_the_tracker(memory: type[Memory], tmp_path: Path) -> None:
    calls: list[None] = []

    def validate(*_: Any) -> Mapping[str, float]:
        calls.append(None)
        if len(calls) == 2:  # The last one of the run.
            signal.raise_signal(signal.SIGTERM)
        return {"accuracy": 0.5}

    config = tiny_run(curriculum={"steps_per_stage": 2}, decoder={"embed_dim": 8}, tracking={"writers": ("memory",)})
    for finished in (False, True):
        assert train(config, tmp_path, validate=validate, console=Console(quiet=True)).progress.finished == finished
    seen = [step for step, numbers in memory.server["run0"] if "validation/accuracy" in numbers]
    assert seen == [2, 4]


def test_a_tracker_is_told_of_an_error_that_ends_the_run(memory: type[Memory], tmp_path: Path) -> None:
    def validate(*_: Any) -> Mapping[str, float]:
        raise OSError("the disk is full")

    config = tiny_run(curriculum={"steps_per_stage": 2}, decoder={"embed_dim": 8}, tracking={"writers": ("memory",)})
    with pytest.raises(OSError, match="the disk is full"):
        train(config, tmp_path, validate=validate, console=Console(quiet=True))
    assert memory.outcomes == ["failed"]


# --- The real ones, offline.


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    log_steps(tmp_path, "tensorboard", 0, [1, 2, 3, 4], saved=[2])
    log_steps(tmp_path, "tensorboard", 2, [3, 4, 5], saved=[5])
    assert read_event_files(tmp_path / "tensorboard") == [(step, "train/loss", 1 / step) for step in (1, 2, 3, 4, 5)]


def read_event_files(folder: Path) -> list[Any]:
    """The losses as TensorBoard shows them: a file's start drops what earlier ones hold from there on."""
    from tensorboardX.proto import event_pb2

    read: Any = vars(event_pb2)["Event"].FromString

    found: list[Any] = []
    for path in sorted(folder.glob("events.*"), key=lambda path: path.name):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event, data = read(data[12 : 12 + length]), data[16 + length :]
            if event.HasField("session_log"):
                found = [seen for seen in found if seen[0] < event.step]
            found += [
                (event.step, value.tag, pytest.approx(value.simple_value))
                for value in event.summary.value
                if value.tag == "train/loss"
            ]
    return found


@pytest.mark.slow
def test_wandb_offline_has_the_whole_run_in_its_newest_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_steps(tmp_path, "wandb", 0, [1, 2, 3, 4], saved=[2])
    log_steps(tmp_path, "wandb", 2, [3, 4, 5], saved=[5])
    wandb.teardown()  # The process that writes the file has done so.
    losses, configs, read = [], {}, vars(wandb_internal_pb2)["Record"].FromString
    [file] = (tmp_path / "wandb" / "latest-run").resolve().glob("*.wandb")
    for data in log_records(file.read_bytes()[7:]):
        record = read(data)
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        losses += [(record.history.step.num, json.loads(items["train/loss"]))] if "train/loss" in items else []
        configs |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.run.run_id:
            assert record.run.run_id == json.loads((tmp_path / "trackers.json").read_text())["wandb"]
            assert (list(record.run.tags), record.run.display_name) == (["baseline"], "runs/x")
    assert losses == [(step, 1 / step) for step in (1, 2, 3, 4, 5)]
    assert (configs["seed"], configs["method"], configs["commit"]) == (3, "coconut", "abc")


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a log file of LevelDB's format that is shorter than a block: checksum, length, type, data."""
    while len(data) > 7:
        length, kind = struct.unpack("<HB", data[4:7])
        assert kind == 1, "a record in one piece"
        yield data[7 : 7 + length]
        data = data[7 + length :]


def test_wandb_without_an_account_is_an_error_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")

    def init(**_: Any) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(CoconutError, match="W&B: No API key configured"):
        log_steps(tmp_path, "wandb", 0, [1])


def _blind_once(method: Any) -> Any:
    """A method that finds nothing at its first call."""
    calls: list[None] = []

    def call(*arguments: Any) -> Any:
        calls.append(None)
        return method(*arguments) if calls[1:] else None

    return call


@pytest.mark.slow
def test_mlflow_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)  # Where MLflow puts artifacts.
    log_steps(tmp_path, "mlflow", 0, [1, 2, 3, 4], saved=[2])
    log_steps(tmp_path, "mlflow", 2, [3, 4, 5], saved=[5])
    client = MlflowClient()
    [experiment] = [found for found in client.search_experiments() if found.name == "coconut"]
    [run] = client.search_runs([experiment.experiment_id], filter_string="tags.baseline = 'true'")
    assert run.info.run_id == json.loads((tmp_path / "trackers.json").read_text())["mlflow"]
    assert (run.info.status, run.info.run_name) == ("FINISHED", "runs/x")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(step, 1 / step) for step in (1, 2, 3, 4, 5)]
    # Another cell of a sweep makes the experiment at the same moment.
    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", _blind_once(MlflowClient.get_experiment_by_name))
    (tmp_path / "other").mkdir()
    log_steps(tmp_path / "other", "mlflow", 0, [1], saved=[1])
    assert len(client.search_runs([experiment.experiment_id])) == 2
    assert run.data.params == {"method": "coconut", "seed": "3", "decoder.num_layers": "1", "options": "None"}
    assert (run.data.tags["commit"], run.data.tags["method"]) == ("abc", "coconut")
    samples = client.list_artifacts(run.info.run_id, "train/rollouts")
    assert [Path(found.path).name for found in samples] == [f"{step}.txt" for step in (1, 2, 3, 4, 5)]
