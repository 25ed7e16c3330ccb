"""Checkpoints that rot: whatever happens to their files is seen, named, and cannot end a run that has another one."""

import contextlib
import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from coconut.errors import CoconutError
from coconut.training.checkpoint import Checkpoints
from coconut.training.manifest import MANIFEST, DamagedError
from coconut.training.progress import Progress
from coconut.training.state import TrainState

GOOD, NEWEST = 4, 8


def state_of(step: int) -> TrainState:
    """Arrays that no other step has."""
    rng = np.random.default_rng(step)
    return TrainState(
        parameters={"w": jnp.asarray(rng.standard_normal(300), jnp.float32), "b": jnp.ones(3)},
        opt_state={"m": jnp.asarray(rng.standard_normal(300), jnp.float32)},
        step=jnp.asarray(step, jnp.int32),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with two checkpoints."""
    workdir = tmp_path_factory.mktemp("saved")
    with contextlib.closing(Checkpoints(workdir, {"config": {}})) as checkpoints:
        for step in (GOOD, NEWEST):
            progress = Progress(step=step, data={"next_index": step}, seconds=0.1 * step)
            checkpoints.save(state_of(step), progress, {"accuracy": 0.5}, proven=True)
    return workdir


def files(workdir: Path, step: int) -> list[str]:
    folder = workdir / "checkpoints" / str(step)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def flip(path: Path, rng: random.Random) -> None:
    """Flips one bit; a file without any gets a byte."""
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(content) or b"x")


def truncate(path: Path, rng: random.Random) -> None:
    """Cuts the end off; a file without any content is removed."""
    content = path.read_bytes()
    if not content:
        path.unlink()
    else:
        path.write_bytes(content[: rng.randrange(len(content))])


def delete(path: Path, rng: random.Random) -> None:
    del rng
    path.unlink()


def add(path: Path, rng: random.Random) -> None:
    """A file of another's content beside it."""
    del rng
    shutil.copy(path, path.with_name(path.name + ".copy"))


def of_the_other(path: Path, rng: random.Random) -> None:
    """The file of the same name, or place, of the checkpoint before."""
    del rng
    folder = next(parent for parent in path.parents if parent.name == str(NEWEST))
    other = folder.parent / str(GOOD) / path.relative_to(folder)
    path.write_bytes(other.read_bytes() if other.exists() else b"")


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (flip, flip, flip, truncate, delete, add, of_the_other)


def attacks(workdir: Path) -> Iterator[tuple[str, Callable[[Path, random.Random], None]]]:
    for name in files(workdir, NEWEST):
        for damage in DAMAGES:
            yield name, damage
    # What JSON makes of a flipped bit is often JSON again.
    for _ in range(40):
        yield MANIFEST, flip


def restored(workdir: Path, *, read_only: bool) -> tuple[int, TrainState]:
    with contextlib.closing(Checkpoints(workdir, read_only=read_only)) as checkpoints:
        found = checkpoints.newest_good("latest", lambda step: (step, checkpoints.restore(step, state_of(0))[0]))
    assert found is not None
    return found


def test_every_damage_to_every_file_is_seen_and_the_checkpoint_before_is_used(saved: Path, tmp_path: Path) -> None:
    """Nothing silent, no error but ours, and no good checkpoint lost."""
    rng, tried = random.Random(0), 0
    folder = tmp_path / "run"
    for name, damage in attacks(saved):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved, folder)
        path = folder / "checkpoints" / str(NEWEST) / name
        before = path.read_bytes()
        damage(path, rng)
        if path.exists() and path.read_bytes() == before and not path.with_name(path.name + ".copy").exists():
            continue  # The other checkpoint has the same file.
        tried += 1
        step, state = restored(folder, read_only=False)
        assert step == GOOD, (name, damage.__name__)
        assert (np.asarray(state.parameters["w"]) == np.asarray(state_of(GOOD).parameters["w"])).all()
        # It is kept, with whatever is left of it.
        assert (folder / "checkpoints" / "set_aside" / f"{NEWEST}.damaged").is_dir()
    assert tried > 40


