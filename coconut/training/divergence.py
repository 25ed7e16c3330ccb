"""What is kept of a step that ended a run, and that step done again."""

import contextlib
import dataclasses
import json
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coconut.errors import CoconutError
from coconut.methods import get_method
from coconut.methods.method import Views
from coconut.sharding import make_mesh
from coconut.storage import by_first_process, explained, make_folder, read_text, write_atomically
from coconut.storage_path import StoragePath, as_path
from coconut.training.checkpoint import Checkpoints
from coconut.training.optimizer import make_optimizer
from coconut.training.progress import Progress
from coconut.training.run import Run
from coconut.training.setup import abstract_state
from coconut.training.state import TrainState
from coconut.training.step import make_loss
from coconut.types import Batch, Language, Latent, Schedule

FOLDER = "diverged"
BATCH_FIELDS = tuple(field.name for field in dataclasses.fields(Batch) if field.name != "schedule")


def save_bundle(
    workdir: StoragePath, run: Run, state: TrainState, progress: Progress, views: Views, rows: slice
) -> StoragePath:
    """Writes what `replay` needs: the state as a checkpoint, and the last step's batches.

    The run's own ``run.json`` holds the rest: config, tokenizer, and the seed that all keys come from.

    Args:
      workdir: of the run.
      run: the run.
      state: the parameters that the step began from, since it changed none.
      progress: where the run stands behind the step.
      views: the step's batches, this process's rows of them.
      rows: which rows these are.

    Returns:
      The bundle's folder.

    Raises:
      CoconutError: it cannot be written.
    """
    folder = workdir / FOLDER / str(progress.step)
    by_first_process(lambda: make_folder(folder))
    with contextlib.closing(Checkpoints(folder, run.identity())) as checkpoints:
        checkpoints.save(state, progress, {}, broken=True)
    arrays = {
        f"{name}/{field}": value
        for name, view in views.items()
        for field in BATCH_FIELDS
        if (value := getattr(view, field)) is not None
    }
    path = folder / f"rows_{rows.start or 0:06d}.npz"
    with explained(path), path.open("wb") as file:
        np.savez(file, **arrays)
    schedules = {name: [_span_to_json(span) for span in view.schedule] for name, view in views.items()}
    content = {"step": progress.step, "stage": progress.stage, "seed": run.config.seed, "schedules": schedules}
    by_first_process(lambda: write_atomically(folder / "bundle.json", json.dumps(content, indent=1) + "\n"))
    return folder


def replay(folder: StoragePath | str) -> dict[str, Any]:
    """Does the step of a bundle again, as far as its loss, and looks where numbers stop being finite.

    Args:
      folder: what `save_bundle` returned: ``WORKDIR/diverged/STEP``.

    Returns:
      ``step``; ``loss`` of the whole batch; ``parameters`` that are not finite or larger than 1e4, by name; ``rows``:
      for each row its ``example`` (a list where a row holds several), its ``loss`` where it stands alone, and its
      ``columns``. Rows whose loss is not finite come first.

    Raises:
      CoconutError: it is no bundle, or it is damaged.
    """
    folder = as_path(folder)
    run = Run.load(folder.parent.parent)
    if run.config.drawing is not None:
        raise CoconutError(
            f"{folder}: the run learns from samples of its model, which a bundle does not hold: its checkpoint, "
            "its questions and the run's seed make them again (coconut train --from_step)"
        )
    try:
        content = json.loads(read_text(folder / "bundle.json"))
        views = _read_views(folder, content["schedules"])
        first = content["step"] - 1
    except CoconutError:
        raise
    # What JSON, numpy and zip files raise of content that is not as it was written.
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise CoconutError(f"{folder}: no bundle of a diverged run ({type(error).__name__}: {error})") from error
    mesh, config = make_mesh(), run.config
    template, expected = abstract_state(config, make_optimizer(config.optimizer), mesh)
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        found = checkpoints.newest_good("latest", lambda step: checkpoints.restore(step, expected))
    if found is None:
        raise CoconutError(f"{folder} holds no checkpoint")
    state, _ = found
    loss = make_loss(template, get_method(config.method), options=config.options)
    key = jax.random.fold_in(jax.random.key(config.seed), first)
    with jax.set_mesh(mesh):
        whole = float(loss(state.parameters, views, key))
        lines = []
        for row, example in enumerate(views["main"].examples.tolist()):
            # The row as often as the batch has rows: one program for all.
            alone = jax.tree.map(lambda x, row=row: jnp.broadcast_to(x[row], x.shape), views)
            value = float(loss(state.parameters, alone, key))
            lines.append({"example": example, "loss": value, "columns": int(views["main"].valid[row].sum())})
    lines.sort(key=lambda line: bool(np.isfinite(line["loss"])))
    largest = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.abs(x).max(), tree))(state.parameters)
    odd = {name: float(value) for name, value in largest.items() if not value <= 1e4}
    return {"step": content["step"], "loss": whole, "parameters": odd, "rows": lines}


def describe(result: Mapping[str, Any]) -> str:
    """The result of `replay` as lines for a terminal."""
    bad = [line for line in result["rows"] if not np.isfinite(line["loss"])]
    lines = [f"step {result['step']}: the loss of its batch is {result['loss']}"]
    for name, value in result["parameters"].items():
        lines.append(f"parameter {name}: its largest value is {value:g}")
    if bad and len(bad) < len(result["rows"]):
        lines.append("not finite by themselves: examples " + ", ".join(str(line["example"]) for line in bad))
    elif bad:
        lines.append("no row is finite by itself: the parameters are broken, not the data")
    else:
        lines.append("every row is finite by itself; what is not is the gradient, or the sum")
    return "\n".join(lines)


def _read_views(folder: StoragePath, schedules: Mapping[str, Sequence[Sequence[Any]]]) -> dict[str, Batch]:
    with explained(folder):
        paths = sorted(path for path in folder.iterdir() if path.name.startswith("rows_"))
        parts = []
        for path in paths:
            with path.open("rb") as file:
                parts.append(dict(np.load(file, allow_pickle=False)))
    join = lambda key: np.concatenate([part[key] for part in parts])
    return {
        name: Batch(
            schedule=_schedule(spans),
            # Rows of one example have no members.
            **{
                field: join(f"{name}/{field}")
                for field in BATCH_FIELDS
                if f"{name}/{field}" in parts[0] or field != "members"
            },
        )
        for name, spans in schedules.items()
    }


def _span_to_json(span: Language | Latent) -> list[Any]:
    return (
        ["language", span.length, span.scored] if isinstance(span, Language) else ["latent", span.length, span.together]
    )


def _schedule(spans: Sequence[Sequence[Any]]) -> Schedule:
    return tuple(Language(*span[1:]) if span[0] == "language" else Latent(*span[1:]) for span in spans)
