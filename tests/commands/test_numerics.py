"""``coconut numerics``, and ``coconut evaluate`` in a dtype that is asked for."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from coconut.commands.main import EXIT_BAD_INPUT, EXIT_DONE, main
from coconut.model import parameters_of
from coconut.training.loading import Numerics, load_model
from tests.tiny_models import quick_compilation
from tests.tiny_runs import tiny_run
from tests.training.trained_runs import trained

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly() -> Iterator[None]:
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    trained(tiny_run(curriculum={"steps_per_stage": 1}, save_every=None), folder)
    return folder


ASKED = ["--split", "validation"]


def test_settings_are_compared_with_the_first(workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "numerics.json"
    settings = ["--dtypes", "float32,bfloat16:float32,bfloat16", "--batch_sizes", "4,3"]
    arguments = ["numerics", "--workdir", str(workdir), *ASKED, *settings, "--output", str(output)]
    assert main(arguments) == EXIT_DONE
    result = json.loads(output.read_text())
    pairs = [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")]
    found = [(own["param_dtype"], own["dtype"], own["batch_size"], own["devices"]) for own in result["settings"]]
    assert found == [(*pair, size, 1) for pair in pairs for size in (4, 3)]
    assert result["settings"][0]["other_texts"] == 0 and result["smallest_margin"] > 0
    assert (result["questions"], result["method"], result["stage"]) == (4, "coconut", 1)
    assert "first setting's" in capsys.readouterr().out
    for flags, message in {
        ("--dtypes", "half"): "--dtypes half: Numerics.dtype = 'half': must be one of",
        ("--batch_sizes", "0"): "--batch_sizes 0: must be at least 1",
        ("--limit", "0"): "--limit 0: must be at least 1",
        ("--mesh", "data=2"): "--mesh: asks for 2 devices, there are 1 (cpu)",
    }.items():
        assert main(["numerics", "--workdir", str(workdir), *ASKED, *flags]) == EXIT_BAD_INPUT
        assert message in capsys.readouterr().err


def test_a_cpu_becomes_several_devices(workdir: Path) -> None:
    arguments = ["--workdir", str(workdir), *ASKED, "--dtypes", "float32", "--batch_sizes", "4"]
    meshes = ["--mesh", "data=1", "--mesh", "data=2"]
    command = [sys.executable, "-m", "coconut", "numerics", *arguments, *meshes]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    cells = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines() if line.startswith("| float")]
    assert [(row[4], row[6]) for row in cells] == [("1", "0"), ("data=2", "0")]


def test_evaluate_computes_in_the_dtype_that_is_asked_for(workdir: Path, tmp_path: Path) -> None:
    def evaluated(*flags: str) -> tuple[dict, list[str]]:
        output, answers = tmp_path / "result.json", tmp_path / "answers.jsonl"
        files = ["--output", str(output), "--answers", str(answers)]
        assert main(["evaluate", "--workdir", str(workdir), *ASKED, *flags, *files]) == EXIT_DONE
        return json.loads(output.read_text())["config"], answers.read_text().splitlines()

    config, answers = evaluated("--dtype", "float32")
    assert (config["execution"]["dtype"], config["decoder"]["param_dtype"]) == ("float32", "float32")
    assert answers == evaluated()[1]
    config, _ = evaluated("--dtype", "float32", "--param_dtype", "bfloat16")
    assert (config["execution"]["dtype"], config["decoder"]["param_dtype"]) == ("float32", "bfloat16")
    _, stored, _ = load_model(workdir)
    _, model, _ = load_model(workdir, numerics=Numerics(param_dtype="bfloat16"))
    jax.tree.map(
        lambda own, there: np.testing.assert_array_equal(own, there.astype("bfloat16")),
        parameters_of(model),
        parameters_of(stored),
    )
