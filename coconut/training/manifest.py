"""The manifest of a checkpoint: where the run stood, and what each file beside it must hold, to the bit.

It is written last: a checkpoint counts from then on.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from coconut.errors import CoconutError
from coconut.storage import explained, files_below, write_atomically
from coconut.storage_path import StoragePath
from coconut.training.progress import Progress

MANIFEST = "manifest.json"
DIGEST_BYTES = hashlib.sha256().digest_size


class DamagedError(CoconutError):
    """A checkpoint that is not what was saved: a file of it is missing, foreign or changed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
      progress: where the run stands.
      validation: metrics of the validation split, if it was measured.
      proven: whether the model was seen to give finite numbers, by a validation or a loss.
      parameter_norm: Euclidean norm of all parameters.
      run: what identifies the run (`coconut.training.run.Run.identity`).
      files: path below the checkpoint's folder -> size in bytes and SHA-256, in hexadecimal digits.
    """

    progress: Progress
    validation: Mapping[str, float]
    proven: bool
    parameter_norm: float
    run: Mapping[str, Any]
    files: Mapping[str, tuple[int, str]]

    @property
    def rank(self) -> tuple[int, float, int]:
        """Orders checkpoints: the best is the greatest. A later stage is better, since stage 0 reasons in language."""
        return self.progress.stage, self.validation.get("accuracy", -1.0), self.progress.step

    def write(self, folder: StoragePath) -> None:
        """Writes it into the folder of its checkpoint."""
        write_atomically(folder / MANIFEST, _render(_content(self)))

    @classmethod
    def read(cls, folder: StoragePath) -> "Manifest":
        """The manifest of a checkpoint.

        Raises:
          DamagedError: there is none, or it is not as it was written.
        """
        path = folder / MANIFEST
        text = _read(path)
        try:
            content = json.loads(text)["content"]
            if text.decode() != _render(content):
                raise DamagedError(f"{path}: its own SHA-256 is another one")
            files = {name: (size, digest) for name, (size, digest) in content["files"].items()}
            own = {name: content[name] for name in ("validation", "proven", "parameter_norm", "run")}
            return cls(progress=Progress.from_json(content["progress"], str(path)), files=files, **own)
        except CoconutError as error:
            raise DamagedError(str(error)) from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DamagedError(f"{path}: no manifest of a checkpoint ({type(error).__name__}: {error})") from error

    def verify(self, folder: StoragePath) -> None:
        """Compares every file of the checkpoint with what it was; several processes share the work, and agree.

        Raises:
          DamagedError: naming the first file that is missing, foreign or changed.
        """
        found = [name for name in files_below(folder) if name != MANIFEST]
        if missing := sorted(self.files.keys() - set(found)):
            raise DamagedError(f"{folder / missing[0]} is missing")
        if foreign := sorted(set(found) - self.files.keys()):
            raise DamagedError(f"{folder / foreign[0]} does not belong to the checkpoint")
        for name, now in digests(folder, sorted(found)).items():
            size, digest = self.files[name]
            if now[0] != size:
                raise DamagedError(f"{folder / name}: {now[0]:,} bytes, and {size:,} when it was written")
            if now[1] != digest:
                raise DamagedError(f"{folder / name}: its SHA-256 is another one than when it was written")


def digests(folder: StoragePath, names: list[str]) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of files below a folder, which several processes share among them.

    Raises:
      CoconutError: a file cannot be read.
    """
    own = names[jax.process_index() :: jax.process_count()]
    with ThreadPoolExecutor() as pool:
        # Hashing leaves Python to the other threads.
        made = list(pool.map(lambda name: _digest(folder / name), own))
    if jax.process_count() > 1:
        made = _gathered(made, len(names))
    return dict(zip(names, made, strict=True))


def _digest(path: StoragePath) -> tuple[int, str]:
    with _readable(path), path.open("rb") as file:
        readable: Any = file
        digest = hashlib.file_digest(readable, "sha256")
        return file.tell(), digest.hexdigest()


def _read(path: StoragePath) -> bytes:
    with _readable(path):
        return path.read_bytes()


@contextlib.contextmanager
def _readable(path: StoragePath) -> Iterator[None]:
    """A file that is gone, or whose disk cannot read it, is damage; a store that does not answer is none."""
    with explained(path):
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EIO):
                raise
            raise DamagedError(f"{path}: {error.strerror}") from error


def _gathered(own: list[tuple[int, str]], count: int) -> list[tuple[int, str]]:
    """All files' digests in their order, of each process's share of them."""
    each = -(-count // jax.process_count())
    sizes, values = np.zeros((each, 2), np.uint32), np.zeros((each, DIGEST_BYTES), np.uint8)
    for row, (size, digest) in enumerate(own):
        # JAX would make 32 bits of 64.
        sizes[row] = divmod(size, 2**32)
        values[row] = np.frombuffer(bytes.fromhex(digest), np.uint8)
    sizes, values = (np.asarray(multihost_utils.process_allgather(x)).swapaxes(0, 1) for x in (sizes, values))
    rows = zip(sizes.reshape(-1, 2).tolist(), values.reshape(-1, DIGEST_BYTES), strict=True)
    return [(high * 2**32 + low, value.tobytes().hex()) for (high, low), value in rows][:count]


def _content(manifest: Manifest) -> Any:
    return json.loads(json.dumps(dataclasses.asdict(manifest)))


def _render(content: Any) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({"sha256": digest, "content": content}, indent=1) + "\n"
