"""No module of ours reads data by a way that could run it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for package in ("coconut", "pallas_kernels") for path in (ROOT / package).rglob("*.py"))
MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml", "torch"}
CALLS = {"eval", "exec", "compile", "__import__"}
# What an export carries for whoever wants to run it; nothing of ours imports it.
CARRIED = ROOT / "coconut/models/huggingface/think.py"


def running_data(source: str) -> Iterator[str]:
    """What in a module could run what it reads."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from (name for name in names if name.partition(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in CALLS:
                yield node.func.id
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in ("allow_pickle", "trust_remote_code") and not off:
                    yield keyword.arg


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_could_run_what_it_reads(path: Path) -> None:
    found = running_data(path.read_text())
    assert not [what for what in found if path != CARRIED or what not in ("torch", "torch.nn.functional")]
    # PyTorch's own loader unpickles; safetensors' does not.
    assert path != CARRIED or "torch.load" not in path.read_text()


@pytest.mark.parametrize(
    "source",
    (
        "import pickle",
        "from torch.serialization import load",
        "eval(text)",
        "np.load(file, allow_pickle=True)",
        "f(trust_remote_code=given)",
    ),
)
def test_it_would_be_seen(source: str) -> None:
    assert list(running_data(source))
