"""What a workdir says of its run, and what is refused of it: another run's files, torn lines, changed questions."""

import dataclasses
import hashlib
import io
import json
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from coconut.commands.checkpoint import list_checkpoints
from coconut.errors import CoconutError
from coconut.storage import LineLog, hold
from coconut.training import loop
from coconut.training.loading import load_model
from coconut.training.loop import train
from coconut.training.metrics import MetricsLog
from coconut.training.run import Run, split_fingerprint
from coconut.training.workdir import SWEEP_FILE, swept_values
from coconut.types import Example, Graph, Think
from tests.tiny_runs import tiny_run

CHANGES: Mapping[str, Any] = {
    "method": "no_cot",
    "curriculum": {"steps_per_stage": 2},
    "save_every": 1,
    "log_every": 1,
    "decoder": {"embed_dim": 8},
}
CONFIG = tiny_run(**CHANGES)


def trained(workdir: Path | str, config: Any = CONFIG, **options: Any) -> Any:
    return train(config, workdir, console=Console(file=io.StringIO()), **options)


def events(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("done") / "run"
    trained(str(workdir))
    return workdir


@pytest.fixture
def workdir(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "run"))


def test_a_folder_of_runs_names_them_and_a_quickstarts_stands_for_coconut(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "quickstart"
    for name in ("cot", "warm_up"):
        shutil.copytree(done, folder / name)
    for looked_at in (folder, folder.parent):
        for load in (load_model, Run.load, list_checkpoints):
            message = f"no run: .* there are runs in it, name one: {folder / 'cot'}, {folder / 'warm_up'}$"
            with pytest.raises(CoconutError, match=message):
                load(str(looked_at))
    shutil.copytree(done, folder / "coconut")
    _, _, progress = load_model(str(folder))
    assert progress == load_model(done)[2]
    assert list_checkpoints(str(folder)) == list_checkpoints(done)


def test_a_workdir_explains_itself(done: Path) -> None:
    kinds = [event["kind"] for event in events(done)]
    assert kinds == ["start", "save", "stage", "save", "save", "stage", "save", "stop"]
    started = json.loads((done / "run.json").read_text())["started"]
    assert {"command", "commit", "hardware", "versions"} <= started.keys()
    assert set(json.loads((done / "run.json").read_text())["splits"]) == {"train", "validation", "test"}
    assert all("time" in event and "process" in event for event in events(done))


@pytest.mark.parametrize("content", ["5", "[]", "{", '"a"', "null", "[" * 100_000])
def test_a_run_json_that_is_none_is_named(workdir: Path, content: str) -> None:
    (workdir / "run.json").write_text(content)
    with pytest.raises(CoconutError, match=r"run/run\.json"):
        trained(workdir)


@pytest.mark.parametrize("line", ["5", "[]", '{"kind": "tr', "{}", '{"step": "1"}', "\x00"])
def test_a_damaged_line_of_metrics_takes_no_other_with_it(workdir: Path, line: str, caplog: Any) -> None:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], line, *lines[3:]]) + "\n")
    trained(workdir)
    assert path.read_text().splitlines() == lines
    assert "left out lines [4]" in caplog.text
    assert line in path.with_name("metrics.jsonl.damaged").read_text()


def test_a_cell_is_written_once_its_workdir_is_known_to_be_its_own(workdir: Path) -> None:
    cell = {"cell": 1, "cells": 2, "values": {"RunConfig.seed": 3}}
    with hold(workdir), pytest.raises(CoconutError, match="another process"):
        trained(workdir, cell=cell)
    with pytest.raises(CoconutError, match="holds another run"):
        trained(workdir, dataclasses.replace(CONFIG, seed=9), cell=cell)
    assert not (workdir / SWEEP_FILE).exists()
    trained(workdir, cell=cell)
    assert swept_values(workdir) == {"RunConfig.seed": 3}


