"""``coconut train --seeds``: which runs it starts, in which order and where. Training itself is made up here."""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coconut.commands import seeds
from coconut.commands.flags_of_runs import read_seeds
from coconut.commands.main import EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_DONE, EXIT_INTERRUPTED, main
from coconut.errors import CoconutError, DivergedError
from coconut.storage import make_folder
from coconut.training.config import RunConfig
from coconut.training.manifest import Manifest
from coconut.training.progress import Progress
from coconut.training.setup import prepare

TRAIN = ["train", "--gin_file", "gin_configs/runs/small_graphs.gin", "--gin_file", "gin_configs/methods/coconut.gin"]
TINY = [f"--gin.DataConfig.{split}=8" for split in ("train", "validation", "test")]


class Trainer:
    """Stands for `run_training`: writes run.json, and a checkpoint where the seed is neither stopped nor diverged."""

    def __init__(self) -> None:
        self.trained: list[tuple[int, str]] = []
        self.stops: int | None = None
        self.diverges: int | None = None
        self.options: dict[str, Any] = {}

    def __call__(self, config: RunConfig, workdir: Path, *, dataset: Any, **options: Any) -> Any:
        self.trained.append((config.seed, workdir.name))
        self.options = options
        make_folder(workdir)
        run = prepare(config, dataset)[0]
        run.save(workdir, changed={}, step=0)
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
    monkeypatch.setattr(seeds, "run_training", trainer)
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
        (["--dry_run"], "--dry_run: is about one run"),
        (["--distributed"], "--distributed: is about one run"),
        (["--coordinator", "x:1", "--num_processes", "2", "--process_id", "0"], "--coordinator: is about one run"),
    ],
)
def test_flags_of_one_run_are_refused(
    flags: list[str], named: str, trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TRAIN, *flags, "--seeds", "0,1", "--workdir", str(tmp_path)]) == EXIT_BAD_INPUT
    assert named in capsys.readouterr().err and trainer.trained == []


def test_seeds_are_read() -> None:
    assert read_seeds("0..4") == (0, 1, 2, 3, 4) and read_seeds("7") == (7,) and read_seeds("3,0..1,9") == (3, 0, 1, 9)
    for text in ("", "0,", "a", "-1", "0..", "0...2", "4..0", "1,0..2", "0, 1"):
        with pytest.raises(CoconutError, match="--seeds"):
            read_seeds(text)
