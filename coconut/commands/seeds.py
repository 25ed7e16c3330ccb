"""``coconut train --seeds``: a run for each of several seeds, one after the other."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from rich.console import Console

from coconut.commands.train import run_training
from coconut.datasets import load_dataset
from coconut.errors import CoconutError, DivergedError
from coconut.storage import exists
from coconut.storage_path import StoragePath
from coconut.training.config import RunConfig
from coconut.training.setup import prepare
from coconut.training.workdir import RUN_FILE, latest_manifest


def seed_folder(workdir: StoragePath, seed: int) -> StoragePath:
    """Where the run of a seed lies."""
    return workdir / f"seed_{seed}"


def train_seeds(
    resolve: Callable[[int], RunConfig],
    seeds: Sequence[int],
    workdir: StoragePath,
    *,
    console: Console,
    allow: Collection[str] = (),
    **options: Any,
) -> dict[int, StoragePath] | None:
    """Trains a run for each seed in ``workdir/seed_N``; started again it goes on, and leaves alone what is finished.

    A seed that diverges does not keep the others from running.

    Args:
      resolve: the run of a seed.
      seeds: of parameters and data order; the questions are the same for every seed.
      workdir: the folder of all runs.
      console: where progress goes.
      allow: as `coconut.training.loop.train` takes it.
      options: what else `run_training` takes.

    Returns:
      The workdir of each seed; None where training was interrupted.

    Raises:
      CoconutError: bad input, before the first run starts: ``workdir`` is a run itself, or the folder of a seed holds
        another run.
      DivergedError: the run of a seed diverged; the message names all of them. The others have run.
    """
    if exists(workdir / RUN_FILE):
        raise CoconutError(f"--workdir {workdir}: is a run itself; --seeds makes a folder of runs")
    folders = {seed: seed_folder(workdir, seed) for seed in seeds}
    dataset = load_dataset(resolve(seeds[0]).data)
    for seed, folder in folders.items():
        if exists(folder / RUN_FILE):
            prepare(resolve(seed), dataset, folder)[0].check(folder, allow)
    diverged: dict[int, DivergedError] = {}
    for number, (seed, folder) in enumerate(folders.items(), 1):
        which = f"seed {seed} ({number} of {len(seeds)})"
        manifest = latest_manifest(folder)
        if manifest is not None and manifest.progress.finished:
            console.print(f"{which}: is finished, in {folder}", highlight=False, markup=False)
            continue
        console.print(f"{which}: {folder}", highlight=False, markup=False)
        try:
            # Resolved once more: the workdir keeps the gin text that was read last.
            result = run_training(resolve(seed), folder, dataset=dataset, allow=allow, console=console, **options)
        except DivergedError as error:
            diverged[seed] = error
            console.print(f"{which}: diverged: {error}", highlight=False, markup=False)
            continue
        if not result.progress.finished:
            return None
    if diverged:
        raise DivergedError("; ".join(f"seed {seed}: {error}" for seed, error in diverged.items()))
    return folders
