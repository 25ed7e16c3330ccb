"""A workdir from outside: found, and read without building the run, or importing what builds it."""

import json
import re
from pathlib import Path
from typing import Any

from coconut.errors import CoconutError
from coconut.storage import exists, explained, read_text
from coconut.storage_path import StoragePath
from coconut.training.manifest import MANIFEST, DamagedError, Manifest

RUN_FILE, CHECKPOINTS = "run.json", "checkpoints"
SWEEP_FILE = "sweep.json"
"""Of a run that is a cell of a sweep: the cell's number, and the value of each field that is swept."""


def find_workdirs(folder: StoragePath) -> list[StoragePath]:
    """The folders that hold a run, this one and those below it, in order.

    Hidden folders, links to folders and the checkpoints of a run are not looked into. A folder below that cannot be
    read is among what is returned: whoever reads its run is told why.

    Raises:
      CoconutError: there is no such folder, or it cannot be read.
    """
    with explained(folder):
        # So that seed_2 comes before seed_10.
        numbers = lambda path: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]
        entries = sorted(folder.iterdir(), key=numbers)
    here = any(path.name == RUN_FILE for path in entries)
    found = [folder] if here else []
    for path in entries:
        if path.name.startswith(".") or (here and path.name == CHECKPOINTS):
            continue
        try:
            with explained(path):
                is_folder = path.is_dir() and not (isinstance(path, Path) and path.is_symlink())
            found += find_workdirs(path) if is_folder else []
        except CoconutError:
            found.append(path)
    return found


def read_run_file(workdir: StoragePath) -> dict[str, Any]:
    """The content of ``run.json``, as it stands there; `coconut.training.run.Run.load` makes a run of it.

    Raises:
      CoconutError: there is none, or it is no JSON object.
    """
    path = workdir / RUN_FILE
    if not exists(path):
        raise CoconutError(f"{workdir} holds no run: {path} is missing")
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CoconutError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise CoconutError(f"{path}: must be an object, not {content!r:.80}")
    return content


def swept_values(workdir: StoragePath) -> dict[str, Any]:
    """The value of each field that the sweep of a run sweeps, by its gin name; none where it belongs to no sweep.

    Raises:
      CoconutError: the file that says so is damaged.
    """
    path = workdir / SWEEP_FILE
    if not exists(path):
        return {}
    try:
        values = json.loads(read_text(path))["values"]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise CoconutError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(values, dict):
        raise CoconutError(f"{path}: values = {values!r:.80}: must be an object")
    return values


def latest_manifest(workdir: StoragePath) -> Manifest | None:
    """The manifest of the latest checkpoint whose manifest is whole; None where there is no checkpoint.

    The files of the checkpoint are not read (`coconut.training.checkpoint.Checkpoints.verify` does).

    Raises:
      DamagedError: there are checkpoints, and no manifest is whole.
    """
    folder, damage = workdir / CHECKPOINTS, None
    if not exists(folder):
        return None
    with explained(folder):
        names = [path.name for path in folder.iterdir()]
    for step in sorted((int(name) for name in names if name.isdecimal()), reverse=True):
        # In an object store one without a manifest is still being written.
        if exists(folder / str(step) / MANIFEST):
            try:
                return Manifest.read(folder / str(step))
            except DamagedError as error:
                damage = damage or error
    if damage is not None:
        raise damage
    return None