def test_a_reader_passes_damage_over_and_changes_nothing(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    flip(tmp_path / "run" / "checkpoints" / str(NEWEST) / MANIFEST, random.Random(1))
    before = sorted((tmp_path / "run").rglob("*"))
    assert restored(tmp_path / "run", read_only=True)[0] == GOOD
    assert sorted((tmp_path / "run").rglob("*")) == before
    with contextlib.closing(Checkpoints(tmp_path / "run", read_only=True)) as checkpoints:
        # One that was asked for by its step is not replaced by another.
        with pytest.raises(DamagedError, match=rf"{NEWEST}/{MANIFEST}: "):
            checkpoints.newest_good(NEWEST, lambda step: checkpoints.restore(step, state_of(0)))
        with pytest.raises(CoconutError, match=rf"no checkpoint of step 5; there are: {GOOD}, {NEWEST}"):
            checkpoints.newest_good(5, lambda step: step)


def test_with_no_whole_checkpoint_left_the_error_names_each_and_stays(saved: Path, tmp_path: Path) -> None:
    """A run must not begin anew beside what can perhaps be mended."""
    shutil.copytree(saved, tmp_path / "run")
    for step in (GOOD, NEWEST):
        (tmp_path / "run" / "checkpoints" / str(step) / MANIFEST).unlink()
    for _ in range(2):
        with pytest.raises(CoconutError, match=r"(?s)no checkpoint is left that is whole.*4\.damaged.*8\.damaged"):
            restored(tmp_path / "run", read_only=False)
    with pytest.raises(CoconutError, match="no checkpoint is left"):
        restored(tmp_path / "run", read_only=True)


@pytest.mark.parametrize("name", ["999", "12"])
def test_an_empty_folder_is_no_checkpoint(saved: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / name).mkdir()
    assert restored(tmp_path / "run", read_only=True)[0] == NEWEST
    assert restored(tmp_path / "run", read_only=False)[0] == NEWEST
    assert (tmp_path / "run" / "checkpoints" / "set_aside" / f"{name}.damaged").is_dir()


def test_what_a_kill_leaves_is_cleared_and_what_it_replaced_is_back(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    for leftover in (".saving-12", ".removing-2", f".replaced-{GOOD}"):
        shutil.copytree(folder / str(GOOD), folder / leftover)
    (folder / str(NEWEST)).rename(folder / f".replaced-{NEWEST}")
    with contextlib.closing(Checkpoints(tmp_path / "run")) as checkpoints:
        assert checkpoints.steps() == [GOOD, NEWEST]
    assert sorted(path.name for path in folder.iterdir()) == [str(GOOD), str(NEWEST)]


def test_going_back_sets_later_checkpoints_aside(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    with contextlib.closing(Checkpoints(tmp_path / "run")) as checkpoints:
        checkpoints.put_aside_later(GOOD)
        assert (checkpoints.steps(), checkpoints.set_aside()) == ([GOOD], [f"{NEWEST}.later"])


@pytest.mark.parametrize(
    "field,value,message",
    [
        ("step", -1, "must be a number of at least 0"),
        ("stage_step", 9, "must be at most step = 8"),
        ("seconds", float("nan"), "must be a number of at least 0"),
        ("stage", "1", "must be int"),
        ("window", {"loss": [1.0]}, "'loss' must be a sum and a weight"),
        ("stages", [3], "must be tuple"),
        ("finished", 1, "must be bool"),
    ],
)
def test_progress_is_not_trusted(field: str, value: object, message: str) -> None:

    good = json.loads(json.dumps(dataclasses.asdict(Progress(step=8, seconds=1.0))))
    assert Progress.from_json(good, "here") == Progress(step=8, seconds=1.0)
    with pytest.raises(CoconutError, match=f"here: Progress.{field} = .*{message}"):
        Progress.from_json({**good, field: value}, "here")
    with pytest.raises(CoconutError, match="progress must be an object of stage"):
        Progress.from_json({**good, "other": 1}, "here")
    with pytest.raises(CoconutError, match="stage = 3: the curriculum has stages 0 to 2"):
        Progress(stage=3).check_stage(0, 2, "here")


def test_a_reader_goes_on_to_the_newer_one_where_training_removes_what_it_reads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.closing(Checkpoints(tmp_path, {"config": {}}, keep_latest=1)) as training:
        training.save(state_of(GOOD), Progress(step=GOOD), {}, proven=True)

        def read(step: int) -> TrainState:
            reader.verify(step)
            if step == GOOD:
                training.save(state_of(NEWEST), Progress(step=NEWEST), {}, proven=True)
            return reader.restore(step, state_of(0))[0]

        with contextlib.closing(Checkpoints(tmp_path, read_only=True)) as reader:
            found = reader.newest_good("latest", read)
    assert found is not None and int(found.step) == NEWEST
    # What is gone is not damaged.
    assert not caplog.records
