"""What a wheel adds to an environment, and that it works among a user's own folders of our names."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile

import pytest

from coconut.analysis.page import SCRIPTS

ROOT = Path(__file__).parents[2]
GIN_FILES = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "gin_configs").rglob("*.gin"))]

# Resolves each run that is given as a list of gin files, then says which folders of the user's it has imported.
RESOLVE = """
import json, sys
import coconut
from coconut.commands.configuration import resolve_run
print(coconut.__file__)
for files in json.loads(sys.argv[1]):
    config = resolve_run(files)
    print(config.method, config.optimizer.learning_rate)
print(*sorted({"experiments", "gin_configs"} & sys.modules.keys()))
"""
SHIPPED = ["gin_configs/runs/small_graphs.gin", "gin_configs/methods/coconut.gin"]


def pip(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments, "--no-deps", "--disable-pip-version-check", "--quiet"],
        env=os.environ | {"PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout; hatchling, which makes it, is in the environment: nothing is downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", str(ROOT), "--no-build-isolation", "--wheel-dir", str(folder))
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel was installed."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", str(wheel), "--target", str(folder))
    return folder


@pytest.fixture
def users_folder(tmp_path: Path) -> Path:
    """A folder of a user who has packages and gin files of their own, under the names of our folders."""
    methods = tmp_path / "gin_configs" / "methods"
    methods.mkdir(parents=True)
    (tmp_path / "experiments").mkdir()
    for name in ("experiments", "gin_configs"):
        (tmp_path / name / "__init__.py").write_text("raise ImportError('this is not the package that was meant')\n")
    (methods / "mine.gin").write_text(
        "include 'gin_configs/runs/small_graphs.gin'\ninclude 'gin_configs/methods/cot.gin'\n"
        "OptimizerConfig.learning_rate = 0.125\n"
    )
    # One of ours has the same path.
    (methods / "pause.gin").write_text("RunConfig.method = 'no_cot'\n")
    return tmp_path


def run_python(arguments: Sequence[str], folder: Path, installed: Path) -> subprocess.CompletedProcess[str]:
    """Python in a folder that it looks into first, then into what was installed."""
    environment = os.environ | {"PYTHONPATH": f".{os.pathsep}{installed}"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_wheel_adds_two_import_names_and_carries_the_data(wheel: Path) -> None:
    names = ZipFile(wheel).namelist()
    described = f"coconut_jax-{version('coconut-jax')}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"coconut", "pallas_kernels", described}
    assert len(GIN_FILES) > 20
    assert sorted(name for name in names if name.endswith(".gin")) == [f"coconut/{name}" for name in GIN_FILES]
    assert {f"coconut/analysis/page/{name}" for name in ("index.html", "page.css", *SCRIPTS)} <= set(names)
    assert {"coconut/py.typed", "pallas_kernels/py.typed"} <= set(names)


def test_the_command_starts_in_a_users_folder(installed: Path, users_folder: Path) -> None:
    for start in (["-m", "coconut"], ["-m", "coconut.commands.main"], [str(installed / "bin" / "coconut")]):
        done = run_python([*start, "--help"], users_folder, installed)
        assert done.returncode == 0 and done.stdout.startswith("usage: coconut"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("where", ["installed", "checkout"])
def test_a_users_folders_of_our_names_are_the_users(where: str, installed: Path, users_folder: Path) -> None:
    home = installed if where == "installed" else ROOT
    mine = ["gin_configs/methods/mine.gin"]
    runs = [SHIPPED, mine, [*mine, "gin_configs/methods/pause.gin"]]
    done = run_python(["-c", RESOLVE, json.dumps(runs)], users_folder, home)
    expected = [str(home / "coconut" / "__init__.py"), "coconut 0.003", "cot 0.125", "no_cot 0.125", ""]
    assert done.stdout.splitlines() == expected, done.stderr
