"""``coconut checkpoint``: what a workdir holds, whether it is whole, and what is in it."""

import contextlib
from collections.abc import Mapping
from typing import Any

import jax

from coconut.commands.evaluate import markdown_table
from coconut.errors import CoconutError
from coconut.storage import exists
from coconut.storage_path import StoragePath, as_path
from coconut.training.checkpoint import Checkpoints
from coconut.training.manifest import DamagedError, Manifest
from coconut.training.run import folder_of_run
from coconut.training.workdir import CHECKPOINTS


def list_checkpoints(workdir: StoragePath | str) -> str:
    """A Markdown table of a workdir's checkpoints, those set aside among them. Manifests alone are read.

    Raises:
      CoconutError: there is no workdir, or no checkpoint in it.
    """
    with _opened(workdir) as checkpoints:
        good = checkpoints.manifests()
        best = checkpoints.step("best")
        rows = []
        for step in checkpoints.steps():
            if step in good:
                manifest = good[step]
                note = "best" if step == best else ""
                rows.append([str(step), *_cells(manifest), note])
            else:
                rows.append([str(step), "", "", "", "damaged"])
        rows += [[name.partition(".")[0], "", "", "", f"set aside: {name}"] for name in checkpoints.set_aside()]
    if not rows:
        raise CoconutError(f"{workdir} holds no checkpoint")
    return markdown_table(("step", "stage", "accuracy %", "MiB", ""), rows)


def verify_checkpoints(workdir: StoragePath | str) -> tuple[str, bool]:
    """Compares every file of every checkpoint with what was saved.

    Returns:
      A Markdown table, and whether all are whole.

    Raises:
      CoconutError: there is no workdir, or no checkpoint in it.
    """
    rows, whole = [], True
    with _opened(workdir) as checkpoints:
        for step in checkpoints.steps():
            try:
                manifest = checkpoints.verify(step)
                rows.append([str(step), f"whole: {len(manifest.files):,} files, {_mebibytes(manifest)} MiB"])
            except DamagedError as error:
                rows.append([str(step), f"damaged: {error}"])
                whole = False
    if not rows:
        raise CoconutError(f"{workdir} holds no checkpoint")
    return markdown_table(("step", "state"), rows), whole


def show_checkpoint(workdir: StoragePath | str, step: int | None) -> dict[str, Any]:
    """What a checkpoint says of itself, and its arrays' shapes and dtypes.

    Args:
      workdir: of a run.
      step: which; None for the latest that is whole.

    Raises:
      CoconutError: there is no such checkpoint, or it is damaged.
    """
    with _opened(workdir) as checkpoints:

        def read(step: int) -> dict[str, Any]:
            manifest = checkpoints.verify(step)
            leaves = jax.tree_util.tree_flatten_with_path(checkpoints.arrays(step))[0]
            arrays = {jax.tree_util.keystr(path): f"{leaf.dtype} {list(leaf.shape)}" for path, leaf in leaves}
            progress = {name: value for name, value in vars(manifest.progress).items() if name != "data"}
            return {
                **progress,
                "validation": dict(manifest.validation),
                "proven": manifest.proven,
                "parameter_norm": manifest.parameter_norm,
                "run": dict(manifest.run),
                "files": {name: size for name, (size, _) in manifest.files.items()},
                "arrays": arrays,
            }

        found = checkpoints.newest_good("latest" if step is None else step, read)
    if found is None:
        raise CoconutError(f"{workdir} holds no checkpoint")
    return found


def _opened(workdir: StoragePath | str) -> contextlib.closing[Checkpoints]:
    workdir = as_path(workdir)
    if not exists(workdir / CHECKPOINTS):
        workdir = folder_of_run(workdir)
    if not exists(workdir / CHECKPOINTS):
        raise CoconutError(f"{workdir} holds no checkpoints: there is no {workdir / CHECKPOINTS}")
    return contextlib.closing(Checkpoints(workdir, read_only=True))


def _cells(manifest: Manifest) -> list[str]:
    validation: Mapping[str, float] = manifest.validation
    accuracy = f"{100 * validation['accuracy']:.1f}" if "accuracy" in validation else ""
    return [str(manifest.progress.stage), accuracy, _mebibytes(manifest)]


def _mebibytes(manifest: Manifest) -> str:
    return f"{sum(size for size, _ in manifest.files.values()) / 2**20:,.1f}"
