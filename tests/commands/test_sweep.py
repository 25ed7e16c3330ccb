"""``coconut train --seeds`` and ``--sweep``: which runs it starts, in which order and where. Training is made up."""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coconut.commands import sweep
from coconut.commands.cells import make_cells
from coconut.commands.flags_of_runs import read_seeds
from coconut.commands.main import EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_DONE, EXIT_INTERRUPTED, main
from coconut.errors import CoconutError, DivergedError
from coconut.storage import make_folder
from coconut.training.config import RunConfig
from coconut.training.manifest import Manifest
from coconut.training.progress import Progress
from coconut.training.run import write_cell
from coconut.training.setup import prepare

TRAIN = ["train", "--gin_file", "gin_configs/runs/small_graphs.gin", "--gin_file", "gin_configs/methods/coconut.gin"]
TINY = [f"--gin.DataConfig.{split}=8" for split in ("train", "validation", "test")]


class Trainer:
    """Stands for `run_training`: writes run.json, and a checkpoint where the seed is neither stopped nor diverged."""

    def __init__(self) -> None:
        self.trained: list[tuple[int, str]] = []
        self.rates: list[float] = []
        self.stops: int | None = None
        self.diverges: int | None = None
        self.options: dict[str, Any] = {}

    def __call__(self, config: RunConfig, workdir: Path, *, dataset: Any = None, **options: Any) -> Any:
        self.trained.append((config.seed, workdir.name))
        self.rates.append(config.optimizer.learning_rate)
        self.options = options
        make_folder(workdir)
        run = prepare(config, dataset)[0]
        run.save(workdir, changed={}, step=0)
        write_cell(workdir, options["cell"])
        if config.seed == self.diverges:
            raise DivergedError("10 steps in a row had a gradient that is not finite")
        progress = Progress(stage=3, stage_step=5, stage_ended=True, step=5, finished=config.seed != self.stops)
        folder = workdir / "checkpoints" / "5"
        make_folder(folder)
        manifest = Manifest(progress=progress, validation={}, proven=True, parameter_norm=1.0, run={}, files={})
        manifest.write(folder)
        return types.SimpleNamespace(progress=progress, clock={"training": 1.0})


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainer]:
    trainer = Trainer()
    monkeypatch.setattr(sweep, "run_training", trainer)
    monkeypatch.setattr("coconut.commands.train.run_training", trainer)
    yield trainer


def test_seeds_run_one_after_the_other_and_go_on(
    trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*TRAIN, *TINY, "--seeds", "0..1,5", "--workdir", str(tmp_path), "--allow", "optimizer.learning_rate"]
    trainer.stops = 1
    assert main(command) == EXIT_INTERRUPTED
    assert trainer.trained == [(0, "seed_0"), (1, "seed_1")] and trainer.options["allow"] == ["optimizer.learning_rate"]
    assert f"the same command in the same --workdir {tmp_path}" in capsys.readouterr().err
    trainer.stops, trainer.trained = None, []
    assert main(command) == EXIT_DONE
    # The finished one is left alone.
    assert trainer.trained == [(1, "seed_1"), (5, "seed_5")]
    printed = capsys.readouterr()
    assert "trained 3 seeds" in printed.out and "seed 0 (1 of 3): is finished" in printed.err
    assert main([*TRAIN, *TINY, "--seeds", "7", "--workdir", str(tmp_path / "seed_1")]) == EXIT_BAD_INPUT
    assert "seed_1: is a run itself" in capsys.readouterr().err


def test_a_seed_that_diverges_keeps_no_other_from_running(
    trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.diverges = 0
    assert main([*TRAIN, *TINY, "--seeds", "0,1", "--workdir", str(tmp_path)]) == EXIT_DIVERGED
    assert [seed for seed, _ in trainer.trained] == [0, 1]
    assert "coconut train: seed 0: 10 steps in a row" in capsys.readouterr().err


def test_another_run_in_a_seeds_folder_is_found_before_any_is_trained(
    trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TRAIN, *TINY, "--seeds", "1", "--workdir", str(tmp_path)]) == EXIT_DONE
    trainer.trained = []
    other = [*TRAIN, *TINY, "--gin.OptimizerConfig.learning_rate=0.5", "--seeds", "0,1", "--workdir", str(tmp_path)]
    assert main(other) == EXIT_BAD_INPUT
    assert "seed_1 holds another run" in capsys.readouterr().err and trainer.trained == []


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--gin.RunConfig.seed=1"], "--gin.RunConfig.seed=1: is about one run"),
        (["--gin_binding", "coconut.RunConfig.seed = 1"], "--gin.coconut.RunConfig.seed = 1: is about one run"),
        (["--from_step", "3"], "--from_step 3: is about one run"),
        (["--cell", "2"], "--cell 2: must be from 0 to 1"),
        (["--distributed"], "--distributed: is about one run"),
        (["--coordinator", "x:1", "--num_processes", "2", "--process_id", "0"], "--coordinator: is about one run"),
    ],
)
def test_flags_of_one_run_are_refused(
    flags: list[str], named: str, trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TRAIN, *flags, "--seeds", "0,1", "--workdir", str(tmp_path)]) == EXIT_BAD_INPUT
    assert named in capsys.readouterr().err and trainer.trained == []


