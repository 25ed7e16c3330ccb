"""Where a number comes from: commit, machine, versions."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("coconut-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "libtpu")

# Variables by which a user changes the numbers or the speed of a run.
ENVIRONMENT = (
    *("GLIBC_TUNABLES", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64", "JAX_THREEFRY_PARTITIONABLE"),
    *("LIBTPU_INIT_ARGS", "OMP_NUM_THREADS", "XLA_FLAGS"),
)

COMMIT = "COCONUT_COMMIT"
"""The environment variable that names the commit of a copy without a checkout."""


def provenance() -> dict[str, Any]:
    """Commit, hardware, versions and what the environment sets, to stand beside every reported number."""
    device = jax.devices()[0]
    return {
        "commit": commit(),
        "hardware": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "platform": device.platform,
            "device": device.device_kind,
            "devices": jax.device_count(),
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def commit() -> str:
    """The commit of the checkout this runs from, with ``-dirty`` where it was changed; ``unknown`` outside of one.

    A copy without a checkout around it says of itself which commit it is, by the variable `COMMIT`.
    """
    if named := os.environ.get(COMMIT):
        return named
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
