"""Many runs as one thing: the list of them, a comparison, their metrics as a table. Nothing is trained here."""

import contextlib
import dataclasses
import datetime
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from coconut.analysis.runs import RunSummary, metrics_of_runs, summarize_run
from coconut.commands.compare import compare_runs, describe, print_comparison
from coconut.commands.main import EXIT_BAD_INPUT, EXIT_DONE, main
from coconut.commands.runs import list_runs, print_runs
from coconut.errors import CoconutError
from coconut.storage import hold, make_folder
from coconut.training.manifest import Manifest
from coconut.training.metrics import MetricsLog
from coconut.training.progress import Progress
from coconut.training.run import Run
from coconut.training.setup import prepare
from tests.tiny_runs import tiny_run

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def a_run() -> Run:
    return prepare(tiny_run())[0]


@pytest.fixture
def write(a_run: Run, tmp_path: Path) -> Write:
    """Writes a workdir as training would; `accuracies` are those of stage 0 and 1, at steps 7 and 14."""

    def write(name: str, accuracies: tuple[float, ...], *, finished: bool = False, **changes: Any) -> Path:
        workdir = tmp_path / name
        make_folder(workdir)
        run = dataclasses.replace(a_run, config=dataclasses.replace(a_run.config, **changes))
        run.save(workdir, changed={}, step=0)
        with contextlib.closing(MetricsLog(workdir, start=0)) as log:
            for stage, accuracy in enumerate(accuracies):
                for step in (7 * stage + 3, 7 * stage + 7):
                    loss = (1 + run.config.seed) / step
                    log.write("train", step, {"stage": stage, "first_loss": loss, "seconds": 0.5 * step})
                log.write("stage", 7 * stage + 7, {"stage": stage, "steps": 7, "learnt": None})
                log.write("validation", 7 * stage + 7, {"stage": stage, "accuracy": accuracy, "tokens": 3.0})
        if finished:
            save_manifest(workdir, run, 7 * len(accuracies), len(accuracies) - 1)
        return workdir

    return write


def save_manifest(workdir: Path, run: Run, step: int, stage: int) -> None:
    folder = workdir / "checkpoints" / str(step)
    make_folder(folder)
    progress = Progress(stage=stage, stage_step=7, stage_ended=True, step=step, finished=True)
    Manifest(progress=progress, validation={}, proven=True, parameter_norm=1.0, run=run.identity(), files={}).write(
        folder
    )


def printed(runs: list[RunSummary], folder: Path, width: int | None = None) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=width is not None, color_system=None)
    print_runs(runs, folder, console, datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=3))
    return file.getvalue()


@pytest.fixture
def several(write: Write, tmp_path: Path) -> Iterator[Path]:
    """Runs of every state, one of them held."""
    folder = tmp_path / "all"
    write("all/done/seed_2", (0.9, 0.6), finished=True, seed=2)
    write("all/done/seed_10", (0.9, 0.75), seed=10)
    running = write("all/[bold]a_method_with_a_name_that_is_longer_than_most_terminals_are_wide", (0.25,))
    with contextlib.closing(MetricsLog(write("all/lost", (0.5,)), start=7)) as log:
        log.write("diverged", 8, {"stage": 1})
    (write("all/torn", (0.5, 0.5)) / "run.json").write_text('{"config": ')
    (write("all/odd", (0.5,)) / "metrics.jsonl").write_text('{"kind": "train"}\n{"kind": "train", "step": 2}\n')
    (write("all/damaged", (0.5,), finished=True) / "checkpoints" / "7" / "manifest.json").write_text("{}")
    (folder / "no_run").mkdir()
    with hold(running):
        yield folder


def test_every_run_says_what_became_of_it(several: Path) -> None:
    runs = {Path(run.workdir).name: run for run in list_runs(several)}
    assert list(runs)[1:4] == ["damaged", "seed_2", "seed_10"] and len(runs) == 7
    found = {
        name: (run.state, run.seed, run.stage, run.step, run.accuracy, run.best_accuracy) for name, run in runs.items()
    }
    # A later stage is better than an earlier one, however accurate that was.
    assert found["seed_2"] == ("finished", 2, 1, 14, 0.6, 0.6)
    assert found["seed_10"] == ("stopped", 10, 1, 14, 0.75, 0.75)
    assert found["lost"] == ("diverged", 0, 1, 8, 0.5, 0.5)
    assert next(iter(found.values())) == ("running", 0, 0, 7, 0.25, 0.25)
    broken = {name: run.problem or "" for name, run in runs.items() if run.state == "broken"}
    assert "run.json" in broken["torn"] and "line 1: a record is" in broken["odd"] and "manifest" in broken["damaged"]
    assert len(broken) == 3
    written = datetime.datetime.fromisoformat(runs["seed_2"].written or "")
    assert abs(datetime.datetime.now(datetime.UTC) - written) < datetime.timedelta(minutes=5)


def test_the_list_fits_a_terminal_and_is_a_line_a_run_elsewhere(several: Path) -> None:
    runs = list_runs(several)
    on_terminal, in_pipe = printed(runs, several, 80).splitlines(), printed(runs, several).splitlines()
    assert max(map(len, on_terminal)) <= 80
    cells = next(line for line in on_terminal if "seed_10" in line).split()
    assert cells == ["done/seed_10", "stopped", "coconut", "10", "1", "14", "75.0", "75.0", "3", "h"]
    assert len(in_pipe) == 2 + len(runs)
    assert any(line.startswith("[bold]a_method_with_a_name_that_is_longer_than") for line in in_pipe)
    [torn] = [line for line in in_pipe if line.startswith("torn")]
    assert torn.split()[1] == "broken" and "run.json" in torn


