"""Imports run one way through the house: what a module may import is decided by its place in the order below."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the lowest to the highest. A module imports from its own layer and from lower ones only; a new top-level module
# of `coconut` gets its place here. `coconut` itself stands for coconut/__init__.py, which may gather the public names.
LAYERS = (
    "coconut.errors",
    "coconut.extensions",
    "coconut.storage_path",
    "coconut.mesh",
    "coconut.types",
    "coconut.storage",
    "coconut.provenance",
    "coconut.interruption",
    "coconut.hub",
    "coconut.tasks",
    "coconut.tokenizers",
    "coconut.datasets",
    "coconut.curriculum",
    "coconut.pages",
    "coconut.batching",
    "coconut.packing",
    "pallas_kernels",
    "coconut.sharding",
    "coconut.models",
    "coconut.latent",
    "coconut.model",
    "coconut.losses",
    "coconut.methods",
    "coconut.pipeline",
    "coconut.training",
    "coconut.evaluation",
    "coconut.analysis",
    "coconut.commands",
    "coconut.__main__",
    "coconut",
    "experiments",
)
PACKAGES = ("coconut", "pallas_kernels", "experiments")
STANDALONE = ("pallas_kernels",)  # Usable without the rest, so it imports nothing of ours.
GIN_LAYER = "coconut.commands"


def layer_of(module: str) -> str | None:
    """The layer that a dotted module name belongs to, if it has one."""
    parts = module.split(".")
    name = ".".join(parts[:2]) if parts[0] == "coconut" else parts[0]
    return name if name in LAYERS else None


def imported_modules(module: str, is_package: bool, source: str) -> Iterator[tuple[int, str]]:
    """The line and the dotted name of everything a module imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *filter(None, [base])])
            # `from coconut import models` imports coconut.models, so a bare package is resolved by its names.
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}" if base == "coconut" else base


def violations(sources: dict[str, str]) -> list[str]:
    """What is wrong with the imports of modules, given as their path (relative to the checkout) and source."""
    found = []
    for path, source in sources.items():
        parts = Path(path).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        own = layer_of(module)
        if own is None:
            found.append(f"{path}: {module} has no place in LAYERS")
            continue
        for line, imported in imported_modules(module, is_package, source):
            top = imported.split(".")[0]
            if top == "gin" and own != GIN_LAYER:
                found.append(f"{path}:{line}: gin stays in {GIN_LAYER}")
            if top not in PACKAGES:
                continue
            target = layer_of(imported)
            if target is None:
                # A name that coconut/__init__.py defines, or a module without a place, which is reported on its own.
                target = "coconut"
            if own in STANDALONE and target != own:
                found.append(f"{path}:{line}: {own} stands alone, but imports {imported}")
            elif LAYERS.index(target) > LAYERS.index(own):
                found.append(f"{path}:{line}: {own} is below {target}, but imports {imported}")
    return found


def test_the_house_keeps_its_order():
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    sources = {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}
    assert "coconut/types.py" in sources
    found = violations(sources)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("coconut/types.py", "import coconut.tasks", "coconut.types is below coconut.tasks"),
        ("coconut/tasks/prosqa.py", "from coconut.models.config import X", "coconut.tasks is below coconut.models"),
        ("coconut/models/decoder.py", "from coconut import latent", "coconut.models is below coconut.latent"),
        ("coconut/models/decoder.py", "from ..latent import rollout", "coconut.models is below coconut.latent"),
        ("coconut/models/__init__.py", "from ..latent import rollout", "coconut.models is below coconut.latent"),
        ("coconut/tokenizers.py", "from . import models", "coconut.tokenizers is below coconut.models"),
        (
            "coconut/losses.py",
            "def f():\n    from coconut.training import step",
            "losses.py:2: coconut.losses",
        ),
        ("coconut/losses.py", "from coconut import __version__", "coconut.losses is below coconut"),
        ("coconut/analysis/plots.py", "import coconut.commands.train", "coconut.analysis is below coconut.commands"),
        ("coconut/batching.py", "from pallas_kernels import attention", "coconut.batching is below pallas_kernels"),
        ("pallas_kernels/attention/api.py", "from coconut.types import Batch", "pallas_kernels stands alone"),
        ("pallas_kernels/attention/api.py", "import experiments", "pallas_kernels stands alone"),
        ("coconut/commands/main.py", "import experiments.benchmarks", "coconut.commands is below experiments"),
        ("experiments/benchmarks/plans.py", "import gin", "gin stays in coconut.commands"),
        ("coconut/models/config.py", "import gin", "gin stays in coconut.commands"),
        ("coconut/models/config.py", "from gin import config", "gin stays in coconut.commands"),
        ("coconut/utils.py", "", "coconut.utils has no place in LAYERS"),
        ("coconut/helpers/__init__.py", "", "coconut.helpers has no place in LAYERS"),
    ],
)
def test_a_broken_order_is_reported(path, source, message):
    reports = violations({path: source})
    assert len(reports) == 1
    assert message in reports[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("coconut/models/decoder.py", "from coconut.models.config import DecoderConfig\nfrom . import layers"),
        ("coconut/models/__init__.py", "from .config import DecoderConfig"),
        ("coconut/models/attention.py", "from pallas_kernels.attention import api"),
        ("pallas_kernels/attention/tpu.py", "from pallas_kernels.attention import reference"),
        ("coconut/__init__.py", "from coconut.analysis import plots"),
        ("coconut/commands/train.py", "import gin\nfrom coconut import training"),
        ("experiments/benchmarks/plans.py", "from coconut.commands import main"),
        ("coconut/tokenizers.py", "import tokenizers\nimport coconut_other"),
    ],
)
def test_what_the_order_allows_is_not_reported(path, source):
    assert violations({path: source}) == []
