"""What was compiled once is not compiled again: where programs are kept, for how long, and who can say otherwise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from coconut.commands import compiled_programs
from coconut.commands.compiled_programs import keep_compiled_programs
from coconut.training.clock import Clock, told

DIRECTORY = "JAX_COMPILATION_CACHE_DIR"


@pytest.mark.parametrize(
    "said", [{DIRECTORY: "/elsewhere"}, {DIRECTORY: ""}, {"JAX_ENABLE_COMPILATION_CACHE": "False"}]
)
def test_what_the_environment_says_stays(said: dict[str, str]) -> None:
    environment = dict(said)
    assert keep_compiled_programs(environment) is None and environment == said


def test_programs_are_kept_for_a_time_in_the_users_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    environment: dict[str, str] = {}
    folder = keep_compiled_programs(environment)
    assert folder is not None and folder.is_relative_to(tmp_path) and environment[DIRECTORY] == str(folder)
    assert not folder.exists()
    folder.mkdir(parents=True)
    for name, days in (("old", compiled_programs.KEPT_DAYS + 1), ("new", compiled_programs.KEPT_DAYS - 1)):
        (folder / name).touch()
        then = (folder / name).stat().st_mtime - 86400 * days
        os.utime(folder / name, (then, then))
    keep_compiled_programs({})
    assert [path.name for path in folder.iterdir()] == ["new"]
    # A folder that may not be looked into is no reason not to run.
    with monkeypatch.context() as patched:

        def closed(path: Path) -> bool:
            raise PermissionError(13, "Permission denied", str(path))

        patched.setattr(Path, "exists", closed)
        assert keep_compiled_programs({}) is None
    # A file stands where the folder should.
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "new"))
    environment.clear()
    assert keep_compiled_programs(environment) is None and not environment
    assert "are not kept" in caplog.text


GIN = """
RunConfig.method = 'coconut'
DataConfig.task = 'small_graphs'
DataConfig.train = 40
DataConfig.validation = 8
DataConfig.options = {'config': 'e8'}
DataConfig.tokenizer = 'symbols'
DecoderConfig.num_layers = 1
DecoderConfig.embed_dim = 16
DecoderConfig.num_heads = 2
DecoderConfig.max_positions = 48
CurriculumConfig.max_latent_stage = 1
CurriculumConfig.last_stage = 1
CurriculumConfig.epochs_per_stage = None
CurriculumConfig.steps_per_stage = 4
PipelineConfig.batch_size = 8
SamplingConfig.max_new_tokens = 4
"""


@pytest.mark.slow
def test_a_second_start_compiles_nothing_and_gives_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "run.gin").write_text("include 'gin_configs/base.gin'\n" + GIN)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    numbers, kept = [], []
    for name in ("cold", "warm"):
        command = [sys.executable, "-m", "coconut", "train", "--gin_file", str(tmp_path / "run.gin"), "--workdir", name]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "s by the clock: starting" in done.stdout
        # JAX warns of a program that it cannot read back, and compiles it again.
        assert "compilation cache" not in done.stderr
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        numbers.append([{key: line[key] for key in line if "second" not in key} for line in lines])
        kept.append({path.name for path in (tmp_path / "cache").rglob("*-cache")})
    assert numbers[0] and numbers[0] == numbers[1]
    assert kept[0] and kept[0] == kept[1]


def test_the_clock_counts_every_second_once() -> None:
    clock = Clock()
    with clock.running(), clock.doing("training"):
        with clock.doing("validating"):
            pass
        with clock.doing("compiling"):
            pass
    seconds = clock.seconds()
    assert list(seconds) == ["starting", "training", "validating", "compiling"]
    assert min(seconds.values()) >= 0
    assert told({"reading": 1.4, "training": 2000.0}) == "2,001 s by the clock: reading 1, training 2000"
