"""The safetensors files of a checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from coconut.models.huggingface.configuration import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# safetensors' dtypes -> those a decoder may have.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file, of which only the header has been read.

    Attributes:
      path: the file.
      name: its name there.
      shape: its shape.
      dtype: its dtype in safetensors' letters, such as ``BF16``.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self, columns: slice = slice(None), rows: slice = slice(None)) -> np.ndarray:
        """Reads some columns, counted along the last axis, or some rows of a matrix.

        The file is mapped for as long as this takes: what was read is in memory once, and the rest not at all.
        """
        with safe_open(self.path, framework="numpy") as file:
            stored = file.get_slice(self.name)
            return stored[columns] if len(self.shape) == 1 else stored[rows, columns]


def stored_tensors(folder: Path, problems: list[str]) -> list[Stored]:
    """The tensors in a folder's files, file after file; what is wrong with the files is added to ``problems``."""
    tensors = []
    for path, expected in _files(folder, problems).items():
        before = len(problems)
        own = read_header(path, problems)
        tensors += own
        names = {tensor.name for tensor in own}
        if expected is not None and expected != names and len(problems) == before:
            wrong = ", ".join(sorted(expected ^ names))
            problems.append(f"{INDEX} and {path.name} disagree about which tensors are there: {wrong}")
    return tensors


def read_header(path: Path, problems: list[str]) -> list[Stored]:
    """The tensors in a file, none where it is damaged, which is added to ``problems``."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
            return [
                Stored(path, name, tuple(stored.get_shape()), str(stored.get_dtype()))
                for name, stored in slices.items()
            ]
    except (SafetensorError, OSError) as error:
        # An interrupted download is cut off: the header promises more bytes than there are.
        size = path.stat().st_size if path.is_file() else 0
        problems.append(f"{path.name} ({size:,} bytes) is damaged or only half downloaded: {error}")
        return []


def _files(folder: Path, problems: list[str]) -> dict[Path, set[str] | None]:
    """The files that hold the weights, and where an index says so the names each holds."""
    if (folder / WEIGHTS).exists():
        return {folder / WEIGHTS: None}
    if not (folder / INDEX).exists():
        problems.append(_no_weights(folder))
        return {}
    weight_map: Any = read_json(folder / INDEX, problems).get("weight_map", {})
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        problems.append(f"{INDEX}: weight_map must give the file of each tensor")
        return {}
    names: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        names.setdefault(file, set()).add(name)
    # An index is downloaded as well: it must not lead out of its folder.
    outside = sorted(file for file in names if file != Path(file).name or file in ("", ".", ".."))
    missing = sorted(file for file in names if file not in outside and not _is_file(folder / file))
    problems += [f"{INDEX} names {file!r:.80}, which is no file of this folder" for file in outside]
    problems += [f"{file:.80} is missing, which {INDEX} names" for file in missing]
    return {folder / file: own for file, own in sorted(names.items()) if file not in (*outside, *missing)}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # No file can have a name this long.
        return False


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    message = f"there is neither {WEIGHTS} nor {INDEX}"
    if not pickles:
        return message
    return (
        f"{message}, only {', '.join(pickles)}: pickles can run code and are never read. Convert them where you trust "
        "them: load the model with `transformers` and write it with "
        "`model.save_pretrained(folder, safe_serialization=True)`, or write its state dict with "
        "`safetensors.torch.save_file`"
    )


def equal(first: Stored, second: Stored, rows: int = 4096) -> bool:
    """Whether two stored matrices hold the same numbers, compared some rows at a time."""
    if first.shape != second.shape:
        return False
    length = first.shape[0]
    parts = [slice(start, min(start + rows, length)) for start in range(0, length, rows)]
    return all(np.array_equal(first.read(rows=part), second.read(rows=part)) for part in parts)


def widest_dtype(tensors: list[Stored]) -> str:
    """The dtype that holds the numbers of all tensors, such as ``bfloat16`` where they are all BF16."""
    widest = jnp.dtype(DTYPES[tensors[0].dtype])
    for dtype in {stored.dtype for stored in tensors}:
        widest = jnp.promote_types(widest, DTYPES[dtype])
    return widest.name
