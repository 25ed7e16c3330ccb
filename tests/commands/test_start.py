"""Flags are answered at once: before they are right, nothing that takes seconds to import is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from coconut.commands.flags import parse_arguments
from coconut.commands.hints import hint
from coconut.commands.main import COMMANDS, EXIT_BAD_INPUT, EXIT_DONE
from coconut.commands.shipped import version

ROOT = Path(__file__).parents[2]

# Runs the console command and says which packages that take long are there at its end.
RUN = """
import sys
from coconut.commands.main import run
try:
    run()
finally:
    print("imported:", *sorted({"jax", "flax", "orbax", "matplotlib", "numpy", "rich", "gin"} & sys.modules.keys()))
"""
TRAIN = ["train", "--gin_file", "gin_configs/runs/small_graphs.gin"]
PLAN = ["plan", "--gin_file", "gin_configs/runs/small_graphs.gin"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], EXIT_DONE, "usage: coconut"),
        (["train", "--help"], EXIT_DONE, "usage: coconut train"),
        (["data", "prepare", "--help"], EXIT_DONE, "usage: coconut data prepare"),
        (["plan", "--help"], EXIT_DONE, "'here' for the devices at hand"),
        ([], EXIT_BAD_INPUT, "required: COMMAND"),
        (["trian"], EXIT_BAD_INPUT, "'trian'"),
        ([*TRAIN, "--workdri", "x"], EXIT_BAD_INPUT, "unrecognized arguments: --workdri x; did you mean --workdir?"),
        ([*TRAIN, "--seed", "3"], EXIT_BAD_INPUT, "did you mean --gin.RunConfig.seed=VALUE or --gin.DataConfig.seed"),
        (["--version"], EXIT_DONE, f"coconut {version()}"),
        (TRAIN, EXIT_BAD_INPUT, "coconut train: --workdir is missing"),
        ([*TRAIN, "--workdir", "s3://here"], EXIT_BAD_INPUT, "'s3://here': a path is one of this machine"),
        ([*TRAIN, "--workdir", "here", "--mesh", "rows=2"], EXIT_BAD_INPUT, "unknown axis 'rows', known are data"),
        ([*TRAIN, "--workdir", "here", "--process_id", "0"], EXIT_BAD_INPUT, "give all three"),
        ([*TRAIN, "--dry_run", "--from_step", "3"], EXIT_BAD_INPUT, "--from_step 3: --dry_run goes on with no run"),
        ([*TRAIN, "--dry_run", "--allow", "optimizer.b1"], EXIT_BAD_INPUT, "--allow optimizer.b1: --dry_run goes on"),
        ([*PLAN, "--topology", "v9:2x2"], EXIT_BAD_INPUT, "topology 'v9:2x2' is unknown; known are v4:2x2x1"),
        ([*PLAN, "--topology", "here", "--answers", "-1"], EXIT_BAD_INPUT, "--answers -1: must be at least 0"),
        (
            ["data", "generate", "--count", "1", "--output", "x.json", "--option", "hops"],
            EXIT_BAD_INPUT,
            "argument --option: 'hops': must be NAME=VALUE",
        ),
    ],
)
def test_help_and_bad_flags_import_nothing_heavy(arguments: list[str], code: int, words: str) -> None:
    # The terminal's width decides where a usage is broken.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == code
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == "imported:"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--RunConfig.seed=3", "; did you mean --gin.RunConfig.seed=VALUE?"),
        ("--gin.RunConfig.seed", "; did you mean --gin.RunConfig.seed=VALUE?"),
        ("--learning_rate", "; did you mean --gin.OptimizerConfig.learning_rate=VALUE?"),
        ("--nothing_like_it", ""),
    ],
)
def test_what_was_meant_by_an_unknown_flag(word: str, expected: str) -> None:
    assert hint(word, ["gin_binding", "workdir"]) == expected
    assert hint(word, ["workdir"]) == ""


def test_every_command_has_its_flags_and_its_function(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    listed = capsys.readouterr().out.partition("positional arguments:")[2].partition("options:")[0]
    assert set(re.findall(r"^    ([\w-]+)", listed, re.MULTILINE)) == set(COMMANDS)
