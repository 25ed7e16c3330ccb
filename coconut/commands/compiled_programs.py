"""Programs that were compiled once are kept for the next start of a command.

JAX does the keeping; this says where and for how long. What the environment says of it stays:
``JAX_COMPILATION_CACHE_DIR`` names another folder, ``JAX_ENABLE_COMPILATION_CACHE=false`` keeps nothing.
"""

import hashlib
import logging
import os
import platform
import time
from collections.abc import MutableMapping
from pathlib import Path

from platformdirs import user_cache_path

LOG = logging.getLogger(__name__)

KEPT_DAYS = 30
"""A program is compiled anew after this time: JAX deletes none by itself, as long as its folder has no lock."""
LEAST_SECONDS = "0.1"
"""What compiles faster than this is not kept. JAX's own bound of a second leaves out most of what a small model is."""


def keep_compiled_programs(environment: MutableMapping[str, str] = os.environ) -> Path | None:
    """Tells JAX, which must not be imported yet, to keep compiled programs in the user's cache folder.

    Args:
      environment: of this process, to be changed.

    Returns:
      The folder; None where the environment names another or none, or where it cannot be written, which is said.
    """
    wanted = environment.get("JAX_ENABLE_COMPILATION_CACHE", "true").lower() not in (
        "false",
        "0",
        "off",
        "no",
        "n",
        "f",
    )
    if not wanted or "JAX_COMPILATION_CACHE_DIR" in environment:
        return None
    folder = users_folder()
    try:
        # JAX makes the folder once there is something to keep.
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise PermissionError(f"{there} cannot be written")
        if there == folder:
            _delete_old(folder)
    except OSError as error:  # Somebody else's home, or a disk that is away: no reason not to run.
        LOG.warning("compiled programs are not kept: %s; see JAX_COMPILATION_CACHE_DIR", error)
        return None
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", LEAST_SECONDS)
    return folder


def users_folder() -> Path:
    """Where programs for this processor are kept if nobody says otherwise."""
    return user_cache_path("coconut-jax") / "programs" / _processor_features()


def _delete_old(folder: Path) -> None:
    oldest = time.time() - KEPT_DAYS * 86400
    for path in folder.iterdir():
        try:
            if path.is_file() and path.stat().st_mtime < oldest:
                path.unlink()
        except FileNotFoundError:  # Another process deletes them, too.
            continue


def _processor_features() -> str:
    """A name for what this processor can run: a home folder may be shared with machines that can run less."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    digest = hashlib.sha256(features.encode()).hexdigest()[:12]
    return f"{platform.machine()}-{digest}"
