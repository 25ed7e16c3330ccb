"""What comes with the package: its version and its gin files. Nothing heavy is imported: the command line asks."""

import importlib.metadata
import re
from pathlib import Path

SHIPPED = "gin_configs"
"""The folder of the gin files that come with the package: within it in a wheel, beside it in a checkout."""

PACKAGE = Path(__file__).parents[1]
SHIPPED_IN = PACKAGE if (PACKAGE / SHIPPED).is_dir() else PACKAGE.parent


def version() -> str:
    """Of the package, as it was installed."""
    try:
        return importlib.metadata.version("coconut-jax")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def shipped_files() -> list[str]:
    """All of them, as one names them: ``gin_configs/base.gin``."""
    return sorted(path.relative_to(SHIPPED_IN).as_posix() for path in (SHIPPED_IN / SHIPPED).rglob("*.gin"))


def bound_fields(field: str) -> list[str]:
    """The fields of that name which some of them bind, as gin writes them: ``RunConfig.seed``, those of a run first."""
    texts = [(SHIPPED_IN / path).read_text(encoding="utf-8") for path in shipped_files()]
    found = {name for text in texts for name in re.findall(rf"^(\w+\.{re.escape(field)})\s*=", text, re.MULTILINE)}
    return sorted(found, key=lambda name: (not name.startswith("RunConfig."), name))
