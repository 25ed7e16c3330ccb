"""Workdirs on a disk or in Google Cloud Storage; the one module that reads and writes their files.

Orbax writes checkpoints itself, to the same paths. An object store differs from a disk in three ways that show here:
an object appears as a whole or not at all, it cannot be appended to, and there are no folders.
"""

import contextlib
import errno
import io
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from filelock import FileLock, Timeout
from jax.experimental import multihost_utils

from coconut.errors import CoconutError
from coconut.storage_path import SCHEME, StoragePath, is_remote

LOCK = ".lock"
"""The file of a workdir that the process which trains in it has locked."""

LOG = logging.getLogger(__name__)


def exists(path: StoragePath) -> bool:
    """Whether a file or folder is there.

    Raises:
      CoconutError: the object store cannot be asked.
    """
    with _explained(path):
        return path.exists()


def make_folder(path: StoragePath) -> None:
    """Makes a folder and those above it, where they are missing; in an object store they come with what they hold.

    Raises:
      CoconutError: it cannot be made, or ``pathlib`` has eaten a slash of ``gs://``.
    """
    if isinstance(path, Path) and path.parts[:1] == (SCHEME.rstrip("/"),):
        raise CoconutError(f"{path}: pathlib does not know {SCHEME}; make the path by coconut.storage_path.parse_path")
    if not is_remote(path):
        with _explained(path):
            path.mkdir(parents=True, exist_ok=True)


def read_text(path: StoragePath) -> str:
    """The content of a file.

    Raises:
      CoconutError: there is none, or it cannot be read.
    """
    with _explained(path):
        # As bytes: epath's text mode leaves the encoding to the machine.
        return path.read_bytes().decode("utf-8")


def write_atomically(path: StoragePath, text: str) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part.

    Raises:
      CoconutError: it cannot be written.
    """
    content = text.encode("utf-8")
    with _explained(path):
        if is_remote(path):
            path.write_bytes(content)
        else:
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            temporary.write_bytes(content)
            temporary.replace(path)


@contextlib.contextmanager
def hold(folder: StoragePath) -> Iterator[None]:
    """Keeps a folder to this run: a second one would write its checkpoints and metrics among those of the first.

    The system lets go of it when the process ends, however it ends. Of several processes of one run the first holds it.
    An object store has no locks, and is not held. Some disks of clusters have none either: that is a warning, since one
    must be able to train there.

    Raises:
      CoconutError: another process holds it, or its file `LOCK` cannot be written.
    """
    with contextlib.ExitStack() as holding:
        held_here = jax.process_index() == 0 and not is_remote(folder)
        refusal = _lock(Path(folder), holding) if held_here else None
        refused = refusal is not None
        if jax.process_count() > 1:
            # All of them stop, instead of waiting for the first.
            refused = bool(multihost_utils.broadcast_one_to_all(np.asarray(refused)))
        if refused:
            raise CoconutError(refusal or f"{folder}: the first process could not take this workdir")
        yield


def _lock(folder: Path, holding: contextlib.ExitStack) -> str | None:
    """Locks the folder for as long as ``holding``; why not, where it cannot."""
    # Not the library's stand-in where there are no locks, a file that a killed process would leave behind.
    lock = FileLock(folder / LOCK, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return f"{folder}: another process trains in this workdir; stop it, or take another workdir"
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP):
            return f"{folder / LOCK}: {error.strerror or error}"
        LOG.warning("%s is on a disk without locks: nothing keeps a second process out of it", folder)
    else:
        holding.callback(lock.release)
    return None


class LineLog:
    """A text file that grows by lines.

    On a disk every line is there as soon as it is written. An object has to be rewritten as a whole, and a store takes
    only about one write of it a second, so there lines are gathered and the object is rewritten every
    ``rewrite_seconds``, at `flush` and at `close`. A process that is killed loses the lines since then: flush before
    saving a checkpoint, and nothing is missing that a resumed run would not write again.

    Args:
      path: the file.
      lines: what it begins with, in place of what it holds.
      rewrite_seconds: shortest time between two rewritings of an object that nobody asked for.

    Raises:
      CoconutError: it cannot be written.
    """

    def __init__(self, path: StoragePath, lines: Sequence[str] = (), *, rewrite_seconds: float = 30.0):
        self._path, self._rewrite_seconds = path, rewrite_seconds
        text = "".join(line + "\n" for line in lines)
        write_atomically(path, text)
        self._file: io.TextIOBase | None = None
        if not is_remote(path):
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - `close` closes it.
        self._text, self._written, self._clock = [text], 1, time.monotonic()

    def write(self, line: str) -> None:
        """Adds one line."""
        if self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()
            return
        self._text.append(line + "\n")
        if time.monotonic() - self._clock >= self._rewrite_seconds:
            self.flush()

    def flush(self) -> None:
        """Returns when every line so far is in the file."""
        if self._file is None and self._written < len(self._text):
            write_atomically(self._path, "".join(self._text))
            self._written, self._clock = len(self._text), time.monotonic()

    def close(self) -> None:
        """Flushes, and closes the file."""
        self.flush()
        if self._file is not None:
            self._file.close()


def storage_errors(path: StoragePath) -> tuple[type[Exception], ...]:
    """What reading or writing ``path`` may raise that is no fault of the program."""
    if not is_remote(path):
        return (OSError, UnicodeDecodeError)
    # Of the extra `gcs`, which `parse_path` has asked for.
    from gcsfs.retry import HttpError
    from google.auth.exceptions import GoogleAuthError

    return (OSError, ValueError, HttpError, GoogleAuthError)


@contextlib.contextmanager
def _explained(path: StoragePath) -> Iterator[None]:
    try:
        yield
    except storage_errors(path) as error:
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise CoconutError(f"{path}: {why}") from error
