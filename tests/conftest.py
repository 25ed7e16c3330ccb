"""What every test shares: one CPU device, checked shapes, the same random examples every time."""

import os
import shutil
import tempfile
from pathlib import Path

# Before anything imports JAX, which reads it once. Tests that need several devices start their own process.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Commands that tests start in processes of their own keep compiled programs for each other, not in the user's folder.
# Matplotlib's list of fonts stays where it is: it takes seconds to make.
os.environ.setdefault("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib"))
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="coconut_tests_")

import jax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# Checks the shapes and types of every call; it must stand before the packages it covers are first imported. The
# commands stay out: they declare no shapes, and an integer may stand where they say float.
LIBRARY = sorted({path.stem for path in (Path(__file__).parents[1] / "coconut").iterdir()} - {"commands"})
install_import_hook([*(f"coconut.{name}" for name in LIBRARY), "pallas_kernels"], "beartype.beartype")

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


def pytest_unconfigure(config):
    """Removes the programs that the tests' commands kept."""
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    """Leaves out what takes long unless -m names it, and skips what needs a device that is not there.

    An expression in pyproject.toml would be replaced by the first -m of the command line, and let all of it in.
    """
    left_out = [item for item in items for mark in ("fuzz", "heavy")
                if item.get_closest_marker(mark) and mark not in config.option.markexpr]  # fmt: skip
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    for item in items:
        for device in ("gpu", "tpu"):
            if item.get_closest_marker(device) and jax.default_backend() != device:
                item.add_marker(pytest.mark.skip(reason=f"needs a {device.upper()}; see CONTRIBUTING.md"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data beside the checkout; tests that read it are skipped where it is missing."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"the public data files are not at {path}")
    return path
