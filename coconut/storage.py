"""Workdirs on a disk or in Google Cloud Storage; the one module that reads and writes their files.

Orbax writes checkpoints itself, to the same paths. An object store differs from a disk in three ways that show here:
an object appears as a whole or not at all, it cannot be appended to, and there are no folders.
"""

import contextlib
import errno
import fcntl
import io
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from filelock import FileLock, Timeout
from jax.experimental import multihost_utils

from coconut.errors import CoconutError
from coconut.storage_path import SCHEME, StoragePath, as_path, is_remote

LOCK = ".lock"
"""The file of a workdir that the process which trains in it has locked."""

LOG = logging.getLogger(__name__)


def exists(path: StoragePath) -> bool:
    """Whether a file or folder is there.

    Raises:
      CoconutError: the object store cannot be asked.
    """
    with explained(path):
        return path.exists()


def make_folder(path: StoragePath) -> None:
    """Makes a folder and those above it, where they are missing; in an object store they come with what they hold.

    Raises:
      CoconutError: it cannot be made, or ``pathlib`` has eaten a slash of ``gs://``.
    """
    if isinstance(path, Path) and path.parts[:1] == (SCHEME.rstrip("/"),):
        raise CoconutError(f"{path}: pathlib does not know {SCHEME}; make the path by coconut.storage_path.parse_path")
    if not is_remote(path):
        with explained(path):
            path.mkdir(parents=True, exist_ok=True)


def read_text(path: StoragePath) -> str:
    """The content of a file.

    Raises:
      CoconutError: there is none, or it cannot be read.
    """
    with explained(path):
        # As bytes: epath's text mode leaves the encoding to the machine.
        return path.read_bytes().decode("utf-8")


def write_atomically(path: StoragePath | str, text: str) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part.

    Raises:
      CoconutError: it cannot be written.
    """
    path, content = as_path(path), text.encode("utf-8")
    with explained(path):
        if is_remote(path):
            path.write_bytes(content)
        else:
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync(path.parent)


def files_below(folder: StoragePath) -> list[str]:
    """The files in a folder and in those below it, as paths from it with ``/``, in order.

    Raises:
      CoconutError: it cannot be read.
    """
    found: list[str] = []
    with explained(folder):
        for path in folder.iterdir():
            found += [f"{path.name}/{name}" for name in files_below(path)] if path.is_dir() else [path.name]
    return sorted(found)


def remove(path: StoragePath) -> None:
    """Removes a file, or a folder with all that it holds; nothing where it is gone already.

    Raises:
      CoconutError: it cannot be removed.
    """
    with explained(path), contextlib.suppress(FileNotFoundError):
        if not path.is_dir():
            path.unlink()
        elif isinstance(path, Path):
            shutil.rmtree(path)
        else:
            path.rmtree()


def move(path: StoragePath, target: StoragePath) -> None:
    """Gives a file or folder another name; on a disk at once, and for good when this returns.

    Raises:
      CoconutError: it cannot be moved.
    """
    make_folder(target.parent)
    with explained(path):
        path.rename(target)
        if not is_remote(path):
            _sync(target.parent)
            _sync(path.parent)


def sync_below(folder: StoragePath) -> None:
    """Returns when the disk itself has what was written to the files of a folder, and to those below it.

    An object store has an object as soon as it is written.

    Raises:
      CoconutError: the disk refuses: it may be full only now.
    """
    if is_remote(folder):
        return
    with explained(folder):
        for name in files_below(folder):
            _sync(folder / name)
        for path in {(folder / name).parent for name in files_below(folder)} | {folder}:
            _sync(path)


def _sync(path: StoragePath) -> None:
    """Flushes a file or folder of a disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def by_first_process(action: Callable[[], None]) -> None:
    """Does something in the first of several processes, while the others wait for its end.

    It begins when all processes have come here: what they have looked at to decide on it must not change before.

    Raises:
      CoconutError: it failed there; all processes raise.
    """
    failure: CoconutError | None = None
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("by_first_process")
    if jax.process_index() == 0:
        try:
            action()
        except CoconutError as error:
            failure = error
    if jax.process_count() > 1:
        failed = bool(multihost_utils.broadcast_one_to_all(np.asarray(failure is not None)))
        if failed and failure is None:
            failure = CoconutError("the first process failed; its own message says why")
    if failure is not None:
        raise failure


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
        # Whoever only asks whether it is held (`is_held`) is in the way for an instant.
        lock.acquire(timeout=0.2, poll_interval=0.02)
    except Timeout:
        return f"{folder}: another process trains in this workdir; stop it, or take another workdir"
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP):
            return f"{folder / LOCK}: {error.strerror or error}"
        LOG.warning("%s is on a disk without locks: nothing keeps a second process out of it", folder)
    else:
        holding.callback(lock.release)
    return None


def is_held(folder: StoragePath) -> bool:
    """Whether some process holds a folder (`hold`); never of an object store or a disk without locks, which cannot say.

    Raises:
      CoconutError: its file `LOCK` cannot be read.
    """
    lock = folder / LOCK
    if is_remote(folder) or not exists(lock):
        return False
    with explained(lock), open(lock, "rb") as file:
        try:
            # Shared, which needs no right to write; it ends with the file.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP):
                raise
    return False


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
        """Adds one line.

        Raises:
          CoconutError: it cannot be written, or the file is no longer where it was: its folder was moved or deleted.
        """
        if self._file is not None:
            with explained(self._path):
                self._check_place()
                self._file.write(line + "\n")
                self._file.flush()
            return
        self._text.append(line + "\n")
        if time.monotonic() - self._clock >= self._rewrite_seconds:
            self.flush()

    def flush(self) -> None:
        """Returns when every line so far is in the file, and the file on the disk.

        Raises:
          CoconutError: it cannot be written.
        """
        if self._file is not None:
            with explained(self._path):
                os.fsync(self._file.fileno())
        elif self._written < len(self._text):
            write_atomically(self._path, "".join(self._text))
            self._written, self._clock = len(self._text), time.monotonic()

    def close(self) -> None:
        """Flushes, and closes the file."""
        with explained(self._path), contextlib.ExitStack() as closing:
            if self._file is not None:
                closing.callback(self._file.close)
            self.flush()

    def _check_place(self) -> None:
        """An open file can be written to when nobody will ever find it again."""
        assert self._file is not None
        try:
            there = os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            there = False
        if not there:
            raise CoconutError(f"{self._path} was moved, deleted or replaced while it was being written")


def storage_errors(path: StoragePath) -> tuple[type[Exception], ...]:
    """What reading or writing ``path`` may raise that is no fault of the program."""
    if not is_remote(path):
        return (OSError, UnicodeDecodeError)
    # Of the extra `gcs`, which `parse_path` has asked for.
    from gcsfs.retry import HttpError
    from google.auth.exceptions import GoogleAuthError

    return (OSError, ValueError, HttpError, GoogleAuthError)


@contextlib.contextmanager
def explained(path: StoragePath) -> Iterator[None]:
    """Makes of what reading or writing ``path`` raises a `CoconutError` that names it."""
    try:
        yield
    except CoconutError:
        raise  # It says what it is already.
    except storage_errors(path) as error:
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise CoconutError(f"{path}: {why}") from error