def test_the_command_gives_json_and_refuses_a_folder_without_runs(
    several: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", str(several), "--json"]) == EXIT_DONE
    assert [RunSummary(**run) for run in json.loads(capsys.readouterr().out)] == list_runs(several)
    assert main(["runs", str(several / "no_run")]) == EXIT_BAD_INPUT
    assert "no_run: there is no run here" in capsys.readouterr().err
    assert main(["runs", str(several / "nowhere")]) == EXIT_BAD_INPUT


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": "validation", "step": 9, "stage": 1, "accuracy": "x"}',
        '{"kind": "train", "step": [9]}',
        "[" * 99999 + "\n{}",
    ],
)
def test_a_line_of_nonsense_breaks_no_list(write: Write, line: str) -> None:
    workdir = write("run", (0.5,))
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    assert summarize_run(workdir).state == "broken"


def test_a_comparison_draws_seeds_as_one(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, accuracy in enumerate((0.5, 0.7, 0.9)):
        write(f"runs/coconut/seed_{seed}", (0.2, accuracy), seed=seed)
    control = write("runs/cot", (0.4, 0.6), method="cot", log_every=3)
    output = tmp_path / "out"
    arguments = ["compare", str(tmp_path / "runs" / "coconut"), str(control), "--output", str(output)]
    assert main(arguments) == EXIT_DONE
    content = json.loads((output / "compare.json").read_text())
    coconut, cot = content["groups"]
    assert (coconut["name"], coconut["seeds"], cot["name"], cot["seeds"]) == ("coconut", [0, 1, 2], "cot", [0])
    accuracy = coconut["metrics"]["accuracy"]
    assert accuracy["values"] == [0.5, 0.7, 0.9] and (accuracy["least"], accuracy["most"]) == (0.5, 0.9)
    assert accuracy["mean"] == pytest.approx(0.7) and cot["metrics"]["tokens"]["mean"] == 3.0
    assert content["differences"] == {"log_every": [2, 3], "method": ["coconut", "cot"]}
    assert (output / "compare.md").read_text() == describe(content) + "\n"
    assert "70.0 (50.0 to 90.0)" in capsys.readouterr().out
    # On a terminal it fits, and no name is cut.
    file = io.StringIO()
    print_comparison(content, Console(file=file, width=40, force_terminal=True, color_system=None))
    assert max(map(len, file.getvalue().splitlines())) <= 40 and "log_every" in file.getvalue()
    assert (output / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    assert "coconut (n = 3)" in (output / "learning_curves.svg").read_text()


def test_runs_that_differ_in_more_than_the_seed_stay_apart(write: Write) -> None:
    first, other = write("a/x", (0.5,)), write("b/x", (0.5,), seed=1)
    # Went on with another field, or answered other questions: no longer the same but for the seed.
    for changed in ({"changes": [{"from_step": 3, "fields": {}}]}, {"splits": {"validation": "0" * 64}}):
        content = json.loads((first / "run.json").read_text()) | {"config": _config(first, seed=2)}
        third = write("c/x", (0.5,), seed=2)
        (third / "run.json").write_text(json.dumps(content | changed))
        compared = compare_runs([first, other, third])
        assert [group["seeds"] for group in compared["groups"]] == [[0, 1], [2]]
        assert [group["name"] for group in compared["groups"]] == ["a/x", "c/x"]
        assert {name.split(".")[0] for name in compared["differences"]} == set(changed)


def _config(workdir: Path, **changes: Any) -> Mapping[str, Any]:
    return json.loads((workdir / "run.json").read_text())["config"] | changes


def test_a_comparison_refuses(write: Write, tmp_path: Path) -> None:
    run, other, new = write("a", (0.5,)), write("b", (0.5,), seed=1), write("c", ())
    (tmp_path / "empty").mkdir()
    cases: list[tuple[list[Path], dict[str, Any], str]] = [
        ([run], {}, "a: is one run"),
        ([run, run], {}, "a: is named twice"),
        ([run, tmp_path / "empty"], {}, "empty: there is no run"),
        ([run, new], {}, "the run has no metrics yet"),
        ([run, other], {"loss": "lost"}, "--loss lost: no run has this metric of training; they have first_loss"),
    ]
    for workdirs, options, message in cases:
        with pytest.raises(CoconutError, match=message):
            compare_runs(workdirs, **options)


def test_metrics_of_runs_are_one_table(write: Write, tmp_path: Path) -> None:
    write("some/seed_0", (0.5, 0.7))
    write("some/seed_1", (0.6,), seed=1)
    table = metrics_of_runs(str(tmp_path / "some"))
    assert table == metrics_of_runs([tmp_path / "some" / "seed_0", tmp_path / "some" / "seed_1"])
    accuracies = [(x["seed"], x["step"], x["accuracy"]) for x in table if x["kind"] == "validation"]
    assert accuracies == [(0, 7, 0.5), (0, 14, 0.7), (1, 7, 0.6)]
    assert {x["method"] for x in table} == {"coconut"} and len(table) == 12