SWEEP = ["--sweep", "OptimizerConfig.learning_rate = [1e-3, 3e-3]"]


def test_a_sweep_trains_every_cell_in_a_folder_of_its_own(
    trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = [*TRAIN, *TINY, *SWEEP, "--seeds", "4,5", "--workdir", str(tmp_path)]
    folders = [f"learning_rate_{rate}/seed_{seed}" for rate in (0.001, 0.003) for seed in (4, 5)]
    assert main([*grid, "--dry_run"]) == EXIT_DONE
    listed = capsys.readouterr().out.splitlines()
    assert listed[:4] == [f"{index}  {folder}" for index, folder in enumerate(folders)]
    assert list(tmp_path.iterdir()) == [] and trainer.trained == []
    # One of them, as a job array trains it; then all, of which it is done.
    assert main([*grid, "--cell", "2"]) == EXIT_DONE
    assert (trainer.trained, trainer.rates) == ([(4, "seed_4")], [0.003])
    assert main(grid) == EXIT_DONE
    assert trainer.rates == [0.003, 0.001, 0.001, 0.003] and trainer.trained[3] == (5, "seed_5")
    assert "trained 4 runs" in capsys.readouterr().out
    assert all((tmp_path / folder / "run.json").exists() for folder in folders)
    assert main(["runs", str(tmp_path)]) == EXIT_DONE
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:5] == ["run", "state", "method", "learning_rate", "seed"]
    assert [line.split()[:5] for line in lines] == [
        [folder, "finished", "coconut", folder[14:19], folder[-1]] for folder in folders
    ]


def test_a_bad_cell_is_found_before_any_is_trained(
    trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, named in (
        ("OptimizerConfig.learning_rate = [1e-3, -1]", "learning_rate -1: OptimizerConfig.learning_rate = -1"),
        ("DecoderConfig.max_positions = [64, 3]", "max_positions 3: "),
        ("OptimizerConfig.learning_rat = [1]", "unknown field 'OptimizerConfig.learning_rat'"),
    ):
        assert main([*TRAIN, *TINY, "--sweep", flags, "--workdir", str(tmp_path)]) == EXIT_BAD_INPUT
        assert named in capsys.readouterr().err and trainer.trained == []
    bound = ["--gin.OptimizerConfig.learning_rate=1", "--workdir", str(tmp_path)]
    assert main([*TRAIN, *SWEEP, *bound]) == EXIT_BAD_INPUT
    assert "--gin.OptimizerConfig.learning_rate=1: is about one run" in capsys.readouterr().err
    dropped = ["--drop_too_long", "--sweep", "DataConfig.drop_too_long = [True, False]", "--workdir", str(tmp_path)]
    assert main([*TRAIN, *dropped]) == EXIT_BAD_INPUT
    assert "--drop_too_long: is about one run" in capsys.readouterr().err
    assert main([*TRAIN, "--cell", "0", "--workdir", str(tmp_path)]) == EXIT_BAD_INPUT
    assert "--cell 0: is one of a sweep" in capsys.readouterr().err


def test_a_sweep_is_read_from_text_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "grid.gin").write_text("# Two fields.\nA.x = [\n  1,\n  'b c',\n]\nB.x = [None]\n")
    cells = make_cells([str(tmp_path / "grid.gin"), "C.y = [(1, 2)]"], [7])
    assert [cell.folder for cell in cells] == ["A.x_1/B.x_None/y__1_2_/seed_7", "A.x_b_c/B.x_None/y__1_2_/seed_7"]
    assert cells[1].bindings == ("A.x = 'b c'", "B.x = None", "C.y = (1, 2)", "RunConfig.seed = 7")
    for text, message in (
        ("A.x", "neither FIELD"),
        ("A.x = 3", "must be a list"),
        ("A.x = []", "must be a list of at least one"),
        ("A.x = [@B()]", "a sweep is FIELD"),
        ("A.x = [b]", "values must be numbers, quoted text"),
        ("A.x = [1, 1]", "x_1/seed_0: each value may stand once"),
        ("A[0] = [1]", "a sweep is FIELD"),
        ("RunConfig.seed = [1]", "RunConfig.seed is swept already"),
        ("coconut.RunConfig.seed = [1]", "RunConfig.seed is swept already"),
    ):
        with pytest.raises(CoconutError, match=message):
            make_cells([text], [0])


def test_seeds_are_read() -> None:
    assert read_seeds("0..4") == (0, 1, 2, 3, 4) and read_seeds("7") == (7,) and read_seeds("3,0..1,9") == (3, 0, 1, 9)
    for text in ("", "0,", "a", "-1", "0..", "0...2", "4..0", "1,0..2", "0, 1"):
        with pytest.raises(CoconutError, match="--seeds"):
            read_seeds(text)
