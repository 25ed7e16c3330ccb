"""A module of somebody's own, in a folder that holds nothing else: trained, gone on with, evaluated, exported."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from coconut import extensions
from coconut.commands.main import EXIT_BAD_INPUT, EXIT_DONE, main
from coconut.errors import CoconutError
from coconut.model import parameters_of
from coconut.storage_path import parse_path
from coconut.training.loading import load_model
from coconut.training.setup import initial_model
from tests.tiny_models import quick_compilation

MODULE = "sums_and_turns"
RUN = {
    "RunConfig.method": "'taught'",
    "RunConfig.options": "@TaughtOptions()",
    "TaughtOptions.teacher": "0.25",
    "RunConfig.log_every": "2",
    "RunConfig.save_every": "3",
    "RunConfig.evaluation_batch_size": "8",
    "FeedbackConfig.kind": "'turned'",
    "FeedbackConfig.factor": "0.125",
    "DataConfig.task": "'sums'",
    "DataConfig.train": "40",
    "DataConfig.validation": "8",
    "DataConfig.test": "8",
    "DataConfig.options": "{'top': 8}",
    "DataConfig.tokenizer": "'words'",
    "DecoderConfig.num_layers": "1",
    "DecoderConfig.embed_dim": "16",
    "DecoderConfig.num_heads": "2",
    "DecoderConfig.max_positions": "64",
    "CurriculumConfig.max_latent_stage": "1",
    "CurriculumConfig.last_stage": "1",
    "CurriculumConfig.epochs_per_stage": "None",
    "CurriculumConfig.steps_per_stage": "5",
    "PipelineConfig.batch_size": "8",
    "OptimizerConfig.learning_rate": "0.01",
    "SamplingConfig.max_new_tokens": "8",
    "TrackingConfig.writers": "('losses',)",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(Path(__file__).parents[1] / "outside_module.py", tmp_path / f"{MODULE}.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(extensions, "_IMPORTED", [])
    return tmp_path


@pytest.mark.slow
def test_one_file_outside_the_package_does_it_all(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--import", MODULE]
    bindings = [f"--gin.{name}={value}" for name, value in RUN.items()]
    train = ["train", "--gin_file", "gin_configs/base.gin", *bindings, "--workdir", "run"]
    lines = (folder / f"{MODULE}.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) < 70
    with quick_compilation():
        assert main([*train, *own, "--dry_run"]) == EXIT_DONE
        assert "stage 1" in capsys.readouterr().out
        assert main([*train, *own]) == EXIT_DONE
        before = (folder / "run/metrics.jsonl").read_text()
        assert main([*train, *own]) == EXIT_DONE, "the same command finds the run at its end"
        assert (folder / "run/metrics.jsonl").read_text() == before
        logged = [json.loads(line) for line in before.splitlines()]
        last = [line for line in logged if line["kind"] == "train"][-1]
        losses = [f"{line['step']} {line['loss']}" for line in logged if line["kind"] == "train"]
        assert (folder / "run/losses.txt").read_text().splitlines() == losses
        assert last["objective"] == pytest.approx(last["main_loss"] + 0.25 * last["teacher_loss"], rel=1e-3)
        assert main(["evaluate", "--workdir", "run", *own, "--output", "result.json"]) == EXIT_DONE
        assert json.loads((folder / "result.json").read_text())["trained"]["examples"] == 8
        assert main(["generate", "--workdir", "run", *own, "--question", "1 + 2 + 3 ="]) == EXIT_DONE
        assert main(["export", "--workdir", "run", *own, "--output", "exported", "--which", "latest"]) == EXIT_DONE
        assert main(["data", "generate", "--task", "sums", "--count", "3", "--output", "q.json", *own]) == EXIT_DONE
    run, model, _ = load_model(parse_path("run"), "latest")
    turn = np.asarray(model.feedback.turn[...])  # pyright: ignore[reportAttributeAccessIssue]
    start = parameters_of(initial_model(run))["feedback.turn"]
    assert np.abs(turn - start).max() > 1e-4, "it was trained"
    np.testing.assert_array_equal(load_file(folder / "exported/coconut_parts.safetensors")["feedback.turn"], turn)
    exported = json.loads((folder / "exported/config.json").read_text())["coconut"]
    assert exported["feedback"] == {"kind": "turned", "factor": 0.125, "options": {}}

    # A workdir never makes the program import anything: who opens it names the module.
    assert json.loads((folder / "run/run.json").read_text())["imports"] == [MODULE]
    extensions._IMPORTED.clear()
    capsys.readouterr()
    for command in (["evaluate"], ["generate", "--question", "1"], ["export", "--output", "again"]):
        assert main([*command, "--workdir", "run"]) == EXIT_BAD_INPUT
        assert f"name it again: --import {MODULE}" in capsys.readouterr().err


def test_modules_that_cannot_be_imported_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "show", "questions.json", "--import"]
    assert main([*command, "nowhere_to_be_found"]) == EXIT_BAD_INPUT
    assert "--import nowhere_to_be_found: there is no module of this name in" in capsys.readouterr().err
    (folder / "broken_module.py").write_text("import json\n\n\ndef fail():\n    raise KeyError('x')\n\n\nfail()\n")
    assert main([*command, "broken_module"]) == EXIT_BAD_INPUT
    message = capsys.readouterr().err
    assert "broken_module.py" in message and "line 5, in fail" in message and message.rstrip().endswith("KeyError: 'x'")
    assert "importlib" not in message
    (folder / "ends_itself.py").write_text("raise SystemExit(0)\n")
    assert main([*command, "ends_itself"]) == EXIT_BAD_INPUT, "not 0, as the module would have it"
    assert "ends_itself.py" in capsys.readouterr().err
    (folder / "needs_another.py").write_text("import nowhere_to_be_found\n")
    assert main([*command, "needs_another"]) == EXIT_BAD_INPUT
    assert "No module named 'nowhere_to_be_found'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main([*command, "my_module.py/"])
    assert stopped.value.code == EXIT_BAD_INPUT


def test_a_name_that_is_taken_is_refused(folder: Path) -> None:
    (folder / "takes_a_name.py").write_text(
        "from coconut.tasks import Task, register_task\nregister_task(Task(name='prosqa'))\n"
    )
    with pytest.raises(CoconutError, match="a task named 'prosqa' is registered already"):
        extensions.import_extensions(["takes_a_name"])
