"""What a text names: a path on a disk or in Google Cloud Storage.

The command line asks, so nothing heavy is imported.
"""

import importlib.util
from pathlib import Path

from etils import epath

from coconut.errors import CoconutError

StoragePath = Path | epath.Path
"""A `pathlib.Path` on a disk, an `etils.epath.Path` in an object store; `parse_path` makes either."""

SCHEME = "gs://"


def parse_path(text: str) -> StoragePath:
    """The path that ``text`` names, on a disk or ``gs://bucket/folder``.

    Raises:
      CoconutError: a scheme other than ``gs``, no bucket, or no package to reach it with.
    """
    if "://" not in text:
        return Path(text)
    if not text.startswith(SCHEME) or not text.removeprefix(SCHEME).strip("/"):
        raise CoconutError(f"{text!r}: a path is one of this machine, or {SCHEME}BUCKET/FOLDER")
    if importlib.util.find_spec("gcsfs") is None:
        raise CoconutError(f"{text}: reaching {SCHEME} needs `pip install coconut-jax[gcs]`")
    return epath.Path(text)


def as_path(path: StoragePath | str) -> StoragePath:
    """A path that may have been given as text.

    Raises:
      CoconutError: as `parse_path`.
    """
    return parse_path(path) if isinstance(path, str) else path


def is_remote(path: StoragePath) -> bool:
    """Whether the path is in an object store."""
    return str(path).startswith(SCHEME)