def test_checkpoints_of_another_run_are_not_adopted(workdir: Path) -> None:
    """Without run.json the checkpoints themselves say whose they are."""
    (workdir / "run.json").unlink()
    other = tiny_run(**{**CHANGES, "seed": 1})
    with pytest.raises(CoconutError, match=r"(?s)the checkpoint of step 4 is of another run.*seed: 0 there, 1 here"):
        trained(workdir, other)
    # The same run goes on.
    assert trained(workdir).progress.finished


def test_a_checkpoint_of_another_run_is_not_taken_among_ones_own(workdir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    trained(other, tiny_run(**{**CHANGES, "seed": 1}))
    shutil.rmtree(workdir / "checkpoints")
    shutil.copytree(other / "checkpoints", workdir / "checkpoints")
    with pytest.raises(CoconutError, match="is of another run"):
        trained(workdir)


def test_validation_questions_that_change_are_refused_unless_they_are_named(workdir: Path) -> None:
    """Else the best checkpoint would be chosen by two files."""
    content = json.loads((workdir / "run.json").read_text())
    content["splits"]["validation"] = "0" * 64
    (workdir / "run.json").write_text(json.dumps(content))
    with pytest.raises(CoconutError, match=r"(?s)splits\.validation: .*--allow splits\.validation"):
        trained(workdir)
    trained(workdir, allow=["splits.validation"])
    assert "splits.validation" in json.loads((workdir / "run.json").read_text())["changes"][0]["fields"]
    # A run.json of before there were fingerprints says nothing of them.
    del content["splits"]
    (workdir / "run.json").write_text(json.dumps(content))
    assert Run.load(workdir).splits == {}
    trained(workdir)


@pytest.mark.parametrize("how", ["moved", "deleted"])
def test_a_workdir_that_goes_away_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    write, workdir = MetricsLog.write, tmp_path / "run"

    def write_then_lose(self: MetricsLog, kind: str, step: int, values: Mapping[str, Any]) -> None:
        write(self, kind, step, values)
        if kind == "train" and step == 1:
            workdir.rename(tmp_path / "elsewhere") if how == "moved" else shutil.rmtree(workdir)

    monkeypatch.setattr(MetricsLog, "write", write_then_lose)
    with pytest.raises(CoconutError, match=r"run|moved"):
        trained(workdir)


def test_a_full_disk_while_only_metrics_are_written_names_the_file(tmp_path: Path) -> None:
    log = LineLog(tmp_path / "lines")
    log._file = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115 - Closing it fails, too.
    log._check_place = lambda: None
    with pytest.raises(CoconutError, match=r"lines: No space left on device"):
        log.write("x" * 10_000)


def test_a_run_stopped_in_its_validation_saves_at_once_and_validates_when_it_goes_on(tmp_path: Path) -> None:

    calls = []

    def validate(*_: Any) -> Mapping[str, float]:
        calls.append(None)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("a validation goes on behind a signal")
        return {"accuracy": 0.25 * len(calls)}

    stopped = trained(tmp_path / "run", validate=validate)
    assert (stopped.progress.step, stopped.progress.validation_due, stopped.progress.finished) == (4, True, False)
    assert trained(tmp_path / "run", validate=validate).progress.finished
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    validations = [(line["step"], line["accuracy"]) for line in lines if line["kind"] == "validation"]
    assert validations == [(2, 0.25), (4, 0.75)]
    # The loop is left as an uninterrupted one leaves it.
    assert loop.interruption._notice is None


def test_a_splits_fingerprint_is_that_of_every_field_however_it_is_computed():
    """Runs of earlier versions were pinned to it."""
    graph = Graph(symbols=("a", "b"), edges=((0, 1),), root=0, target=1, negative=0)
    examples = [
        Example(question="wé?", steps=("one", Think(2), "two"), answer="3"),
        Example(question="b", steps=(), answer="a", graph=graph),
    ]
    lines = [json.dumps(dataclasses.asdict(example), sort_keys=True).encode() + b"\n" for example in examples]

    assert split_fingerprint(examples) == hashlib.sha256(b"".join(lines)).hexdigest()
    assert split_fingerprint(examples) != split_fingerprint(examples[::-1])
