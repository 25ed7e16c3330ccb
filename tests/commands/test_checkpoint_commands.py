"""``coconut checkpoint`` and ``coconut replay``, as they are typed."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest

from coconut.commands.main import EXIT_BAD_INPUT, EXIT_DONE, main
from coconut.training.checkpoint import Checkpoints
from coconut.training.progress import Progress
from tests.training.test_damage import state_of


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    with contextlib.closing(Checkpoints(tmp_path, {"config": {}})) as checkpoints:
        for step in (4, 8):
            checkpoints.save(state_of(step), Progress(step=step), {"accuracy": step / 16}, proven=True)
    return tmp_path


def test_list_verify_and_show(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "list", str(workdir)]) == EXIT_DONE
    table = capsys.readouterr().out
    assert "| 4    | 0     | 25.0       |" in table
    assert table.splitlines()[3].split("|")[-2].strip() == "best"
    assert main(["checkpoint", "verify", str(workdir)]) == EXIT_DONE
    assert capsys.readouterr().out.count("whole: ") == 2
    assert main(["checkpoint", "show", str(workdir), "--step", "4"]) == EXIT_DONE
    shown = json.loads(capsys.readouterr().out)
    assert (shown["step"], shown["validation"]) == (4, {"accuracy": 0.25})
    assert shown["arrays"]["['parameters']['w']"] == "float32 [300]"


def test_damage_is_listed_and_verify_fails_by_it(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(workdir / "checkpoints" / "4", workdir / "checkpoints" / "16")
    (workdir / "checkpoints" / "8" / "more").write_text("")
    assert main(["checkpoint", "verify", str(workdir)]) == EXIT_BAD_INPUT
    lines = capsys.readouterr().out.splitlines()
    assert "whole" in lines[2] and "8/more does not belong to the checkpoint" in lines[3]
    assert "its manifest is that of step 4" in lines[4]
    assert main(["checkpoint", "list", str(workdir)]) == EXIT_DONE
    assert "damaged" in capsys.readouterr().out.splitlines()[4]


@pytest.mark.parametrize("action", ["list", "verify", "show"])
def test_a_folder_without_checkpoints_is_bad_input(
    tmp_path: Path, action: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", action, str(tmp_path)]) == EXIT_BAD_INPUT
    assert "holds no run: " in capsys.readouterr().err
    (tmp_path / "checkpoints").mkdir()
    assert main(["checkpoint", action, str(tmp_path)]) == EXIT_BAD_INPUT
    assert "holds no checkpoint" in capsys.readouterr().err


def test_replay_names_what_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(tmp_path / "diverged" / "4")]) == EXIT_BAD_INPUT
    assert "holds no run" in capsys.readouterr().err
